"""The pixel teacher: EDM's loss beside its own formula, and train-teacher from IDX files to a pipeline with a card."""

import gzip
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from fewstep.distill.commands import train_teacher as trainer
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.models.teacher import PixelTeacher, Teacher
from fewstep.distill.pretrain.card import write_own_card, write_pixel_card
from fewstep.distill.pretrain.edm import EDMTraining
from fewstep.distill.pretrain.settings import EDMSettings
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from fewstep.distill.training.run_lock import locked
from safetensors.torch import load_file

NETWORK: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "norm_num_groups": 2,
    "num_class_embeds": 10,
}
CLASSES = tuple(str(i) for i in range(10))


def build(**settings: Any) -> EDMTraining:
    student = StudentSettings(init="scratch", network=NETWORK)
    return EDMTraining(EDMSettings(**settings), Parts(None, student, [], CLASSES, 32))


def batch_of(method: EDMTraining, count: int) -> Batch:
    images = torch.rand(count, 1, 32, 32).expand(-1, 3, -1, -1) * 2 - 1
    condition = method.space.condition([CLASSES[i % 10] for i in range(count)])
    return Batch(Draws(0, 0, range(count)), images=images, condition=condition)


def loss_of(method: EDMTraining, batch: Batch) -> float:
    return method("student", batch, Progress(0, 1, {}), {})["loss"].item()


def test_the_loss_is_the_error_of_the_raw_output_at_its_own_target() -> None:
    """EDM, eq. 8: with that weight the loss is the mean square of F minus (x0 - c_skip x) / c_out."""
    method = build(p_mean=-0.7, p_std=0.9)
    count = 5
    batch, draws = batch_of(method, count), Draws(0, 0, range(count))
    assert batch.images is not None and batch.condition is not None
    loss = loss_of(method, batch)
    x0 = batch.images[:, :1].double()
    sigma = torch.exp(-0.7 + 0.9 * draws.normal(()).double()).view(-1, 1, 1, 1)
    x = x0 + sigma * draws.normal((1, 32, 32))
    norm = (sigma**2 + 0.25).sqrt()
    with torch.no_grad():
        raw = method.student.network(
            (x / norm).float(), 250 * sigma.flatten().log().float(), **batch.condition.arguments
        ).sample
    wanted = (x0 - 0.25 / norm**2 * x) / (0.5 * sigma / norm)
    assert loss == pytest.approx(float((raw - wanted).square().mean()), rel=1e-5)


def test_classes_reach_the_network() -> None:
    method = build()
    batch = batch_of(method, 4)
    before = loss_of(method, batch)
    with torch.no_grad():
        method.student.network.class_embedding.weight[0] += 5
    after = loss_of(method, Batch(Draws(0, 0, range(4)), images=batch.images, condition=batch.condition))
    assert after != pytest.approx(before, rel=1e-4)


def write_idx(folder: Path, prefix: str, count: int) -> None:
    draw = np.random.default_rng(count)
    pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, array in (
        (f"{prefix}-images-idx3-ubyte.gz", pixels),
        (f"{prefix}-labels-idx1-ubyte.gz", labels),
    ):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
        (folder / name).write_bytes(gzip.compress(head + array.tobytes()))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of two steps on 20 pictures, and a card of 6."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "fashion"
    data.mkdir()
    write_idx(data, "train", 20)
    write_idx(data, "t10k", 12)
    monkeypatch.setattr(trainer, "write_own_card", partial(write_own_card, num_images=6))
    monkeypatch.setattr(trainer, "PIXEL_STEPS", (1, 2))
    pixels = {
        "method": {"name": "edm", "num_inference_steps": 3},
        "data": {"name": str(data), "random_flip": True},
        "resolution": 32,
        "student": {"init": "scratch", "network": NETWORK},
        "train_batch_size": 4,
        "max_train_steps": 2,
        "validation_steps": 2,
        "validation_prompts": ["sneaker", "bag"],
    }
    return {"output_dir": str(tmp_path / "teacher"), "stages": {"pixels": pixels}}


