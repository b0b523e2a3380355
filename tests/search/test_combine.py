"""Checkpoints in weight space, and a LoRA's in the space of its factors and of its products."""

from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from fewstep.distill.errors import UserError
from fewstep.distill.models.student import Student
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.search.checkpoint_set import CheckpointSet
from fewstep.distill.search.combine import LoRASpace, WeightSpace, network_prefix, open_space
from fewstep.distill.settings import StudentSettings
from safetensors.torch import save_file
from torch import Tensor

TARGETS = ("to_q", "conv1", "conv_shortcut")


def lora(folder: Path) -> Student:
    from fewstep.distill.config.run import TeacherSettings

    settings = StudentSettings(kind="lora", rank=2, lora_alpha=6, target_modules=TARGETS)
    return Student(Teacher.load(TeacherSettings(path=str(folder))).denoiser, settings)


@pytest.fixture(scope="module")
def run(
    tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run that trained a LoRA of rank 2 and alpha 6: three raw checkpoints, and what peft fuses of each."""
    folder = tmp_path_factory.mktemp("lora")
    (folder / "raw_weights").mkdir()
    config = {
        "output_dir": str(folder),
        "teacher": {"path": str(tiny_pipeline)},
        "student": {"kind": "lora", "rank": 2, "lora_alpha": 6, "target_modules": list(TARGETS)},
        "data": {"name": "emoji"},
        "method": {"name": "lcd"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    fused, student = [], lora(tiny_pipeline)
    for step in range(1, 4):
        for p in student.trained().values():
            p.data = 0.3 * torch.randn(p.shape)
        weights = {f"student.{k}": p.detach() for k, p in student.named_parameters() if p.requires_grad}
        save_file(weights, folder / "raw_weights" / f"step-{step:08d}.safetensors")
        fused.append({k: v.clone() for k, v in student.fused().state_dict().items()})
    return folder, fused


def opened(run: Path, pipeline: Path, space: str):
    return open_space(
        space, StableDiffusionPipeline.from_pretrained(pipeline), pipeline, CheckpointSet.of(run)
    )


@pytest.mark.parametrize("space", ["lora_factors", "lora_delta"])
def test_one_hot_is_what_peft_fuses(run, tiny_pipeline: Path, space: str) -> None:
    folder, fused = run
    combined = opened(folder, tiny_pipeline, space)
    for i, expected in enumerate(fused):
        combined.load(torch.eye(3)[i].numpy())
        for name, value in combined.network.state_dict().items():
            torch.testing.assert_close(value, expected[name], msg=name)
    base = StableDiffusionPipeline.from_pretrained(tiny_pipeline).unet.state_dict()
    changed = [k for k in base if not torch.equal(base[k], combined.network.state_dict()[k])]
    assert sorted(changed) == sorted(combined.raw) and len(changed) > 6
    combined.load(None)
    assert all(torch.equal(base[k], v) for k, v in combined.network.state_dict().items())


def test_the_products_are_linear_in_the_fused_weights(run, tiny_pipeline: Path) -> None:
    folder, fused = run
    combined = opened(folder, tiny_pipeline, "lora_delta")
    alpha = torch.tensor([0.5, 1.2, -0.7])
    combined.load(alpha.numpy())
    for name, value in combined.network.state_dict().items():
        expected = sum(a * f[name] for a, f in zip(alpha, fused, strict=True))
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_factors_have_the_cross_terms(run, tiny_pipeline: Path) -> None:
    """alpha = (1/2, 1/2): 1/4 (B1 + B2)(A1 + A2) is less than 1/2 (B1 A1 + B2 A2) by 1/4 (B1 - B2)(A1 - A2)."""
    folder, _ = run
    spaces = {s: opened(folder, tiny_pipeline, s) for s in ("lora_factors", "lora_delta")}
    for name, raw in spaces["lora_delta"].raw.items():
        checkpoints = spaces["lora_delta"].checkpoints
        (a1, b1), (a2, b2) = (
            [checkpoints.tensor(i, f"{raw}.lora_{x}.student.weight").flatten(1) for x in "AB"] for i in (0, 1)
        )
        factors, delta = (spaces[s].combined(name, [0.5, 0.5, 0.0]) for s in ("lora_factors", "lora_delta"))
        expected = 3 * 0.25 * (b1 - b2) @ (a1 - a2)  # alpha / rank = 3
        torch.testing.assert_close((delta - factors).flatten(1), expected, rtol=1e-4, atol=1e-5)


def test_weight_space_takes_the_student_and_leaves_the_rest(tiny_pipeline: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    (tmp_path / "raw_weights").mkdir()
    sets = []
    for step in (1, 2):
        weights = {f"student.net.{k}": torch.randn_like(p) for k, p in pipeline.unet.named_parameters()}
        weights |= {f"critic.net.{k}": torch.zeros_like(p) for k, p in pipeline.unet.named_parameters()}
        save_file(weights, tmp_path / "raw_weights" / f"step-{step:08d}.safetensors")
        sets.append(weights)
    space = WeightSpace(pipeline, tiny_pipeline, CheckpointSet.of(tmp_path))
    space.load(torch.tensor([1.5, -0.5]).numpy())
    for name, value in pipeline.unet.named_parameters():
        expected = 1.5 * sets[0][f"student.net.{name}"] - 0.5 * sets[1][f"student.net.{name}"]
        torch.testing.assert_close(value, expected)
    with pytest.raises(UserError, match=r"method\.space: .* did not train a LoRA"):
        (tmp_path / "config.yaml").write_text("{output_dir: x, data: {name: emoji}, method: {name: lcd}}")
        LoRASpace(pipeline, tiny_pipeline, CheckpointSet.of(tmp_path), factors=True)


def test_prefix() -> None:
    assert network_prefix(["a.w", "a.b", "x"], ["w", "b"]) == "a."
    assert network_prefix(["w", "b"], ["w", "b"]) == ""
    assert network_prefix(["critic.w", "student.w"], ["w"]) == "student."
    for names, remedy in (
        (["a.w"], "they are of another network"),
        (["a.w.lora_A.student.weight"], "lora_factors"),
    ):
        with pytest.raises(UserError, match=rf"are not the pipeline's 2 parameters; .*{remedy}"):
            network_prefix(names, ["w", "b"])


def test_weight_space_of_a_lora(run, tiny_pipeline: Path) -> None:
    with pytest.raises(UserError, match="use `space: lora_factors` or `lora_delta`"):
        opened(run[0], tiny_pipeline, "weights")
