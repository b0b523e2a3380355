"""What help says: keys with type, default and meaning, flags with defaults, methods with papers; without torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.cli import VERBS, main
from fewstep.distill.config.keys import keys_of
from fewstep.distill.config.run import RunConfig
from fewstep.distill.config.search import SearchConfig
from fewstep.distill.settings import MethodSettings
from fewstep.distill.training.run_folder import RunFolder

CONFIGS = Path(__file__).parents[2] / "configs"
GROUPS = ["run", "data", "teacher", "student", "optimiser", "memory", "logging", "method"]
HEAVY = {
    "torch",
    "numpy",
    "diffusers",
    "transformers",
    "accelerate",
    "scipy",
    "torchvision",
    "timm",
    "datasets",
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def entries(text: str) -> dict[str, str]:
    """What stands beside each flag, by its name."""
    parts = re.split(r"^  (?:-\w, )?--(\S+)", text, flags=re.MULTILINE)
    return {name: " ".join(body.split()) for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def test_the_help_of_distill_has_every_key_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "distill", "--help")
    assert re.findall(r"^(\w+):$", text, flags=re.MULTILINE)[1:] == GROUPS
    found = entries(text)
    for key in keys_of(RunConfig):
        if key.type != "section":
            default = "required" if key.default == "required" else f"default: {key.default}"
            assert found[key.name].startswith(f"{key.type} {key.meaning} ({default})"), key
    assert (
        found["learning_rate"] == "float > 0, <= 100 highest learning rate of the student (default: 0.0001)"
    )
    assert set(METHODS) <= set(re.split(r"[ ,]+", found["method.name"]))
    optimiser = text.partition("\noptimiser:\n")[2].partition("\n\n")[0]
    assert "--learning_rate" in optimiser and "--seed" not in optimiser


@pytest.mark.parametrize("name", ["rcm", "nct_canny", "q_sched_lcd"])
def test_with_a_configuration_help_has_its_methods_keys_and_its_values(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = CONFIGS / "emoji" / f"{name}.yaml"
    tree = yaml.safe_load(path.read_text())
    found = entries(printed(capsys, "distill", str(path), "--help"))
    entry = (METHODS | SEARCHES)[tree["method"]["name"]]
    for key in keys_of(entry.settings, "method."):
        if key.type != "section":
            assert found[key.name].startswith(key.type) and f"{key.meaning} (" in found[key.name], key
    assert found["output_dir"].endswith(f"(required; here: {tree['output_dir']})")
    expected = set(vars(SearchConfig if entry in SEARCHES.values() else RunConfig)["__pydantic_fields__"])
    assert {name.split(".")[0] for name in found} == expected | {"help", "dry_run"}


def test_help_shows_the_values_of_flags(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--seed", "7", "--method.name", "ict", "--dry_run"]
    found = entries(printed(capsys, "distill", *flags, "--help"))
    assert found["seed"].endswith("(default: 0; here: 7)") and "method.huber_c" in found
    assert main(["distill", "--method.name", "itc", "--help"]) == 2
    assert "the nearest is ict" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_of_every_verb_has_a_meaning(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = entries(printed(capsys, verb, "--help"))
    for flag, text in found.items():
        assert len(text.split()) >= 3, (flag, text)
        assert "SUPPRESS" not in text and "None" not in text


@pytest.mark.parametrize(
    ("verb", "flag", "default"),
    [("evaluate", "num_images", "500"), ("compare", "teacher_steps", "1 2 4 8 50"), ("demo", "output_dir", "runs/demo"),
     ("sample", "seed_block", "1000"), ("verify-metrics", "device", "cpu")],
)  # fmt: skip
def test_defaults_are_shown(verb: str, flag: str, default: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"(default: {default})" in entries(printed(capsys, verb, "--help"))[flag]


def test_methods_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "methods").splitlines()
    rows = {line.split()[0]: line for line in lines[1 : 1 + len(METHODS | SEARCHES)]}
    assert list(rows) == [*METHODS, *SEARCHES]
    for name, entry in (METHODS | SEARCHES).items():
        kind: type[MethodSettings] = entry.settings
        paper = f"{kind.origin.paper.name}, arXiv {kind.origin.paper.arxiv}" if kind.origin else " none "
        assert paper in rows[name] and rows[name].endswith(kind.idea)
    assert " teacher  " in rows["lcd"] and " teacher or data  " in rows["ict"] and " data  " in rows["lct"]
    assert main(["methods", "lcd"]) == 2


LIGHT = """
import contextlib, io, sys
from fewstep.distill.cli import main
heavy = set(sys.argv[1].split())
for line in sys.argv[2:]:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = main(line.split())
    loaded = sorted(heavy & set(sys.modules))
    print(code, loaded, " ".join(out.getvalue().split())[-120:])
"""


def test_answers_that_need_no_computation_import_no_library_of_it(tmp_path: Path) -> None:
    """Help, lists, mistakes and a finished run; every one in the same process, from nothing."""
    tree = yaml.safe_load((CONFIGS / "emoji" / "lcd.yaml").read_text())
    config = load_config({**tree, "output_dir": str(tmp_path / "run")})
    folder = RunFolder(config)
    folder.write_config()
    (tmp_path / "run" / "pipeline").mkdir()
    (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
    folder.record_export(config.max_train_steps, ["pipeline"], {})
    path = CONFIGS / "emoji" / "lcd.yaml"
    commands = {
        "--help": 0,
        "--version": 0,
        "methods": 0,
        "distil": 2,
        "distill --help": 0,
        f"distill {path} --help": 0,
        f"distill {path} --typo 1": 2,
        f"distill {path} --method.name ldc": 2,
        f"distill {CONFIGS}/emoji/lcsc.yaml --typo 1": 2,
        f"distill {path} --output_dir {tmp_path}/run": 0,
        f"distill {path} --output_dir {tmp_path}/run --seed 5": 2,
        "train-teacher --help": 0,
        "evaluate --help": 0,
        "evaluate emoji-sd --step 1": 2,
        "evaluate emoji-sd --num_images many": 2,
        "turbo --help": 0,
        "push-to-hub --help": 0,
    }
    arguments = [sys.executable, "-c", LIGHT, " ".join(HEAVY), *commands]
    lines = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == len(commands)
    for line, (command, code) in zip(lines, commands.items(), strict=True):
        assert line.startswith(f"{code} [] "), (command, line)
    assert lines[list(commands).index(f"distill {path} --output_dir {tmp_path}/run")].endswith(
        "is finished: " + f"{config.max_train_steps} steps, exported; nothing was changed"
    )
