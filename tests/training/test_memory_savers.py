"""Options that save memory: each against the run without it, and against what it is to save."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from fewstep.distill.catalog.configuration import load_config
from fewstep.distill.diffusion.generator import seeded
from fewstep.distill.errors import UserError
from fewstep.distill.models.frozen import Offloaded
from fewstep.distill.models.quantise import held_bytes, is_quantised
from fewstep.distill.models.teacher import LatentTeacher, Teacher
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.planning.plan import planned
from fewstep.distill.settings import TeacherSettings
from fewstep.distill.training import memory_savers, optimisers
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file
from torch import nn

Train = Callable[..., Runner]
LORA = {"kind": "lora", "rank": 8, "lora_alpha": 8}


@pytest.fixture
def tree(tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return {
        "teacher": {"path": str(tiny_pipeline)},
        "student": LORA,
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "lcd", "w_min": 1, "w_max": 3, "w_export": 2},
        "train_batch_size": 2,
        "max_train_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }


@pytest.fixture
def train(tree: dict[str, Any], tmp_path: Path) -> Train:
    def run(name: str, **changes: Any) -> Runner:
        runner = Runner(load_config({**tree, "output_dir": str(tmp_path / name), **changes}))
        runner.train()
        return runner

    return run


def losses(runner: Runner) -> list[float]:
    return [json.loads(line)["loss"] for line in (runner.run / "log.jsonl").read_text().splitlines()]


def lora(runner: Runner) -> torch.Tensor:
    weights = load_file(runner.run / "lora" / "pytorch_lora_weights.safetensors")
    return torch.cat([weights[k].flatten() for k in sorted(weights)])


@pytest.fixture
def eager() -> Any:
    """torchao compiles its update; the same in plain torch takes no compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_8_bit_moments(train: Train, eager: None, tmp_path: Path) -> None:
    """Close to AdamW, in a quarter of its bytes, and resumed from a checkpoint bit for bit."""
    plain, small = train("plain"), train("small", optimizer="adamw_8bit")
    moved = lora(plain).norm()
    assert 0 < (lora(small) - lora(plain)).norm() < 0.1 * moved
    moments = [
        v for s in small.optimisers["student"].state.values() for k, v in s.items() if k.startswith("exp_avg")
    ]
    large = [v for v in moments if v.numel() >= 4096]
    assert large and all(v.codes.dtype == torch.uint8 for v in large)
    whole = torch.load(tmp_path / "small" / "checkpoint-3" / "optimizers.pt", weights_only=True)
    assert whole["players"]["student"]["state"][0]["step"] == 3
    cut = train("cut", optimizer="adamw_8bit", checkpointing_steps=2)
    (cut.run / "exported.json").unlink()
    for file in (cut.run / "checkpoint-3").iterdir():
        file.unlink()
    (cut.run / "checkpoint-3").rmdir()
    again = train("cut", optimizer="adamw_8bit", checkpointing_steps=2)
    assert torch.equal(lora(again), lora(small))


