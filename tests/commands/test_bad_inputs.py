"""The table of bad inputs, over every verb: each is one line with key or file, value and remedy, exit code 2, and
leaves nothing behind. The rows of settings are made from the settings' own types and limits."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from annotated_types import Ge, Gt
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.cli import VERBS, main
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.search import SearchConfig
from fewstep.distill.config.third_party import quiet

RUN: dict[str, Any] = {
    "output_dir": "run",
    "teacher": {"path": "emoji-sd"},
    "vae": {"path": "vae"},
    "data": {"name": "emoji"},
}
SEARCH: dict[str, Any] = {
    "output_dir": "run",
    "student": {"path": "emoji-sd"},
    "data": {"name": "emoji"},
    "steps": 1,
    "method": {"name": "q_sched"},
}
PIXELS = {
    "data": {"name": "fashion-mnist"},
    "method": {"name": "edm"},
    "student": {"network": {}},
    "resolution": 32,
}
NEEDED = {  # keys without a default, and sections that are null by default
    "nct": {"control": {"name": "canny"}},
    "controlnet": {"control": {"name": "canny"}},
    "rg_lcd": {"lrm": {}, "uncertainty": {}},
}


@dataclasses.dataclass(frozen=True)
class Row:
    """arguments of `fewstep`, and what its line must say."""

    arguments: tuple[str, ...]
    said: tuple[str, ...]


def options(kind: Any) -> list[Any]:
    if get_origin(kind) is Annotated:
        return options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [o for part in get_args(kind) for o in options(part)]
    return [kind]


def wrong_values(kind: Any, limits: list[Any]) -> Iterator[str]:
    """Values that no key of this type and these limits takes, as they are written."""
    kinds = options(kind)
    if int in kinds or float in kinds:
        yield from ("x", "[1]", "true", ".inf", "-.inf", ".nan", "1e999")
        lowest = [m.ge if isinstance(m, Ge) else m.gt for m in limits if isinstance(m, Ge | Gt)]
        if float not in kinds:
            yield from ("1.5", "1e30", "-1e30")
        if lowest and lowest[0] > -1:
            yield "-1"
        if lowest and (lowest[0] > 0 or any(isinstance(m, Gt) and m.gt == 0 for m in limits)):
            yield "0"
    elif bool in kinds:
        yield from ("7", "maybe", "[true]")
    elif any(get_origin(k) is tuple for k in kinds):
        yield from ("5", "{a: 1}")
    elif any(get_origin(k) is Literal for k in kinds):
        yield from ("wrong_value", "5", "[]")
    elif any(get_origin(k) is dict or dataclasses.is_dataclass(k) for k in kinds):
        yield from ("5", "[1]")
    elif str in kinds and type(None) not in kinds:
        yield "null"


def rows_of(command: tuple[str, ...], cls: type, prefix: str = "") -> Iterator[tuple[str, list[Row]]]:
    """The rows of each key below a class of settings."""
    for name, info in cls.__pydantic_fields__.items():  # type: ignore[attr-defined]
        key = prefix + name
        if key == "method":
            continue
        values = list(wrong_values(info.annotation, info.metadata))
        rows = [Row((*command, f"--{key}={v}"), (key, v)) for v in values]
        typo = f"{key}zz"
        rows.append(Row((*command, f"--{typo}=1"), (typo, "no such key", name)))
        yield key, rows
        sections = [k for k in options(info.annotation) if dataclasses.is_dataclass(k)]
        if len(sections) == 1:
            yield from rows_of(command, sections[0], f"{key}.")


def settings_rows() -> dict[str, list[Row]]:
    out = dict(rows_of(("distill", "lcd.yaml"), RunConfig))
    out |= {f"search {k}": rows for k, rows in rows_of(("distill", "q_sched.yaml"), SearchConfig)}
    for name, method in {**METHODS, **SEARCHES}.items():
        found = rows_of(("distill", f"{name}.yaml"), method.settings, "method.")
        out |= {f"{name} {k}": rows for k, rows in found}
    stage = rows_of(("train-teacher", "teacher.yaml"), RunConfig, "stages.pixels.")
    out |= {k: rows for k, rows in stage if "output_dir" not in k}
    for verb in ("turbo emoji-sd --prompts p.txt", "demo"):
        keys = ("seed", "learning_rate", "student.rank", "mixed_precision", "data.center_crop")
        found = rows_of(tuple(verb.split()), RunConfig)
        out |= {f"{verb.split()[0]} {k}": rows for k, rows in found if k in keys}
    return out


SETTINGS = settings_rows()

WHOLE = {
    "evaluate emoji-sd --steps 1": ("num_images", "seeds", "batch_size", "steps"),
    "compare emoji-sd --output out": ("num_images", "seeds", "steps", "teacher_steps", "batch_size"),
    "sample emoji-sd --output out --steps 1": ("num_images", "steps", "batch_size"),
    "demo": ("num_images", "seeds"),
    "verify-metrics": ("batch_size",),
}
FLAGS = [
    Row((*command.split(), f"--{flag}", value), (f"--{flag}", value))
    for command, flags in WHOLE.items()
    for flag in flags
    for value in ("0", "-1", "1.5", "x", "1e30", "99999999999", "nan")
] + [
    Row((*command.split(), "--guidance_scale", value), ("--guidance_scale", value))
    for command in list(WHOLE)[:3]
    for value in ("nan", "inf", "-1", "x")
]


def row(command: str, *said: str) -> Row:
    return Row(tuple(command.split()), said)


CONFIGURED = ("distill", "train-teacher")
OWN_FILES = [
    row(f"{verb} {name}", name, said)
    for verb in ("distill", "train-teacher", "demo --config")
    for name, said in {
        "none.yaml": "no configuration",
        "empty": "it is a folder",
        "empty.txt": "holds no `key: value` lines",
        "bytes": "is not UTF-8 text",
        "list.yaml": "holds no `key: value` lines",
        "twice.yaml": "'seed' is given twice",
        "deep.yaml": "nested too deeply",
        "self.yaml": "nested too deeply, or in itself",
        "bomb.yaml": "stands for more than",
    }.items()
]
COMMANDS = [
    row("distil", "'distil'", "nearest is distill"),
    row("zzz", "'zzz'", "there are turbo, distill"),
    *(row(f"{verb} --zzz", "which configuration" if verb in CONFIGURED else "") for verb in VERBS),
    row("evaluate emoji-sd --steps 1 --zzz", "--zzz"),
    row("compare emoji-sd --output out --zzz", "--zzz"),
    row("sample emoji-sd --output out --steps 1 --zzz", "--zzz"),
    row("prepare-data inception --zzz", "--zzz"),
    row("push-to-hub run a/b --zzz", "--zzz"),
    row("turbo emoji-sd --prompts p.txt --zzz 1", "zzz: no such key"),
    row("demo --zzz 1", "zzz: no such key"),
    row("demo extra", "'extra'", "--key.sub value"),
    row("distill lcd.yaml extra", "'extra'", "--key.sub value"),
    row("distill teacher.yaml", "teacher.yaml", "use `fewstep train-teacher"),
    row("train-teacher lcd.yaml", "stages: missing"),
    row("train-teacher teacher.yaml --stages 5", "stages: 5"),
    row("train-teacher teacher.yaml --stages.pixels 5", "stages.pixels: 5"),
    row("train-teacher teacher.yaml --stages.pixel.seed 1", "stages.pixel: no such key", "pixels"),
    row("train-teacher teacher.yaml --stages.pixels.method.name zzz", "stages.pixels.method.name", "'zzz'"),
    row("train-teacher teacher.yaml --stages.pixels.output_dir x", "stages.pixels.output_dir"),
    row("train-teacher latents.yaml --network.layers_per_bloc 3", "network.layers_per_bloc", "layers_per_block"),
    row("train-teacher latents.yaml --scheduler.beta 3", "scheduler.beta", "beta_"),
    row("train-teacher latents.yaml --network 3", "network: 3"),
    row("distill lcd.yaml --method.name LCD", "method.name", "'LCD'", "nearest is lcd"),
    row("distill lcd.yaml --method.name zzz", "method.name", "'zzz'", "there are lcd, "),
    row("distill lcd.yaml --data.name", "--data.name", "missing"),
    row("distill lcd.yaml --teacher null", "teacher: missing"),
    row("distill lcd.yaml --teacher.path ./none", "teacher.path", "./none"),
    row("distill lcd.yaml --teacher.path empty", "teacher.path", "empty"),
    row("distill lcd.yaml --data.split trian --vae null", "trian", "train"),
    row("distill lcd.yaml --resume_from_checkpoint ./none", "resume_from_checkpoint", "none"),
    row("distill q_sched.yaml --max_train_steps 5", "max_train_steps", "is a search"),
    row("distill q_sched.yaml --student.path ./none --max_candidates 101", "student.path", "./none"),
    row("distill q_sched.yaml --report.split reward", "report.split", "reward"),
    *(row(f"evaluate {name} --steps 1", name) for name in ("./none", "empty", "empty.txt", "bytes")),
    row("evaluate emoji-sd", "steps"),
    Row(("evaluate", "", "--steps", "1"), ("''",)),
    Row(("evaluate", "emoji-sd", "--steps", "1", "--data", ""), ("--data", "''")),
    Row(("sample", "", "--steps", "1", "--output", "out"), ("''",)),
    Row(("compare", "", "--output", "out"), ("''",)),
    Row(("turbo", "", "--prompts", "p.txt"), ("''",)),
    Row(("push-to-hub", "empty", ""), ("''",)),
    Row(("distill", "nct.yaml", "--method.control", "{low: 5}"), ("method.control", "{'low': 5}", "has no name")),
    row("distill nct.yaml --method.control.name cany", "method.control.name", "'cany'", "nearest is canny"),
    row("evaluate emoji-sd --steps 1 --data ./none", "./none"),
    row("evaluate emoji-sd --steps 1 --split trian", "trian"),
    row("evaluate emoji-sd --steps 1 --holdout trian", "trian"),
    row("evaluate emoji-sd --steps 1 --extractor zzz", "extractor", "zzz"),
    row("evaluate emoji-sd --steps 1 --control zzz", "control", "zzz"),
    row("evaluate emoji-sd --steps 1 --protocol zzz", "protocol", "zzz"),
    row("evaluate emoji-sd --steps 1 --device zzz", "device", "zzz"),
    row("evaluate emoji-sd --steps 1 --output empty", "output", "empty"),
    row("evaluate emoji-sd --steps 1 --output empty.txt/r.json", "output", "empty.txt"),
    *(row(f"compare {name} --output out", name) for name in ("none.json", "bytes.json", "list.json", "empty.json")),
    row("compare emoji-sd emoji-sd --output out", "emoji-sd", "NAME=PATH"),
    row("compare emoji-sd --output empty.txt", "empty.txt"),
    row("compare emoji-sd --output out --data ./none", "./none"),
    *(row(f"sample {name} --steps 1 --output out", name) for name in ("./none", "empty", "empty.txt")),
    row("sample emoji-sd --steps 1 --output out --seed_block -1", "seed_block", "-1"),
    row("sample emoji-sd --steps 1 --output out --seed_block 1e30", "seed_block", "1e30"),
    *(row(f"sample emoji-sd --steps 1 --output out --prompts {name}", "prompts", name)
      for name in ("./none", "empty", "empty.txt", "blank.txt", "bytes")),
    row("sample emoji-sd --steps 1 --num_images 1 --output empty.txt", "empty.txt"),
    row("sample emoji-sd --steps 1 --num_images 1 --output empty.txt/x", "empty.txt/x"),
    row("sample emoji-sd --steps 1 --output out --device zzz", "device", "zzz"),
    *(row(f"push-to-hub {name} a/b", name) for name in ("none", "empty", "empty.txt")),
    row("push-to-hub empty a/b/c", "'a/b/c'", "OWNER/NAME"),
    row("demo --seed -1", "seed: -1"),
    row("demo --output_dir empty.txt", "output_dir", "empty.txt"),
    row("prepare-data zzz", "'zzz'", "available"),
    row("prepare-data cifar10-50k --statistics ./none", "none"),
    row("prepare-data inception --weights ./none", "none"),
    row("prepare-data inception --weights empty", "empty"),
    row("verify-metrics zzz", "'zzz'", "available"),
    row("verify-metrics --device zzz", "--device", "zzz"),
    *(row(f"turbo {name} --prompts p.txt", name) for name in ("./none", "empty", "empty.txt")),
    row("turbo emoji-sd", "prompts: missing"),
    *(row(f"turbo emoji-sd --prompts {name}", "prompts", name)
      for name in ("./none", "empty", "empty.txt", "blank.txt", "bytes")),
    row("turbo emoji-sd --prompts p.txt --method zzz", "method.name", "'zzz'"),
    row("turbo emoji-sd --prompts p.txt --method q_sched", "method.name", "q_sched is a search"),
    row("turbo emoji-sd --prompts p.txt --lora ./none", "lora", "./none"),
    row("turbo emoji-sd --prompts p.txt --push_to_hub a/b/c", "'a/b/c'", "OWNER/NAME"),
    row("turbo emoji-sd --prompts p.txt --output_dir empty.txt", "output_dir", "empty.txt"),
    row("turbo fashion-edm --prompts p.txt", "fashion-edm", "turbo takes"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working folder, with good configurations and bad files."""
    here = tmp_path_factory.mktemp("here")
    trees: dict[str, Any] = {
        name: {**RUN, "method": {"name": name, **NEEDED.get(name, {})}} for name in METHODS
    }
    trees |= {name: {**SEARCH, "method": {"name": name}} for name in SEARCHES}
    trees["teacher"] = {"output_dir": "run", "stages": {"pixels": PIXELS}}
    stage = {"data": {"name": "emoji"}, "resolution": 32}
    names = ("autoencoder", "text_encoder", "diffusion")
    stages = {name: {**stage, "method": {"name": name}} for name in names}
    trees["latents"] = {"output_dir": "run", "stages": stages, "network": {}, "scheduler": {}}
    for name, tree in trees.items():
        (here / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    doubling = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(8))
    texts = {
        "empty.txt": "", "blank.txt": "\n \n", "p.txt": "red cat\n", "list.yaml": "- 1", "deep.yaml": "[" * 500,
        "twice.yaml": "seed: 1\nseed: 2\n", "self.yaml": "a: &a [*a]", "bomb.yaml": f"a0: &a0 [x]\n{doubling}",
        "list.json": "[1]", "empty.json": "",
    }  # fmt: skip
    for name, text in texts.items():
        (here / name).write_text(text)
    for name in ("bytes", "bytes.json"):
        (here / name).write_bytes(bytes(range(256)))
    (here / "empty").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        quiet()
        yield here


