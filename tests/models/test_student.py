"""Students start as their teacher; a LoRA shares the teacher's network, switched off it is the teacher again."""

import copy
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.ema import EMA
from fewstep.distill.models.network_adapters import UNet2DConditionDenoiser
from fewstep.distill.models.student import Student, full_copy
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.settings import LORA_TARGETS, StudentSettings, TeacherSettings
from torch import Tensor, nn

LORA = StudentSettings(kind="lora", rank=4, lora_alpha=4)


@pytest.fixture
def teacher(tiny_pipeline: Path) -> Teacher:
    return Teacher.load(TeacherSettings(path=str(tiny_pipeline)))


def inputs(teacher: Teacher) -> tuple[Tensor, Tensor, Condition]:
    t = torch.tensor([999.0, 19.0], dtype=torch.float64)
    return torch.randn(2, 4, 8, 8), t, teacher.condition(["red cat", "dog"])


def output(denoiser: UNet2DConditionDenoiser, given: tuple[Tensor, Tensor, Condition]) -> Tensor:
    with torch.no_grad():
        return denoiser(*given).output


def shaken(parameters: dict[str, nn.Parameter]) -> None:
    """Away from the start values, where a LoRA's second matrix is zero."""
    with torch.no_grad():
        for p in parameters.values():
            p.add_(0.1 * torch.randn_like(p))


def storages(module: nn.Module) -> set[int]:
    return {p.data_ptr() for p in module.parameters()}


def test_a_full_student_is_the_teacher_at_step_0_whatever_omega(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, StudentSettings(), guidance_dim=32)
    x, t, condition = inputs(teacher)
    embedded = condition.with_(timestep_cond=torch.randn(2, 32))
    start = output(student.denoiser, (x, t, embedded))
    assert torch.equal(start, output(teacher.denoiser, (x, t, condition)))
    assert student.network.config.time_cond_proj_dim == 32
    with torch.no_grad():
        student.network.time_embedding.cond_proj.weight.normal_()
    moved = output(student.denoiser, (x, t, embedded))
    assert (moved - start).abs().max() > 1e-3


def test_a_full_student_is_a_copy_that_trains_whole(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, StudentSettings(), guidance_dim=32)
    assert not storages(student.network) & storages(teacher.pipeline.unet)
    assert set(student.trained()) == {k for k, _ in student.network.named_parameters()}
    extra = set(student.trained()) - {k for k, _ in teacher.pipeline.unet.named_parameters()}
    assert extra == {"time_embedding.cond_proj.weight"}
    assert not any(p.requires_grad for module in teacher.modules() for p in module.parameters())
    assert student.network.training and not teacher.pipeline.unet.training
    given = inputs(teacher)
    before = output(teacher.denoiser, given)
    shaken(student.trained())
    assert torch.equal(output(teacher.denoiser, given), before)
    with student.teacher_mode():
        assert not torch.equal(output(student.denoiser, given), before)


def test_without_a_guidance_embedding_the_copy_is_plain(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, StudentSettings())
    assert student.network.config.time_cond_proj_dim is None
    given = inputs(teacher)
    assert torch.equal(output(student.denoiser, given), output(teacher.denoiser, given))


def test_a_teacher_that_knows_omega_hands_its_embedding_layer_on(teacher: Teacher) -> None:
    knowing = full_copy(teacher.pipeline.unet, 32)
    nn.init.normal_(knowing.time_embedding.cond_proj.weight)
    copied = full_copy(knowing, 32)
    assert torch.equal(copied.time_embedding.cond_proj.weight, knowing.time_embedding.cond_proj.weight)
    assert not storages(copied) & storages(knowing)


def test_a_full_student_of_a_half_precision_teacher_is_float32(teacher: Teacher) -> None:
    teacher.to(torch.device("cpu"), torch.bfloat16)
    for dim in (None, 32):
        student = Student(teacher.denoiser, StudentSettings(), guidance_dim=dim)
        assert {p.dtype for p in student.network.parameters()} == {torch.float32}
    assert {p.dtype for p in teacher.pipeline.unet.parameters()} == {torch.bfloat16}


def test_a_lora_shares_the_one_network_of_the_teacher(teacher: Teacher) -> None:
    before = storages(teacher.pipeline.unet)
    student = Student(teacher.denoiser, LORA)
    assert student.network is teacher.pipeline.unet is teacher.denoiser.network
    added = storages(student.network) - before
    assert before < storages(student.network)
    assert added == {p.data_ptr() for p in student.trained().values()}


