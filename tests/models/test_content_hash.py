"""What caches are keyed by: the content of networks and tokenizers, not the place where they lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.models.frozen import content_hash
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training.batches import Batches
from fewstep.distill.training.teacher_data import open_data
from torch import nn
from transformers import CLIPTextModel


def loaded(folder: Path) -> LatentTeacher:
    teacher = Teacher.load(TeacherSettings(path=str(folder)))
    assert isinstance(teacher, LatentTeacher)
    return teacher


def test_a_copy_elsewhere_is_the_same_and_every_change_is_another(
    tiny_pipeline: Path, tmp_path: Path
) -> None:
    first = loaded(tiny_pipeline)
    texts, vae = first.texts_hash(), content_hash(first.vae)
    first.encode_prompts(["red cat"])
    first.encode_empty()
    assert first.texts_hash() == texts  # a tokenizer keeps how it was called last
    copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))
    assert (loaded(copy).texts_hash(), content_hash(loaded(copy).vae)) == (texts, vae)

    pipe: Any = DiffusionPipeline.from_pretrained(copy, safety_checker=None)
    pipe.text_encoder.get_input_embeddings().weight.data[0, 0] += 1
    pipe.text_encoder.save_pretrained(copy / "text_encoder")
    assert loaded(copy).texts_hash() != texts and content_hash(loaded(copy).vae) == vae
    for name, keys in (("text_encoder", {"hidden_act": "relu"}), ("vae", {"act_fn": "mish"})):
        other = Path(shutil.copytree(tiny_pipeline, tmp_path / name))
        config = other / name / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | keys))
        assert (loaded(other).texts_hash() == texts) == (name == "vae")
        assert (content_hash(loaded(other).vae) == vae) == (name != "vae")
    other = Path(shutil.copytree(tiny_pipeline, tmp_path / "tokenizer"))
    vocabulary = other / "tokenizer" / "tokenizer.json"
    text = vocabulary.read_text()
    assert '"cat</w>"' in text and '"dog</w>"' in text
    swapped = text.replace('"cat</w>"', '"?"').replace('"dog</w>"', '"cat</w>"').replace('"?"', '"dog</w>"')
    vocabulary.write_text(swapped)
    assert loaded(other).texts_hash() != texts


def test_names_types_and_shapes_count() -> None:
    networks = [nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 3, bias=False).half()]
    networks += [nn.Embedding(3, 2), nn.Linear(2, 3, bias=False).double()]
    for network in networks:
        network.weight.data.copy_(torch.zeros_like(network.weight))
    hashes = {content_hash(network) for network in networks}
    networks[-1].weight.data[0, 0] = 1e-60  # nothing in float32
    assert len(hashes | {content_hash(networks[-1]), content_hash(), content_hash(None)}) == 8


@pytest.mark.parametrize("kind", ["pictures", "teacher"])
def test_a_teacher_that_moved_encodes_nothing_anew(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "prompts.txt").write_text("red cat\ndog\n")
    made: dict[str, Any] = {"name": "teacher", "prompts": str(tmp_path / "prompts.txt")}
    tree: dict[str, Any] = {
        "output_dir": str(tmp_path / "run"),
        "teacher": {"path": "any"},
        "data": {"name": "emoji-noto", "split": "score"}
        if kind == "pictures"
        else {**made, "num_inference_steps": 1},
        "method": {"name": "lcd"},
    }
    config = load_config(tree)

    def files_with(folder: Path) -> set[str]:
        teacher = loaded(folder)
        data = open_data(config.data, teacher, 16)
        Batches(config, frozenset(("latents", "prompts")), data, teacher, teacher, Accelerator(cpu=True))
        return {p.name for p in (tmp_path / "cache").glob("*.rows")}

    before = files_with(tiny_pipeline)
    assert len(before) == 2
    copy = Path(shutil.copytree(tiny_pipeline, tmp_path / "copy"))
    assert files_with(copy) == before
    encoder = CLIPTextModel.from_pretrained(copy / "text_encoder")
    encoder.get_input_embeddings().weight.data[0, 0] += 1
    encoder.save_pretrained(copy / "text_encoder")
    assert len(files_with(copy)) == (
        3 if kind == "pictures" else 4
    )  # the teacher's latents hang on its prompts
