"""Every key has an effect or is refused: which keys each method refuses, when keys are idle, and how the others are
seen. A key that is new in the settings fails here until it has an entry."""

import ast
import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config, load_search, resolved
from fewstep.distill.catalog.effects import RUN, SEARCH, default_of
from fewstep.distill.catalog.methods import METHODS, SEARCHES, load
from fewstep.distill.config.method import as_tree, with_defaults
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.search import SearchConfig
from fewstep.distill.errors import UserError
from fewstep.distill.settings import Idle
from fewstep.distill.training.runner import Runner

Tree = dict[str, Any]

CONTROL = {"control": {"name": "canny"}}
NEEDED: dict[str, Tree] = {"nct": CONTROL, "controlnet": CONTROL}
SECTIONS: dict[str, Tree] = {"rg_lcd": {"lrm": {}, "uncertainty": {}}}
WITHOUT_TEACHER = ("edm", "autoencoder", "text_encoder")

# Keys of a run that a method leaves unread, and refuses when they are given.
STUDENT = {"student.init", "student.network", "student.norm"}
PREDICTION = {"student.prediction", "student.conversion_steps"}
WHOLE_STUDENT = {
    f"student.{f.name}" for f in dataclasses.fields(RunConfig.__pydantic_fields__["student"].annotation)
}
NO_PICTURES = {"validation_steps", "validation_prompts", "compile"}
REFUSED = {
    **dict.fromkeys(("lcd", "rg_lcd", "scott"), STUDENT),
    **dict.fromkeys(("lct", "rcm", "dmd2", "nct", "interlcm", "controlnet"), frozenset()),
    **dict.fromkeys(("ict", "meanflow"), PREDICTION),
    "diffusion": STUDENT | PREDICTION,
    "edm": {"teacher"} | PREDICTION,
    "autoencoder": {"teacher", *NO_PICTURES, *WHOLE_STUDENT},
    "text_encoder": {"teacher", *NO_PICTURES, *WHOLE_STUDENT, "gradient_checkpointing", "data.center_crop",
                     "enable_xformers_memory_efficient_attention"},
}  # fmt: skip

# How the other keys are seen: in what is built and two steps of it (`built`), in a run folder (`written`), or in the
# tests that are named.
BUILT = {
    "data.split": "holdout", "data.caption_column": None, "resolution": 32, "seed": 1, "train_batch_size": 3,
    "gradient_accumulation_steps": 2, "max_train_steps": 3, "optimizer": "radam", "learning_rate": 1e-3,
    "lr_scheduler": "linear", "adam_beta1": 0.5, "adam_beta2": 0.5, "adam_weight_decay": 0.5, "adam_epsilon": 1e-3,
    "max_grad_norm": 1e-4, "mixed_precision": "bf16", "gradient_checkpointing": True, "use_ema": True,
    "student.kind": "lora", "student.dropout": 0.5, "data.name": "emoji-noto", "teacher": None,
}  # fmt: skip
BESIDE: dict[str, Tree] = {  # values of other keys beside which these have an effect
    "lr_warmup_steps": {"lr_scheduler": "linear"},
    "ema_decay": {"use_ema": True},
    "ema_std": {"use_ema": True},
    "student.rank": {"student.kind": "lora"},
    "student.lora_alpha": {"student.kind": "lora"},
    "student.lora_dropout": {"student.kind": "lora"},
    "student.target_modules": {"student.kind": "lora"},
    "student.export_fused": {"student.kind": "lora"},
    "raw_weights.keep": {"raw_weights.every": 1},
}
BUILT |= {
    "lr_warmup_steps": 2, "ema_decay": 0.05, "ema_std": 0.1, "student.rank": 2, "student.lora_alpha": 8,
    "student.lora_dropout": 0.5, "student.target_modules": ["to_q"],
}  # fmt: skip
WRITTEN = {
    "logging_steps": 1, "checkpointing_steps": 1, "checkpoints_total_limit": 1, "validation_steps": 1,
    "validation_prompts": ["dog"], "raw_weights.every": 1, "raw_weights.keep": 1, "student.export_fused": False,
}  # fmt: skip
ELSEWHERE = {
    "output_dir": "test_runner", "report_to": "test_cli_errors", "resume_from_checkpoint": "test_cli_errors",
    "compile": "test_memory_savers", "cpu_offload": "test_memory_savers", "allow_tf32": "a GPU alone shows it",
    "enable_xformers_memory_efficient_attention": "test_cli_errors", "vae": "methods/test_lct_runs",
    "data.image_column": "data/test_sources", "data.center_crop": "data/test_images",
    "data.random_flip": "methods/test_ict", "student.init": "methods/test_ict_student",
    "student.network": "methods/test_ict_student", "student.norm": "pipelines/test_unet_norms",
    "student.prediction": "test_conversion", "student.conversion_steps": "test_conversion",
    **{f"data.{k}": "test_teacher_data" for k in
       ("prompts", "num_inference_steps", "guidance_scale", "images_per_prompt", "seed")},
}  # fmt: skip