def test_only_the_adapter_is_trained_and_its_size_is_that_of_its_rank(teacher: Teacher) -> None:
    """Each target layer gets A (rank x fan-in) and B (fan-out x rank)."""
    base = copy.deepcopy(teacher.pipeline.unet)
    expected = 0
    for name, layer in base.named_modules():
        if any(name.endswith("." + t) or name == t for t in LORA_TARGETS) and hasattr(layer, "weight"):
            fan_out, *fan_in = layer.weight.shape
            expected += 4 * (fan_out + torch.Size(fan_in).numel())
    student = Student(teacher.denoiser, LORA)
    assert all(".lora_A." in k or ".lora_B." in k for k in student.trained())
    numbers = 0
    for name, p in student.trained().items():
        numbers += p.numel()
        if ".lora_B." in name and p.ndim == 4:
            assert p.shape[2:] == (1, 1)
    assert numbers == expected > 0


def test_adapter_off_is_the_teacher_bit_for_bit(teacher: Teacher) -> None:
    given = inputs(teacher)
    before = output(teacher.denoiser, given)
    student = Student(teacher.denoiser, LORA)
    assert torch.equal(output(student.denoiser, given), before)
    shaken(student.trained())
    moved = output(student.denoiser, given)
    assert (moved - before).abs().max() > 1e-2
    with student.teacher_mode():
        assert torch.equal(output(student.denoiser, given), before)
        assert torch.equal(output(teacher.denoiser, given), before)
    assert torch.equal(output(student.denoiser, given), moved)


def test_the_adapter_comes_back_trainable_even_after_an_error(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, LORA)
    shaken(student.trained())
    names = set(student.trained())
    given = inputs(teacher)
    moved = output(student.denoiser, given)
    with pytest.raises(KeyError), student.teacher_mode():
        raise KeyError
    assert set(student.trained()) == names
    assert torch.equal(output(student.denoiser, given), moved)


def test_a_gradient_taken_before_teacher_mode_still_arrives(teacher: Teacher) -> None:
    """The order of a distillation step: the student's pass, the teacher's on the same network, backward."""
    student = Student(teacher.denoiser, LORA)
    shaken(student.trained())
    given = inputs(teacher)
    student.denoiser(*given).output.square().sum().backward()
    expected = {k: p.grad.clone() for k, p in student.trained().items() if p.grad is not None}
    student.zero_grad()
    loss = student.denoiser(*given).output.square().sum()
    with student.teacher_mode():
        output(teacher.denoiser, given)
    loss.backward()
    for name, p in student.trained().items():
        assert p.grad is not None and torch.equal(p.grad, expected[name])
    assert all(p.grad is None for k, p in student.network.named_parameters() if "lora" not in k)


def test_the_adapter_stays_in_float32_on_a_half_precision_base(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, LORA)
    shaken(student.trained())
    given = inputs(teacher)
    full = output(student.denoiser, given)
    teacher.to(torch.device("cpu"), torch.bfloat16)
    assert {p.dtype for p in student.trained().values()} == {torch.float32}
    frozen = {p.dtype for k, p in student.network.named_parameters() if k not in student.trained()}
    assert frozen == {torch.bfloat16}
    low = student.denoiser(*given).output
    assert ((low - full).norm() / full.norm()).item() < 0.05
    low.square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in student.trained().values())


def test_the_average_of_a_lora_holds_the_adapter_alone_and_can_be_evaluated(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, LORA)
    ema = EMA(student.trained(), 0.5)
    assert set(ema.tensors()) == set(student.trained())
    given = inputs(teacher)
    start = output(student.denoiser, given)
    shaken(student.trained())
    with torch.no_grad():
        averaged = student.denoiser(*given, weights=ema.tensors()).output
    assert torch.equal(averaged, start)
    assert not torch.equal(output(student.denoiser, given), start)


@pytest.mark.parametrize("alpha", [4, 8])
def test_stock_diffusers_loads_the_adapter_at_any_alpha(
    alpha: int, teacher: Teacher, tiny_pipeline: Path, tmp_path: Path
) -> None:
    student = Student(teacher.denoiser, StudentSettings(kind="lora", rank=4, lora_alpha=alpha))
    shaken(student.trained())
    given = inputs(teacher)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=student.lora_weights())
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    stock.load_lora_weights(tmp_path)
    stock_denoiser = UNet2DConditionDenoiser(stock.unet.eval(), teacher.process, "epsilon")
    torch.testing.assert_close(
        output(stock_denoiser, given), output(student.denoiser, given), rtol=0, atol=1e-6
    )


def test_the_fused_network_is_the_student_without_an_adapter(teacher: Teacher) -> None:
    student = Student(teacher.denoiser, StudentSettings(kind="lora", rank=4, lora_alpha=8))
    shaken(student.trained())
    given = inputs(teacher)
    before = output(student.denoiser, given)
    names = set(student.trained())
    fused = student.fused()
    assert not [k for k, _ in fused.named_parameters() if "lora" in k]
    assert not storages(fused) & storages(student.network)
    stand_alone = UNet2DConditionDenoiser(fused, teacher.process, "epsilon")
    torch.testing.assert_close(output(stand_alone, given), before, rtol=0, atol=1e-5)
    assert torch.equal(output(student.denoiser, given), before)
    assert set(student.trained()) == names