def test_without_a_package_for_8_bit_moments(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchao.optim", "bitsandbytes.optim"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"optimizer: adamw_8bit needs torchao or bitsandbytes; pip install"):
        optimisers.adamw_8bit()


def test_a_lora_on_a_quantised_base(train: Train, tree: dict[str, Any]) -> None:
    """The exported pipeline, in plain weights, draws what was trained on integers; losses stay near."""
    pytest.importorskip("torchao")
    teacher = {**tree["teacher"], "quantisation": "w8"}
    runner, plain = train("small", teacher=teacher), train("plain")
    method: Any = runner.method
    network = method.student.network
    assert is_quantised(network) and held_bytes(network) < held_bytes(plain.method.student.network)
    assert losses(runner) == pytest.approx(losses(plain), rel=0.2) and losses(runner) != losses(plain)
    with torch.no_grad():
        trained = method.teacher.decode(method.sample(["red apple"], 2, 2.0, seeded(1, 0)))
    pipe = DiffusionPipeline.from_pretrained(runner.run / "pipeline")
    assert not is_quantised(pipe.unet)
    call = json.loads((runner.run / "pipeline" / "sampling.json").read_text())["2"]
    image = pipe("red apple", generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert torch.allclose(image, (trained / 2 + 0.5).clamp(0, 1), atol=2e-4) and image.std() > 0.005
    with method.student.teacher_mode(), torch.no_grad():
        bare = method.teacher.decode(method.sample(["red apple"], 2, 2.0, seeded(1, 0)))
    assert (bare - trained).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_quantised_transformers_carry_rcm(
    name: str, train: Train, tiny_families: Callable[[str], Path]
) -> None:
    """Forward-mode derivatives pass integer weights; the same step as on plain ones, nearly."""
    pytest.importorskip("torchao")
    teacher = {"path": str(tiny_families(name))}
    changes = {
        "student": {"kind": "lora", "rank": 2},
        "method": {"name": "rcm"},
        "resolution": 16,
        "max_train_steps": 1,
    }
    plain = train("plain", teacher=teacher, **changes)
    small = train("small", teacher={**teacher, "quantisation": "w8"}, **changes)
    key = "student/loss"
    rows = [json.loads((r.run / "log.jsonl").read_text().splitlines()[0]) for r in (plain, small)]
    assert rows[0][key] != rows[1][key] and rows[1][key] == pytest.approx(rows[0][key], rel=0.3)


def test_quantised_bases_that_cannot_be(
    train: Train, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")

    with pytest.raises(
        UserError, match=r"teacher\.quantisation: integer weights are not trained; set student"
    ):
        train("full", teacher={**tree["teacher"], "quantisation": "w8"}, student={"kind": "full"})
    with pytest.raises(UserError, match=r"teacher\.quantisation: 'w4' does not fit"):
        train("four", teacher={**tree["teacher"], "quantisation": "w4"})
    with pytest.raises(UserError, match=r"teacher\.quantisation: fashion-edm works on pixels"):
        Teacher.load(TeacherSettings("fashion-edm", quantisation="w8"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"teacher\.quantisation: needs torchao; pip install"):
        train("bare", teacher={**tree["teacher"], "quantisation": "w8"})


def test_the_plan_counts_what_is_saved(tree: dict[str, Any]) -> None:
    """Of integer weights what the real network holds; the moments' quarter; encoders that wait elsewhere."""

    def held(**changes: Any) -> dict[str, int]:
        return planned(load_config({**tree, "output_dir": "none", **changes})).held

    base, small = held(), held(optimizer="adamw_8bit", cpu_offload=True)
    assert small["the optimiser's two moments"] * 4 == base["the optimiser's two moments"]
    assert {k.split(",")[0] for k in base.keys() - small.keys()} == {"autoencoder", "text encoder"}
    pytest.importorskip("torchao")
    teacher = Teacher.load(TeacherSettings(tree["teacher"]["path"]))
    assert isinstance(teacher, LatentTeacher)
    teacher.quantise(torch.float32)
    quantised = held(teacher={**tree["teacher"], "quantisation": "w8"})
    name = "teacher network, float32"
    assert quantised[name] == held_bytes(teacher.family.network) < base[name]


@pytest.mark.parametrize(("kind", "count"), [("lora", 1), ("full", 2)])
def test_networks_to_compile(kind: str, count: int, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole networks, each once: a LoRA shares its teacher's."""
    compiled: list[str] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    student = {"kind": kind, **({"rank": 2} if kind == "lora" else {})}
    train("run", student=student, max_train_steps=1, compile=True)
    assert compiled == ["UNet2DConditionModel"] * count
    train("plain", student=student, max_train_steps=1)
    assert len(compiled) == count


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_compiled_networks_train_alike(kind: str, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the tracer without a code generator: the same step, with the adapter on and off, and the same export."""
    compile = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compile(self, backend="eager"))
    student = LORA if kind == "lora" else {"kind": "full"}
    plain = train("plain", student=student, max_train_steps=1)
    fast = train("fast", student=student, max_train_steps=1, compile=True)
    assert losses(fast) == pytest.approx(losses(plain), rel=1e-4)
    one, other = (
        load_file(r.run / "pipeline/unet/diffusion_pytorch_model.safetensors") for r in (plain, fast)
    )
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[k], other[k], atol=1e-4) for k in one)


def test_offloaded_parts_move_when_they_are_called(
    train: Train, tree: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights; encoders and autoencoder go to the device for pictures alone, and back."""
    plain = train("plain", validation_steps=2)
    rests: list[str] = []
    monkeypatch.setattr(
        Offloaded, "rest", lambda self, rest=Offloaded.rest: (rests.append("rest"), rest(self))
    )
    moved: list[str] = []
    forward = CpuOffload.pre_forward

    def calls(self: CpuOffload, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append(type(module).__name__)
        return forward(self, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", calls)
    spare = train("spare", validation_steps=2, cpu_offload=True)
    assert torch.equal(lora(spare), lora(plain))
    assert set(moved) == {"CLIPTextModel", "AutoencoderKL"}
    assert len(rests) == 4  # at the start, after the pictures of step 2 and of the end, before the export
    teacher: Any = spare.method.parts.teacher
    assert not any(hasattr(m, "_hf_hook") for m in teacher.modules())
    with pytest.raises(UserError, match=r"cpu_offload: there is no text encoder or autoencoder"):
        memory_savers.waiting(None)


def test_offloaded_modules_come_when_called_and_go_when_told() -> None:
    """With the meta device in an accelerator's place."""
    layer = nn.Linear(2, 2)
    away = Offloaded([layer], torch.device("meta"))
    assert layer.weight.device.type == "cpu"
    assert layer(torch.eye(2)).device.type == "meta" == layer.weight.device.type
    away.hooks[0].hook.execution_device = torch.device("cpu")
    layer.to_empty(device="cpu")
    away.remove()
    assert not hasattr(layer, "_hf_hook") and layer(torch.eye(2)).device.type == "cpu"


def test_the_advice_is_understood(tree: dict[str, Any]) -> None:
    """Every option together is one configuration that passes a dry run."""
    teacher = {**tree["teacher"], "quantisation": "w8"}
    options = {
        "optimizer": "adamw_8bit",
        "cpu_offload": True,
        "gradient_checkpointing": True,
        "compile": True,
    }
    assert "total, estimate" in describe(
        load_config({**tree, "output_dir": "none", **options, "teacher": teacher})
    )