def check(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    code = main(list(row.arguments))
    written = capsys.readouterr()
    lines = written.err.splitlines()
    assert code == 2, (row, written)
    assert len(lines) == 1 and lines[0].startswith("fewstep: error: ") and len(lines[0]) < 400, (row, lines)
    line = lines[0].removeprefix("fewstep: error: ")
    for text in row.said:
        read = (
            ""
            if text[-1:] in ":'"
            else str(yaml.safe_load(text) if re.fullmatch(r"[\w.{}\[\]: -]+", text) else text)
        )
        assert text in line or read in line, (row, line)
    assert re.search(r"; |: (choose|give|mend|save) |usage: |should be ", line), (row, line)  # a remedy
    assert sorted(folder.rglob("*")) == before, row


@pytest.mark.parametrize("key", SETTINGS)
def test_values_of_a_key(key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for row in SETTINGS[key]:
        check(row, folder, capsys)


@pytest.mark.parametrize("row", [*FLAGS, *OWN_FILES, *COMMANDS], ids=lambda row: " ".join(row.arguments))
def test_flags_files_and_commands(row: Row, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(row, folder, capsys)


def test_the_table_covers_every_verb() -> None:
    rows = [*FLAGS, *OWN_FILES, *COMMANDS, *(row for rows in SETTINGS.values() for row in rows)]
    assert len(rows) >= 1000 and len(set(rows)) == len(rows)
    assert {row.arguments[0] for row in rows} >= set(VERBS)
