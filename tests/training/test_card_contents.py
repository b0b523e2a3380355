"""What lies in an exported folder beside the weights: a card that the hub reads, pictures, settings without places."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.catalog.methods import METHODS, SEARCHES, origins
from fewstep.distill.cli import main
from fewstep.distill.training.card_head import datasets_of
from fewstep.distill.training.model_card import Made, adapter_card, title, with_scores
from fewstep.distill.training.public_names import public_settings
from fewstep.pipelines.export import Export, write_adapter
from huggingface_hub import ModelCard
from PIL import Image

from .test_model_card import built, config_of

FEW = {str(n): {"num_inference_steps": n} for n in (1, 2, 4)}


@pytest.mark.parametrize(
    ("method", "teacher", "sampling", "expected"),
    [
        ("lcd", "owner/model", FEW, "# mine in 1 to 4 steps (LCM of owner/model)"),
        ("ict", None, {"1": {}, "2": {}}, "# mine in 1 to 2 steps (iCT on cifar10)"),
        ("dmd2", "/home/me/model", {"1": {}}, "# mine in 1 step (DMD2 of model)"),
        ("edm", None, {"default": {}}, "# mine (EDM on cifar10)"),
        ("ict", None, {"1": {}, "method": {"curriculum": "continuous"}}, "# mine in 1 step (ECT on cifar10)"),
    ],
)
def test_titles(method: str, teacher: str | None, sampling: dict[str, Any], expected: str) -> None:
    own = sampling.get("method", {})
    tree = {"output_dir": "runs/mine", "data": {"name": "cifar10"}, "method": {"name": method, **own}}
    if teacher is not None:
        tree["teacher"] = {"path": teacher}
    if method == "ict":
        tree["student"] = {"init": "scratch", "network": {"sample_size": 32}}
    config = load_config(tree)
    assert title(config, Export(None, sampling=sampling)) == expected + "\n"
    assert datasets_of(config.data) == ["uoft-cs/cifar10"]


def test_every_published_method_is_named_and_cited() -> None:
    for name, origin in origins().items():
        for paper in origin.all_papers():
            text = paper.bibtex()
            assert f"eprint = {{{paper.arxiv}}}" in text and text.count("{") == text.count("}"), name
    assert origins().keys() == (METHODS | SEARCHES).keys() - {"text_encoder"}


def test_settings_name_no_place(tmp_path: Path) -> None:
    """Prompts and hub files stay as they are; folders and files of this machine become names."""
    folder = tmp_path / "secret" / "faces"
    folder.mkdir(parents=True)
    tree = {
        "output_dir": str(tmp_path / "secret" / "run"),
        "teacher": {"path": "owner/model", "lora": "owner/style/style.safetensors"},
        "data": {"name": "teacher", "prompts": str(tmp_path / "secret" / "lines.txt")},
        "method": {"name": "lcd"},
        "resume_from_checkpoint": str(tmp_path / "secret" / "other" / "checkpoint-4"),
        "validation_prompts": ["either/or, in oil", "~ a wave"],
    }
    for data, shown in ((tree["data"], "teacher"), ({"name": str(folder)}, "faces")):
        text = public_settings(load_config({**tree, "data": data}))
        assert "secret" not in text and str(tmp_path) not in text
        found = yaml.safe_load(text)
        assert (found["output_dir"], found["data"]["name"]) == ("run", shown)
        assert found["teacher"]["lora"] == "owner/style/style.safetensors"
        assert found["resume_from_checkpoint"] == "checkpoint-4"
        assert found["validation_prompts"] == tree["validation_prompts"]


def test_what_a_run_exports(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA and its fused pipeline, of a teacher and pictures in folders that nobody else shall know."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    data = tmp_path / "secret" / "faces"
    data.mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"cat {i}")
    lines = "".join(f'{{"file_name": "{i}.png", "text": "cat {i}"}}\n' for i in range(4))
    (data / "metadata.jsonl").write_text(lines)
    tree = {
        "output_dir": str(tmp_path / "secret" / "mine"),
        "teacher": {"path": str(tiny_pipeline)},
        "data": {"name": str(data)},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2},
        "student": {"kind": "lora", "rank": 2, "lora_alpha": 2},
        "train_batch_size": 2,
        "max_train_steps": 2,
        "validation_steps": 1,
        "validation_prompts": ['a `red` "cat"', "dog", "cat dog"],
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert main(["distill", str(tmp_path / "run.yaml")]) == 0
    run = tmp_path / "secret" / "mine"
    for name, prefix in (("lora", "a LoRA, "), ("pipeline", "")):
        folder = run / name
        for path in folder.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                assert b"secret" not in content and str(tiny_pipeline.parent).encode() not in content, path
        assert (folder / "samples.png").read_bytes() == (run / "samples" / "step-000002.png").read_bytes()
        assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["name"] == "faces"
        card = (folder / "README.md").read_text()
        assert f"# mine in 1 to 8 steps ({prefix}LCM of {tiny_pipeline.name})\n" in card
        assert "](samples.png)" in card and "Columns: `a 'red' \"cat\"`, `dog`, `cat dog`." in card
        assert 'image = pipe("a `red` \\"cat\\"", ' in card
        assert "| pictures seen | 4 |" in card and "| device | 1 x " in card and "| seed | 0 |" in card
        assert "| made with | fewstep " in card and "eprint = {2310.04378}" in card
        entries = ModelCard(card).data.to_dict()
        assert entries["pipeline_tag"] == "text-to-image" and ("lora" in entries["tags"]) == (name == "lora")
    assert sorted(p.name for p in (run / "samples").iterdir()) == ["step-000001.png", "step-000002.png"]


def test_a_lora_of_a_folder_in_half_precision(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card's lines run where the reader keeps the teacher's folder, whose weights have a variant."""
    teacher = tmp_path / "elsewhere" / "fine-tune"
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).save_pretrained(teacher, variant="fp16")
    export = built(str(tiny_pipeline), export_fused=False).export()
    tree = {**yaml.safe_load(public_settings(config_of("emoji-sd"))), "output_dir": "mine"}
    tree["teacher"] = {"path": str(teacher), "variant": "fp16"}
    card = adapter_card(load_config(tree), export, Made(1, prompts=["dog"]))
    reader = tmp_path / "reader"
    (reader / "lora").mkdir(parents=True)
    write_adapter(export, reader / "lora", card)
    teacher.rename(reader / "fine-tune")
    monkeypatch.chdir(reader)
    names: dict[str, Any] = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    assert names["image"].size == (16, 16)


def test_scores_become_a_model_index(tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "pipeline"
    folder.mkdir(parents=True)
    (folder / "README.md").write_text(
        "---\nlicense: mit\npipeline_tag: text-to-image\n---\n\n# mine\n\ntext\n"
    )
    for value in (0.5, 0.25):
        score = {
            "name": "KID", "value": value, "protocol_id": "abc",
            "protocol": {"reference": "cifar10/test, 10,000 pictures", "n_gen": 100},
        }  # fmt: skip
        with_scores(folder, f"| {value} |\n", [{"steps": 2, "seeds": 3, "scores": [score]}])
    card = ModelCard.load(folder / "README.md")
    (result,) = card.data.eval_results
    assert (card.data.model_name, card.data.license) == ("mine", "mit")
    assert (result.metric_value, result.metric_name, result.metric_type) == (0.25, "KID, 2 steps", "kid")
    assert (result.dataset_type, result.dataset_split) == ("uoft-cs/cifar10", "test")
    assert result.metric_args == {"pictures": 100, "seeds": 3, "protocol": "abc"}
    assert card.text.strip() == "# mine\n\ntext\n\n## Scores\n\n| 0.25 |"