def test_a_pixel_teacher_is_trained_halved_scored_and_can_be_loaded(tree: dict[str, Any]) -> None:
    folder = trainer.train(tree)
    assert (folder.parent / "pixels" / "samples" / "step-000002.png").is_file()
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {v.dtype for v in weights.values()} == {torch.float16}
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(1, 1), (2, 3)]
    assert {s["protocol"]["conditioning"] for row in rows for s in row["scores"]} == {"class"}
    card = (folder / "README.md").read_text()
    assert (
        "license: other" in card
        and "| teacher | 2 |" in card
        and "trained by fewstep on fashion, split train" in card
    )
    lines: dict[str, Any] = {}
    code = card.split("```python\n")[1].split("```")[0].replace(f'("{folder.name}"', f'("{folder}"')
    exec(code, lines)
    assert lines["image"].size == (32, 32)
    private = str(folder.parents[1])
    assert not any(word in card for word in ("fashion-edm", "apache", "Fashion-MNIST", private))
    loaded = Teacher.load(TeacherSettings(str(folder)))
    assert isinstance(loaded, PixelTeacher)
    assert loaded.shape == (1, 32, 32) and loaded.process.t_range == (0.002, 80.0)
    plain = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True)
    images = plain(2, [7, 8], 2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert images.shape == (2, 1, 32, 32)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"scheduler": {}}, "scheduler: no such key; there are output_dir, stages"),
        ({"stages": {"pixels": {}, "diffusion": {}}}, "stages.diffusion: no such key; there are pixels"),
        ({"stages": "pixels"}, "stages: 'pixels' has no keys"),
        ({"stages": None}, "stages: missing"),
        ({"stages": {"autoencoder": {}}}, "network: missing"),
    ],
)
def test_wrong_keys_of_a_teacher_configuration(
    change: dict[str, Any], line: str, tree: dict[str, Any]
) -> None:
    with pytest.raises(UserError) as error:
        trainer.train({**tree, **change})
    assert str(error.value).startswith(line)


def test_every_stage_is_checked_before_the_first_is_trained(tmp_path: Path) -> None:
    data = {"name": "emoji-noto"}
    stages = {
        "autoencoder": {"data": data, "method": {"name": "autoencoder"}},
        "text_encoder": {"data": data, "method": {"name": "text_encoder"}},
        "diffusion": {"data": data, "method": {"name": "diffusion"}, "learning_rat": 1e-3},
    }
    tree = {"output_dir": f"{tmp_path}/teacher", "network": {}, "scheduler": {}, "stages": stages}
    with pytest.raises(UserError, match="learning_rat: no such key"):
        trainer.train(tree)
    assert not (tmp_path / "teacher").exists()


def test_one_training_of_a_teacher_at_a_time(tree: dict[str, Any]) -> None:
    with (
        locked(Path(tree["output_dir"])),
        pytest.raises(UserError, match=r"output_dir: .* is in use by process"),
    ):
        trainer.train(tree)
    assert not Path(tree["output_dir"]).exists()


def test_the_card_of_an_embedded_teacher_is_its_own_configurations_alone(tree: dict[str, Any]) -> None:
    configs = Path(__file__).parents[2] / "configs"
    for name in ("emoji", "fashion"):
        own = read_yaml(configs / name / "teacher.yaml")
        assert trainer.is_recipe({**own, "output_dir": "elsewhere"}, name)
        stage = next(iter(own["stages"]))
        changed = {**own["stages"][stage], "data": {"name": "mine"}}
        assert not trainer.is_recipe({**own, "stages": {**own["stages"], stage: changed}}, name)
    folder = trainer.train(tree)
    data = tree["stages"]["pixels"]["data"]["name"]
    write_pixel_card(folder, steps=(1,), num_images=6, data=data)
    assert "ankle boot" in (folder / "README.md").read_text()
