"""Configurations: typed YAML, dotted overrides, and one line for each mistake."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from fewstep.distill.catalog.configuration import fitted, is_search, load_config, load_search, with_overrides
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.config.method import as_tree, with_defaults
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.config.validation import numbers
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.controls import Canny
from fewstep.distill.settings import LORA_TARGETS
from pydantic import ValidationError

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TREE: dict[str, Any] = {
    "output_dir": "run",
    "teacher": {"path": "emoji-sd"},
    "data": {"name": "emoji"},
    "method": {"name": "lcd", "w_min": 2},
}


def config(*arguments: str) -> RunConfig:
    return load_config(with_overrides(TREE, arguments))


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        config(*arguments)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_defaults_and_the_methods_settings_are_filled_in() -> None:
    c = config()
    assert c.data.split == "train" and c.max_train_steps == 1000 and c.student.target_modules == LORA_TARGETS
    assert c.method["name"] == "lcd" and c.method["w_min"] == 2.0 and c.method["w_max"] == 15.0


def test_what_is_written_out_is_read_as_the_same(tmp_path: Path) -> None:
    c = config(
        "--validation_prompts",
        "[red cat, dog]",
        "--validation_steps",
        "5",
        "--student.kind",
        "lora",
        "--resolution",
        "16",
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(as_tree(c)))
    again = load_config(read_yaml(path))
    assert again == c and again.validation_prompts == ("red cat", "dog")


def test_a_configuration_from_before_a_key_was_added_has_its_default() -> None:
    old = as_tree(config())
    del old["student"]["export_fused"], old["method"]["distance"]
    assert with_defaults(old, config()) == as_tree(config())
    assert with_defaults({"gone": 1}, config()) == {"gone": 1}
    assert with_defaults({**old, "method": {"name": "rcm"}}, config())["method"] == {
        "name": "rcm"
    }  # another's


def test_overrides_reach_nested_keys_and_leave_the_tree_alone() -> None:
    c = config(
        "--data.name", "emoji-noto", "--raw_weights.every=5", "--gradient_checkpointing",
        "--method.timestep_scaling", "-3",
    )  # fmt: skip
    assert (c.data.name, c.raw_weights.every, c.gradient_checkpointing) == ("emoji-noto", 5, True)
    assert c.method["timestep_scaling"] == -3
    assert TREE["data"] == {"name": "emoji"} and "raw_weights" not in TREE


@pytest.mark.parametrize("value", ["1e-4", "1.0e-4", "0.0001", "1E-4"])
def test_a_learning_rate_is_a_number_however_it_is_written(value: str) -> None:
    assert config("--learning_rate", value).learning_rate == 1e-4
    tree = {**TREE, "learning_rate": yaml.safe_load(value)}
    assert load_config(tree).learning_rate == 1e-4


def test_only_numbers_become_numbers() -> None:
    assert numbers(["1e3", "-2e-1", ".5e1", "1.e2"]) == [1000, -0.2, 5, 100]
    texts = ["1 tree: big", "e", "-e", "1e", "e5", "0xe", "+e: 3", "1e-", "two1e3"]
    assert numbers(texts) == texts
    assert config("--max_train_steps", "2e3").max_train_steps == 2000


def test_a_bare_no_means_full_precision() -> None:
    assert config("--mixed_precision", "no").mixed_precision == "no"
    assert config("--mixed_precision=bf16").mixed_precision == "bf16"
    assert refusal("--mixed_precision", "yes") == (
        "mixed_precision: True does not fit: input should be 'no', 'fp16' or 'bf16'"
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--max_train_step", "5"], "max_train_step: no such key; the nearest is max_train_steps"),
        (["--max-train-steps", "5"], "max-train-steps: no such key; the nearest is max_train_steps"),
        (["--data.nam", "x"], "data.nam: no such key; the nearest is name"),
        (["--teacher.pth", "x"], "teacher.pth: no such key; the nearest is path"),
        (["--method.w_mn", "3"], "method.w_mn: no such key; the nearest is w_min"),
        (["--method.name", "lcdx"], "method.name: there is no method 'lcdx'; the nearest is lcd"),
        (["--method.name", "LCD"], "method.name: there is no method 'LCD'; the nearest is lcd"),
        (["--method.name", "zzz"], "method.name: there is no method 'zzz'; there are lcd, rg_lcd, scott, ict, lct, "
                                   "meanflow, rcm, dmd2, nct, interlcm, diffusion, controlnet, edm, autoencoder, "
                                   "text_encoder, q_sched, lcsc"),
        (["--method.name", "q_sched"], "method.name: q_sched is a search and trains nothing; give a method that does: "
                                       "lcd, rg_lcd, scott, ict, lct, meanflow, rcm, dmd2, nct, interlcm, diffusion, "
                                       "controlnet, edm, autoencoder, text_encoder"),
        (["--method", "lcd"], "method: 'lcd' has no name; write `method: {name: lcd}`"),
        (["--method", "{name: [a]}"], "method: {'name': ['a']} has no name; write `method: {name: lcd}`"),
        (["--teacher", "emoji-sd"], "teacher: 'emoji-sd' has no keys; write `teacher: {path: ...}`"),
        (["--data", "null"], "data: None has no keys; write `data: {name: ...}`"),
        (["--data", "{split: x}"], "data.name: missing; add it to the configuration"),
        (["--max_train_steps", "many"], "max_train_steps: 'many' does not fit: input should be a valid integer"),
        (["--max_train_steps"], "max_train_steps: True does not fit: input should be a valid integer"),
        (["--max_train_steps", "0"], "max_train_steps: 0 does not fit: input should be greater than or equal to 1"),
        (["--adam_beta1", "1"], "adam_beta1: 1 does not fit: input should be less than 1"),
        (["--resolution", "-4"], "resolution: -4 does not fit: input should be greater than or equal to 1"),
        (["--student.kind", "lorra"], "student.kind: 'lorra' does not fit: input should be 'full' or 'lora'"),
        (["--method.w_min", "a"], "method.w_min: 'a' does not fit: input should be a valid number"),
        (["--validation_prompts", "[a, true]"],
         "validation_prompts.1: True does not fit: input should be a valid string; write text in quotes"),
        (["--data.split"], "--data.split: its value is missing; write --data.split TEXT"),
        (["--learning_rate", ".inf"],
         "learning_rate: .inf is not finite; give a number that is"),
        (["--learning_rate", "1e999"],
         "learning_rate: 1e999 is not finite; give a number that is"),
        (["--student.network", "{a: {b: [1, .nan]}}"],
         "student.network.a.b.1: .nan is not finite; give a number that is"),
        (["--max_train_steps", "1e30"],
         "max_train_steps: 1e30 is too large; give a number below 9e18"),
        (["--seed", "9223372036854775808"],
         "seed: 9223372036854775808 is too large; give a number below 9e18"),
        (["--seed", "-1"], "seed: -1 does not fit: input should be greater than or equal to 0"),
        (["--resolution", "100000"], "resolution: 100000 does not fit: input should be less than or equal to 16384"),
        (["--student.rank", "1e6"], "student.rank: 1000000 does not fit: input should be less than or equal to 4096"),
        (["--data.name.x", "3"], "--data.name.x: name is a single value, it has no key x"),
        (["--student.network", "[1"], "--student.network: '[1' is not readable YAML; write text as '\"...\"'"),
        (["--student.network", "@x"], "--student.network: '@x' is not readable YAML; write text as '\"...\"'"),
        (["--student.network", "{a: 1, a: 2}"],
         "--student.network: '{a: 1, a: 2}' is not readable YAML; write text as '\"...\"'"),
        (["--"], "unexpected argument '--'; overrides are written --key.sub value"),
        (["lcd.yaml"], "unexpected argument 'lcd.yaml'; overrides are written --key.sub value"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_key_value_and_remedy(arguments: list[str], line: str) -> None:
    assert refusal(*arguments) == line


def test_a_long_value_is_cut() -> None:
    line = refusal("--resolution", "word " * 100)
    assert line.startswith("resolution: 'word word") and len(line) < 140


def test_missing_keys_and_odd_keys_are_named() -> None:
    with pytest.raises(UserError, match=r"^method: missing; write"):
        load_config({k: v for k, v in TREE.items() if k != "method"})
    with pytest.raises(UserError, match=r"^1: no such key"):
        load_config({**TREE, 1: 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not readable YAML (while parsing a flow sequence"),
        ("\x00", "is not readable YAML (unacceptable character"),
        ("seed: 1\nseed: 2", "the key 'seed' is given twice"),
        ("a: &a [*a]", "is nested too deeply, or in itself"),
        ("[" * 3000, "is nested too deeply"),
        ("", "holds no `key: value` lines; `fewstep recipes show emoji/lcd` is an example"),
        ("- 1", "holds no `key: value` lines; `fewstep recipes show emoji/lcd` is an example"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "lcd.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_yaml(path)
    assert str(refused.value).startswith(str(path)) and message in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match=r"no configuration .*`fewstep recipes` lists the ready ones"):
        read_yaml(tmp_path / "missing.yaml")
    with pytest.raises(UserError, match="Is a directory"):
        read_yaml(tmp_path)


def test_every_ready_configuration_of_a_run_is_valid() -> None:
    seen = [p for p in sorted(CONFIGS.rglob("*.yaml")) if "method" in read_yaml(p)]
    assert len(seen) >= 4
    for path in seen:
        tree = read_yaml(path)
        c = load_search(tree) if is_search(tree) else load_config(tree)
        assert c.output_dir.startswith("runs/"), path


@pytest.mark.parametrize(
    "text", ["2024", "007", "1_000", "1e5", "0x1f", "2024-1-1", "1.50", "no", "#2", "a: b", "[1"]
)
def test_text_is_taken_as_it_is_written(text: str, tmp_path: Path) -> None:
    assert config("--data.name", text).data.name == text
    assert config(f"--output_dir={text}").output_dir == text
    if text in ("no", "#2", "a: b", "[1"):  # what YAML itself reads otherwise
        text = "1e5"
    path = tmp_path / "config.yaml"
    path.write_text(
        f"\ufeffoutput_dir: {text}\nteacher: {{path: {text}}}\ndata: {{name: {text}, split: '{text}'}}\n"
        f"method: {{name: rg_lcd, reward: {text}}}\nvalidation_prompts: [{text}]\nvalidation_steps: 1e1\n",
        encoding="utf-8",
    )
    c = load_config(read_yaml(path))
    assert c.teacher is not None and c.validation_steps == 10
    assert {c.output_dir, c.teacher.path, c.data.name, c.data.split, c.method["reward"]} == {text}
    assert c.validation_prompts == (text,)


def test_quotes_and_null_of_a_text() -> None:
    assert config("--data.name", '"a b"').data.name == "a b"
    assert config("--data.caption_column", "null").data.caption_column is None
    assert refusal("--data.name", "null") == ("data.name: None does not fit: input should be a valid string")


def test_of_a_flag_given_twice_the_last_counts() -> None:
    assert config("--data.name", "a", "--data.name", "b").data.name == "b"


def test_an_unknown_key_that_is_like_none_is_told_what_there_is() -> None:
    assert refusal("--data.zzzz", "1").startswith(
        "data.zzzz: no such key; there are name, split, image_column"
    )


@pytest.mark.parametrize("seed", [2**63, -1, 10**30])
def test_a_seed_has_63_bits(seed: int) -> None:
    tree = {"output_dir": "x", "data": {"name": "emoji"}, "method": {"name": "ict"}, "seed": seed}
    with pytest.raises(UserError, match=f"seed: {seed} (does not fit|is too large)"):
        load_config(tree)


@pytest.mark.parametrize("name", [*METHODS, *SEARCHES])
def test_settings_hold_no_infinity(name: str) -> None:
    """Also where they are made by code: each number of each method."""
    kind: Any = {**METHODS, **SEARCHES}[name].settings
    needed = {"control": Canny()} if name in ("nct", "controlnet") else {}
    kind(**needed)
    for key, info in kind.__pydantic_fields__.items():
        if info.annotation in (float, float | None):
            with pytest.raises(ValidationError, match=f"{key}\n  Input should be (a finite|less than)"):
                kind(**needed, **{key: math.inf})


def test_a_recipe_that_flags_cut_short_fits_them_and_its_own_idle_keys_are_refused() -> None:
    ready = read_yaml(CONFIGS / "emoji" / "lcd_lora.yaml")

    def given(*flags: str, file: dict[str, Any] = ready) -> RunConfig:
        return load_config(fitted(with_overrides(file, flags), file))

    whole = given()
    assert whole.lr_warmup_steps > 0 and whole.validation_prompts and whole.use_ema
    short = given("--max_train_steps", "1", "--validation_steps", "0", "--use_ema", "false")
    assert (short.lr_warmup_steps, short.validation_prompts) == (0, whole.validation_prompts)
    assert given("--max_train_steps", "41", "--lr_warmup_steps", "7").lr_warmup_steps == 7
    for flags, file, line in (
        (
            ["--max_train_steps", "1", "--lr_warmup_steps", "7"],
            ready,
            "lr_warmup_steps: 7 is longer than the run",
        ),
        (
            ["--seed", "1"],
            {**ready, "lr_warmup_steps": 10_000},
            "lr_warmup_steps: 10000 is longer than the run",
        ),
    ):
        with pytest.raises(UserError, match=line):
            given(*flags, file=file)


@pytest.mark.parametrize(
    "path",
    sorted(p for p in CONFIGS.rglob("*.yaml") if "method" in read_yaml(p)),
    ids=lambda p: f"{p.parent.name}/{p.stem}",
)
def test_every_ready_configuration_may_be_cut_to_four_steps(path: Path) -> None:
    ready = read_yaml(path)
    if not is_search(ready):
        assert (
            load_config(fitted(with_overrides(ready, ["--max_train_steps", "4"]), ready)).max_train_steps == 4
        )


def test_a_run_of_before_a_key_was_added_is_taken_up_as_it_was() -> None:
    """rcm weights rows by default; a folder that does not know the key was trained without."""
    tree = {**TREE, "method": {"name": "rcm"}}
    today = load_config(tree)
    assert with_defaults(tree, today)["method"]["output_weight"] is False
    assert today.method["output_weight"] is True
    given = {**tree, "method": {"name": "rcm", "output_weight": True}}
    assert with_defaults(given, today)["method"]["output_weight"] is True
