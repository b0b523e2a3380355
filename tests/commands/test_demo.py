"""The demo's path on a tiny teacher: train, score both, draw."""

import json
from typing import Any

import pytest
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.commands import demo
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.models import teacher
from PIL import Image


@pytest.fixture
def embedded(tiny_pipeline, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "tiny"
    shutil.copytree(tiny_pipeline, folder)
    (folder / "sampling.json").write_text(json.dumps({"default": {"guidance_scale": 3.0}}))
    monkeypatch.setitem(teacher.EMBEDDED, "emoji-sd", folder)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))


def test_the_demo_says_five_minutes_for_what_it_trains_and_less_for_what_is_left() -> None:
    config = load_config(read_yaml(demo.CONFIGS / "emoji" / "demo.yaml"))
    rows = demo.rows_to_score(None)
    whole, scores = demo.expected(config, 100, rows), demo.expected(None, 100, rows)
    assert 60 < scores < whole < 300
    assert whole - scores == pytest.approx(config.max_train_steps * config.train_batch_size * 1.34 / 48)


def test_demo_scores_and_draws_both_and_resumes(embedded, tmp_path, capsys):
    output = tmp_path / "demo"
    flags = ["--max_train_steps", "2", "--train_batch_size", "2", "--checkpointing_steps", "1"]
    table = demo.run_demo(output, flags, num_images=4, seeds=2)
    rows = [
        line.split("|")[1:3] for line in table.splitlines() if line.startswith(("| teacher", "| student"))
    ]
    assert [(m.strip(), int(n)) for m, n in rows] == [
        ("teacher", 50), ("teacher", 4), ("teacher", 2), ("teacher", 1),
        ("student", 1), ("student", 2), ("student", 4),
    ]  # fmt: skip
    assert (output / "comparison.md").read_text() == table
    card = (output / "student" / "pipeline" / "README.md").read_text()
    assert card.count("## Scores") == 1
    scores = card.split("## Scores")[1]
    assert "| student | 2 |" in scores and "| teacher |" not in scores
    picture = Image.open(output / "pictures.png")
    assert picture.height == 6 * 2 * 16 and picture.width > len(demo.CAPTIONS) * 2 * 16
    assert (output / "student" / "pipeline" / "model_index.json").is_file()
    said = capsys.readouterr().out
    assert said.startswith("about ") and "min on two slow cores" in said.splitlines()[0]
    end = said[said.rindex("| model |") :]
    assert f"pictures:   {output / 'pictures.png'}\n" in end
    names: dict[str, Any] = {}
    exec(end[end.index("import torch") :], names)
    assert names["image"].size == (16, 16)

    before = (output / "student" / "log.jsonl").read_bytes()
    demo.run_demo(output, flags, num_images=4, seeds=2)
    assert "distilling" not in capsys.readouterr().out
    assert (output / "student" / "log.jsonl").read_bytes() == before
