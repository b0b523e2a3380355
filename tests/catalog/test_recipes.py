"""Ready configurations by name."""

from pathlib import Path

import pytest
from fewstep.distill.catalog.methods import METHODS, SEARCHES
from fewstep.distill.catalog.recipes import CONFIGS, Recipe, find, names, recipes
from fewstep.distill.cli import main
from fewstep.distill.config.tree import merged
from fewstep.distill.errors import UserError

OURS = {"emoji/style_lora", "emoji/teacher", "fashion/teacher"}  # after no paper


def test_every_file_has_a_name_that_finds_it() -> None:
    files = [path for path in CONFIGS.rglob("*.yaml") if "results" not in path.parts]
    assert {find(name) for name in names()} == set(files) and len(files) == len(names()) > 50


def test_a_path_goes_before_a_name_and_a_folder_is_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "lcd").mkdir()
    assert find("emoji/lcd") == CONFIGS / "emoji" / "lcd.yaml"
    (tmp_path / "emoji" / "rcm").write_text("method: {name: lcd}")
    assert find("emoji/rcm") == Path("emoji/rcm")
    with pytest.raises(UserError, match="no configuration emoji: it is a folder; "):
        find("emoji")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("emoji/lcdd", "emoji/lcd"),
        ("emoji/LCD-lora", "emoji/lcd_lora"),
        ("configs/emoji/rcm.yaml", "emoji/rcm"),
        ("lcd_lora", "emoji/lcd_lora"),
    ],
)
def test_a_mistyped_name_is_told_the_nearest(
    name: str, near: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said = f"no configuration {name}: it is neither a file nor a recipe; the nearest recipe is {near}, "
    for command in (
        ["distill", name],
        ["train-teacher", name],
        ["demo", "--config", name],
        ["recipes", "show", name],
    ):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"fewstep: error: {said}") and line.count("\n") == 1
    with pytest.raises(UserError, match="nor a recipe; `fewstep recipes` lists all"):
        find("zzzzzz")
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_says_what_trains_on_what_after_which_paper() -> None:
    known = {r.name: r for r in recipes()}
    assert known["emoji/lcd"] == Recipe(
        "emoji/lcd", "lcd", "emoji-sd", "emoji", "2310.04378", CONFIGS / "emoji" / "lcd.yaml"
    )
    assert known["sd15/nct_image"].paper == known["emoji/nct_image"].paper == "2506.19741"
    assert (known["cifar10/ict"].teacher, known["cifar10/ict"].data) == (None, "cifar10")
    assert known["emoji/q_sched_lcd"].teacher == "runs/emoji/lcd"
    assert (known["emoji/teacher"].method, known["emoji/teacher"].data) == ("train-teacher", "emoji")
    assert {r.method for r in known.values()} <= {*METHODS, *SEARCHES, "train-teacher"}
    assert {name for name, r in known.items() if r.paper is None} == OURS
    assert set(names()) - set(known) == {"emoji/scorers"}  # a script's


def test_the_command_prints_a_line_for_each_and_the_text_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["recipe", "method", "teacher", "data", "paper"]
    assert [line.split()[0] for line in lines] == [r.name for r in recipes()]
    (row,) = (line for line in lines if line.startswith("sd15/lcd_lora "))
    assert row.split() == ["sd15/lcd_lora", "lcd", "stable-diffusion-v1-5", "shards/cc12m", "2311.05556"]
    assert max(map(len, lines)) <= 115
    assert main(["recipes", "show", "emoji/lcd"]) == 0
    assert capsys.readouterr().out == (CONFIGS / "emoji" / "lcd.yaml").read_text()


def test_a_recipe_is_run_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["distill", "emoji/lcd", "--dry_run", "--max_train_steps", "7"]) == 0
    by_name = capsys.readouterr().out
    assert main(["distill", str(CONFIGS / "emoji" / "lcd.yaml"), "--dry_run", "--max_train_steps", "7"]) == 0
    assert by_name == capsys.readouterr().out and "emoji-sd" in by_name
    assert main(["distill", "emoji/teacher"]) == 2
    assert "use `fewstep train-teacher emoji/teacher`" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_values_change_the_keys_of_a_section_alone() -> None:
    tree = {"seed": 1, "method": {"name": "lcd", "w_max": 3.0}, "teacher": None}
    values = {"method": {"w_max": 4.0}, "teacher": {"path": "a"}, "data": {"name": "emoji"}}
    assert merged(tree, values) == {
        "seed": 1, "method": {"name": "lcd", "w_max": 4.0}, "teacher": {"path": "a"}, "data": {"name": "emoji"},
    }  # fmt: skip
    assert tree == {"seed": 1, "method": {"name": "lcd", "w_max": 3.0}, "teacher": None}
    assert merged(tree, {"method": "rcm"})["method"] == "rcm"