def options(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [o for part in get_args(kind) for o in options(part)]
    return [kind]


def leaves(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and their types; a section that may be null is a key and its inside keys too."""
    for f in dataclasses.fields(cls):
        inside = [k for k in options(f.type) if dataclasses.is_dataclass(k)]
        if len(inside) != 1 or type(None) in options(f.type):
            yield prefix + f.name, f.type
        if len(inside) == 1:
            yield from leaves(inside[0], f"{prefix}{f.name}.")


def another(kind: Any, default: Any) -> Any:
    """A value of the type that is not the default."""
    named = [v for k in options(kind) if get_origin(k) is Literal for v in get_args(k)]
    if named:
        return next(v for v in named if v != default)
    for option in options(kind):
        if option is bool:
            return not default
        if option is int:
            return (default or 0) + 1
        if option is float:
            return 0.1 if not default else 2 * default if default >= 1 else default / 2
        if option is str:
            return "other"
        if get_origin(option) is dict:
            return {"in_channels": 3}
        if get_origin(option) is tuple:
            return [another(get_args(option)[0], None)] * (1 if Ellipsis in get_args(option) else 2)
    raise AssertionError(kind)


def put(tree: Tree, key: str, value: Any) -> Tree:
    """A copy with a dotted key set."""
    head, _, rest = key.partition(".")
    return {**tree, head: put(tree.get(head) or {}, rest, value) if rest else value}


def tree_of(method: str) -> Tree:
    teacher = {} if method in WITHOUT_TEACHER else {"teacher": {"path": "emoji-sd"}}
    own = {"name": method, **NEEDED.get(method, {})}
    return {"output_dir": "run", "data": {"name": "folder"}, "method": own, **teacher}


def search_of(method: str) -> Tree:
    return {"output_dir": "run", "data": {"name": "emoji"}, "student": {"path": "emoji-sd"}, "steps": 1,
            "method": {"name": method}}  # fmt: skip


RUN_KEYS = {k: t for k, t in leaves(RunConfig) if k != "method" and not k.startswith(("teacher.", "vae."))}


def test_every_key_of_a_run_has_an_entry() -> None:
    assert set(RUN_KEYS) == {*BUILT, *WRITTEN, *ELSEWHERE}
    assert set(REFUSED) == set(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_leaves_unread_is_refused(method: str) -> None:
    refused = set()
    for key, kind in RUN_KEYS.items():
        value = {"path": "emoji-sd"} if key in ("teacher", "vae") else another(kind, default(key))
        try:
            load_config(put(tree_of(method), key, value))
        except UserError as error:
            if f"has no effect on method {method}" in str(error):
                assert str(error).startswith(key)
                refused.add(key)
    assert refused == REFUSED[method]


def default(key: str) -> Any:
    """Of a run's key."""
    if key in ("output_dir", "data.name"):
        return "x"
    return default_of(resolved(RunConfig, put(tree_of("ict"), "vae", {"path": "x"}), None), key)


def rows() -> Iterator[tuple[str, Idle, str]]:
    """A method, a row and a key of it."""
    owned = [("lcd" if "student.conversion_steps" in row.keys else "ict", row) for row in RUN] + [
        ("q_sched", row) for row in SEARCH
    ]
    for name, method in {**METHODS, **SEARCHES}.items():
        owned += [(name, row) for row in method.settings.idle]
    for name, row in owned:
        for key in row.keys.split():
            yield name, row, key


def field_of(method: str, key: str) -> tuple[Any, Any]:
    """The type and the default of a key."""
    if key.startswith("method."):
        kinds, key = leaves({**METHODS, **SEARCHES}[method].settings, "method."), key
        cls, path = {**METHODS, **SEARCHES}[method].settings, key.split(".")[1:]
    else:
        cls = SearchConfig if method in SEARCHES else RunConfig
        kinds, path = leaves(cls), key.split(".")
    for part in path[:-1]:
        kind = next(f.type for f in dataclasses.fields(cls) if f.name == part)
        cls = next(k for k in options(kind) if dataclasses.is_dataclass(k))
    info = cls.__pydantic_fields__[path[-1]]
    return dict(kinds)[key], None if info.is_required() else info.get_default(call_default_factory=True)


@pytest.mark.parametrize(("method", "row", "key"), rows(), ids=lambda v: v if isinstance(v, str) else "")
def test_idle_keys_are_refused_and_others_taken(method: str, row: Idle, key: str) -> None:
    search = method in SEARCHES
    read: Any = load_search if search else load_config
    tree = search_of(method) if search else tree_of(method)
    for section, inside in SECTIONS.get(method, {}).items():
        tree = put(tree, f"method.{section}", inside)
    if row.where is not None:
        tree = put(tree, *row.where)
    kind, own = field_of(method, key)
    besides, usual = field_of(method, row.beside)
    value = 0.5 if key == "method.guidance_end" else another(kind, own)
    if row.longer:
        idle, good, value = 2, 5, 3
        if key == "lr_warmup_steps":
            tree = put(tree, "lr_scheduler", "linear")
        if key == "student.conversion_steps":
            tree = put(tree, "student.prediction", "sample")
    elif row.values:
        idle, good = row.values[0], usual if usual not in row.values else another(besides, usual)
    else:
        idle, good = (usual if usual not in row.only else another(besides, usual)), row.only[0]
        if idle in row.only:
            named = [v for k in options(besides) if get_origin(k) is Literal for v in get_args(k)]
            idle = next(v for v in named if v not in row.only)
    with pytest.raises(UserError) as refused:
        read(put(put(tree, row.beside, idle), key, value))
    line = str(refused.value)
    assert line.startswith(f"{key}: ") and ("no effect beside" in line or "longer than the run" in line)
    try:
        read(put(put(tree, row.beside, good), key, value))
    except UserError as error:  # for another reason
        assert f"{key}: " not in str(error) or f"beside {row.beside}" not in str(error), error
    try:
        read(put(put(tree, row.beside, idle), key, own))  # a default that is written out
    except UserError as error:
        assert not str(error).startswith(key), error


def test_what_a_run_wrote_down_is_taken_again() -> None:
    for method in METHODS:
        config = resolved(RunConfig, tree_of(method), None)
        assert with_defaults(as_tree(config), config) == as_tree(config)
        if method != "lct":
            load_config(as_tree(config))
    old = put(tree_of("lcd"), "ema_decay", 0.5)  # from before it was refused
    config = resolved(RunConfig, tree_of("lcd"), None)
    assert with_defaults(old, config)["ema_decay"] == 0.5 and "seed" in with_defaults(old, config)


def reads(module: Any) -> set[str]:
    """Names of attributes that the code of a module reads."""
    return {n.attr for n in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(n, ast.Attribute)}


@pytest.mark.parametrize("name", [*METHODS, *SEARCHES])
def test_every_setting_of_a_method_is_read(name: str) -> None:
    """By the code of the method, of its base classes, or of what takes a section of its settings."""
    method: Any = load(name)
    own = [sys.modules[c.__module__] for c in method.__mro__ if c.__module__.startswith("fewstep.distill")]
    beside = {v.__module__ for m in own for v in vars(m).values() if hasattr(v, "__module__")}
    modules = {*own, *(sys.modules[m] for m in beside if m and m.startswith("fewstep.distill"))}
    seen = set().union(*map(reads, modules))
    unread = [k for k, _ in leaves(method.Settings) if k.rpartition(".")[2] not in seen]
    assert not unread


@pytest.fixture(scope="module")
def tiny(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        method = {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2}
        yield {"teacher": {"path": str(tiny_pipeline)}, "data": {"name": "emoji", "split": "score"},
               "method": method, "train_batch_size": 2, "max_train_steps": 2, "max_grad_norm": 1.0,
               "logging_steps": 2, "checkpointing_steps": 2}  # fmt: skip


def digest(tensors: Any) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.detach().float().contiguous().numpy().tobytes())
    return sha.hexdigest()


def built(tree: Tree, output: Path) -> tuple[Any, ...]:
    """What two steps leave in memory."""
    runner = Runner(load_config({**tree, "output_dir": str(output)}))
    runner._build(None)
    losses = [float(runner._iteration(i)["loss"]) for i in range(2)]
    network = runner.method.student.network
    averages = [] if runner.ema is None else runner.ema.state_dict().values()
    return (
        losses,
        digest(runner.players["student"]),
        digest(averages),
        network.is_gradient_checkpointing,
        runner.config.max_train_steps,
    )


def beside(key: str, tree: Tree) -> Tree:
    for other, value in BESIDE.get(key, {}).items():
        tree = put(tree, other, value)
    return tree


@pytest.fixture(scope="module")
def plain(tiny: Tree, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What is built without a key, by what stands beside it."""
    folder, out = tmp_path_factory.mktemp("plain"), {}
    for key in ("seed", "lr_warmup_steps", "ema_decay", "student.rank"):
        out[str(BESIDE.get(key, {}))] = built(beside(key, tiny), folder / key)
    return out


@pytest.mark.parametrize("key", sorted(set(BUILT) - {"teacher"}))
def test_a_key_is_seen_in_what_is_built(key: str, tiny: Tree, plain: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    changed = built(put(beside(key, tiny), key, BUILT[key]), tmp_path / "run")
    assert changed != plain[str(BESIDE.get(key, {}))]


@pytest.mark.parametrize("key", WRITTEN)
def test_a_key_is_seen_in_the_run_folder(key: str, tiny: Tree, tmp_path: Path) -> None:
    def written(tree: Tree, name: str) -> dict[str, Any]:
        run = Runner(load_config({**tree, "output_dir": str(tmp_path / name)})).train()
        files = {str(p.relative_to(run)): p for p in run.rglob("*") if p.is_file()}
        samples = {k: p.read_bytes() for k, p in files.items() if k.startswith("samples")}
        return {
            **dict.fromkeys(files),
            **samples,
            "log.jsonl": len(files["log.jsonl"].read_text().splitlines()),
        }

    usual = beside(key, {**tiny, "max_train_steps": 4})
    if key == "checkpoints_total_limit":
        usual = put(usual, key, 2)
    assert written(usual, "usual") != written(put(usual, key, WRITTEN[key]), "changed")


def test_the_list_names_the_class_of_every_method() -> None:
    for name, entry in {**METHODS, **SEARCHES}.items():
        assert load(name).Settings is entry.settings
