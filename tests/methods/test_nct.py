"""NCT on the tiny pipeline: the zero start, losses by hand, who gets a gradient, the multiplier, what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from fewstep.distill.diffusion.condition import Condition
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.diffusion.guidance import guidance_embedding
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.nct import NCT
from fewstep.distill.methods.control.noise_consistency import coupled
from fewstep.distill.methods.control.settings import NCTSettings
from fewstep.distill.models.frozen import weights_hash
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from torch import Tensor

CAPTIONS = ["red cat", "dog", "cat", "go"]
START = Progress(0, 10, {"control": 0})
SUPERRES = {"name": "superres", "factor": 4}


def built(
    folder: Path, *, moved: bool = True, student: StudentSettings | None = None, **settings: Any
) -> NCT:
    """Whose adapter is no longer zero, if `moved`."""
    teacher = Teacher.load(TeacherSettings(str(folder)))
    torch.manual_seed(0)
    settings = {"control": SUPERRES, **settings}
    method = NCT(NCTSettings(**settings), Parts(teacher, student or StudentSettings(), []))
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in method.controlnet.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return method.train()


def batch(method: NCT, iteration: int = 0) -> Batch:
    condition = method.teacher.condition(CAPTIONS)
    return Batch(Draws(0, iteration, range(len(CAPTIONS))), condition=condition, captions=CAPTIONS)


def step(method: NCT, iteration: int = 0) -> dict[str, Tensor]:
    return method("control", batch(method, iteration), START, {})


def spied(method: NCT, note: Callable[[bool, Condition, Tensor], None]) -> None:
    """`note` gets of every sample whether it is controlled, what it is told, and the sample."""

    class Spy:
        def __init__(self, inner: Any, controlled: bool):
            self.inner, self.controlled = inner, controlled

        def __call__(self, noise: Tensor, told: Condition, *seen: Tensor) -> Tensor:
            out = self.inner(noise, told, *seen)
            note(self.controlled, told, out)
            return out

    method.generator = Spy(method.generator, False)  # type: ignore[assignment]
    method.adapter = Spy(method.adapter, True)  # type: ignore[assignment]


def test_at_the_start_the_control_changes_nothing(tiny_pipeline: Path) -> None:
    """And so the boundary loss is exactly 0 whatever the condition, the consistency loss is not."""
    method = built(tiny_pipeline, moved=False)
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        x = method.generator(z, told)
        for picture in (torch.rand(4, 3, 16, 16), torch.zeros(4, 3, 16, 16)):
            assert torch.equal(method.adapter(z, told, picture), x)
    out = step(method)
    assert out["boundary"].item() == 0 and out["consistency"].item() > 1e-3


@pytest.mark.parametrize(("distance", "weight"), [("l2", 3.0), ("huber", 0.5)])
def test_losses_by_hand(distance: Any, weight: float, tiny_pipeline: Path) -> None:
    """Algorithm 1: one z and one eps in both levels, the condition of z's own sample in all of them."""
    method = built(tiny_pipeline, distance=distance, huber_c=0.1, boundary_weight=weight, num_levels=5)
    out = step(method)
    draws, told = Draws(0, 0, range(4)), method.teacher.condition(CAPTIONS)
    z, eps = draws.normal((4, 8, 8)), draws.normal((4, 8, 8))
    with torch.no_grad():
        x = method.generator(z, told)
        pixels = (method.teacher.decode(x) / 2 + 0.5).clamp(0, 1)
        picture = torch.nn.functional.avg_pool2d(pixels, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
        k = draws.integers(0, 5)
        low, high = ((torch.pi * (k + i) / 10).sin().double() for i in (0, 1))

        def made(noise: Tensor) -> Tensor:
            return method.adapter(noise, told, picture)

        gaps = [made(coupled(z, eps, high)) - made(coupled(z, eps, low)), made(z) - x]
    if distance == "l2":
        consistency, boundary = (g.square().mean().item() for g in gaps)
    else:
        consistency, boundary = (
            ((g.square().sum((1, 2, 3)) + 0.01).sqrt() - 0.1).mean().item() for g in gaps
        )
    assert out["consistency"].item() == pytest.approx(consistency, rel=1e-4) and consistency > 1e-3
    assert out["boundary"].item() == pytest.approx(boundary, rel=1e-4) and boundary > 1e-4
    assert out["loss"].item() == pytest.approx(consistency + weight * boundary, rel=1e-4)
    assert out["boundary_weight"].item() == weight


def test_the_noisier_level_follows_the_other(tiny_pipeline: Path) -> None:
    """The gradient is that of the noisier sample alone, towards the more coupled one, and of lambda's share."""
    method = built(tiny_pipeline, num_levels=3, boundary_weight=2.0)
    some = next(
        p for k, p in method.controlnet.named_parameters() if k.startswith("mid_block") and p.ndim > 1
    )
    (ours,) = torch.autograd.grad(step(method)["loss"], some)
    draws, told = Draws(0, 0, range(4)), method.teacher.condition(CAPTIONS)
    z, eps = draws.normal((4, 8, 8)), draws.normal((4, 8, 8))
    x, picture = method.sampled(z, told, draws)
    k = draws.integers(0, 3)
    high, low, own = (
        method.adapter(noise, told, picture)
        for noise in (coupled(z, eps, method.sigmas[k + 1]), coupled(z, eps, method.sigmas[k]), z)
    )
    loss = (high - low.detach()).square().mean() + 2 * (own - x).square().mean()
    (by_hand,) = torch.autograd.grad(loss, some)
    torch.testing.assert_close(ours, by_hand, rtol=1e-3, atol=1e-3 * by_hand.abs().max().item())


def test_checkpointing_changes_no_gradient(tiny_pipeline: Path) -> None:
    """The frozen network's activations are most of a step's: they are made again on the way back."""
    method = built(tiny_pipeline)
    trained = method.players()["control"]
    plain = torch.autograd.grad(step(method)["loss"], trained)
    (network,) = method.passed_through()
    network.enable_gradient_checkpointing()
    calls: list[int] = []
    network.up_blocks[0].resnets[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    again = torch.autograd.grad(step(method)["loss"], trained)
    assert len(calls) == 6  # x, the target, and two samples twice
    for found, expected in zip(again, plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_condition_reaches_the_sample(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline)
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    dark, light = (method.adapter(z, told, torch.full((4, 3, 16, 16), v)) for v in (0.0, 1.0))
    assert (dark - light).abs().max() > 1e-3


def test_only_the_adapter_moves(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline)
    parts = method.teacher.modules()
    before = [weights_hash(m) for m in parts]
    assert set(method.players()["control"]) == {p for p in method.parameters() if p.requires_grad}
    assert set(method.players()["control"]) == set(method.controlnet.parameters())
    optimiser = torch.optim.AdamW(method.players()["control"], lr=1e-2)
    step(method)["loss"].backward()
    moved = [p.grad.abs().max() > 0 for p in method.controlnet.parameters() if p.grad is not None]
    assert sum(moved) > 0.9 * len(list(method.controlnet.parameters()))
    optimiser.step()
    assert [weights_hash(m) for m in parts] == before
    assert all(p.grad is None for m in parts for p in m.parameters())
    assert not any(m.training for part in parts for m in part.modules()) and method.controlnet.training


def test_what_is_without_a_gradient(tiny_pipeline: Path) -> None:
    """x, the condition, and the target: the generator is called twice with a graph."""
    method = built(tiny_pipeline)
    calls: list[tuple[bool, Tensor]] = []
    spied(method, lambda controlled, told, out: calls.append((controlled, out)))
    x, picture = method.sampled(
        torch.randn(4, 4, 8, 8), method.teacher.condition(CAPTIONS), Draws(0, 0, range(4))
    )
    assert not x.requires_grad and not picture.requires_grad
    calls.clear()
    step(method)
    assert [controlled for controlled, _ in calls] == [False, True, True, True]
    assert [out.requires_grad for _, out in calls] == [False, False, True, True]


def test_the_multiplier_follows_the_mean_of_the_boundary_losses(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline, boundary_weight=1.0, dual_lr=2.0, margin=0.01)
    bounds = [step(method, i)["boundary"].item() for i in (0, 1)]
    assert bounds[0] != bounds[1]
    method.after("control")
    weight = 1 + 2 * (sum(bounds) / 2 - 0.01)
    assert method.multiplier.value.item() == pytest.approx(weight)
    out = step(method, 2)
    assert out["boundary_weight"].item() == pytest.approx(weight)
    method.after("control")
    later = weight + 2 * (out["boundary"].item() - 0.01)
    assert method.multiplier.value.item() == pytest.approx(later)
    assert "multiplier.value" in method.state_dict()


def test_prompts_are_dropped_for_all_calls_of_a_sample(tiny_pipeline: Path) -> None:
    method = built(tiny_pipeline, prompt_dropout=0.5)
    empty = method.teacher.encode_empty()["encoder_hidden_states"]
    seen: list[Tensor] = []

    def note(controlled: bool, told: Condition, out: Tensor) -> None:
        seen.append((told.arguments["encoder_hidden_states"] == empty).all((1, 2)))

    spied(method, note)
    shares = []
    for i in range(12):
        seen.clear()
        step(method, i)
        assert len(seen) == 4 and all(torch.equal(s, seen[0]) for s in seen)
        shares.append(seen[0].float().mean().item())
    assert 0.25 < sum(shares) / len(shares) < 0.75


def test_a_network_told_its_guidance(lcm_pipeline: Path) -> None:
    """The generator is; the adapter copies all but that layer, and is not."""
    method = built(lcm_pipeline, moved=False)
    unet, told, z = method.teacher.family.network, method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    copied = method.controlnet.state_dict()
    shared = {k: v for k, v in unet.state_dict().items() if k in copied}
    assert all(torch.equal(copied[k], v) for k, v in shared.items())
    assert any(k.startswith("down_blocks") for k in shared) and "time_embedding.linear_1.weight" in shared
    assert not any("cond_proj" in k for k in copied)
    abar = method.teacher.noise.abar[999]
    with torch.no_grad():
        for scale in (8.5, 3.0):
            method = built(lcm_pipeline, moved=False, guidance_scale=None if scale == 8.5 else scale)
            embedded = guidance_embedding(torch.full((4,), scale - 1), 16)
            states = told.arguments["encoder_hidden_states"]
            eps = unet(z, 999, encoder_hidden_states=states, timestep_cond=embedded).sample
            if scale == 8.5:  # what every method's teacher is told
                seen = method.teacher.denoiser(z, torch.full((4,), 999.0).double(), told)
                torch.testing.assert_close(seen.output, eps)
            x0 = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
            torch.testing.assert_close(method.generator(z, told), x0.float(), rtol=1e-4, atol=1e-4)
            assert method.generator.call()["guidance_scale"] == scale
            picture = torch.rand(4, 3, 16, 16)
            assert torch.equal(method.adapter(z, told, picture), method.generator(z, told))


def test_the_step_is_that_of_the_generators_own_call(tiny_pipeline: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "pipeline"
    StableDiffusionPipeline.from_pretrained(tiny_pipeline).save_pretrained(folder)
    (folder / "sampling.json").write_text('{"1": {"timesteps": [625], "guidance_scale": 1.0}}')
    assert built(tmp_path / "run").generator.call() == {"timesteps": [625], "guidance_scale": 1.0}
    assert built(folder, timestep=400).generator.call()["timesteps"] == [400]
    assert built(tiny_pipeline).generator.timestep == 999


def test_what_does_not_fit_is_refused(tiny_pipeline: Path, tiny_families: Any) -> None:
    with pytest.raises(UserError, match=r"student: the generator is frozen"):
        built(tiny_pipeline, student=StudentSettings(kind="lora"))
    with pytest.raises(UserError, match=r"method.timestep: 1000 is not below 1000"):
        built(tiny_pipeline, timestep=1000)
    with pytest.raises(UserError, match=r"method.guidance_scale: the generator has no embedding of it"):
        built(tiny_pipeline, guidance_scale=3.0)
    with pytest.raises(UserError, match=r"teacher.path: .* works in straight paths"):
        built(tiny_families("flux"))


@pytest.mark.parametrize("family", ["sd", "lcm", "sdxl"])
def test_the_stock_pipeline_makes_the_same_sample(
    family: str, tiny_pipeline: Path, lcm_pipeline: Path, tiny_families: Any
) -> None:
    folder = {"sd": tiny_pipeline, "lcm": lcm_pipeline}.get(family) or tiny_families(family)
    method = built(folder).eval()
    export = method.export()
    noise, picture = torch.randn(2, *method.teacher.shape), torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        ours = method.adapter(noise, method.teacher.condition(CAPTIONS[:2]), picture)
    export.model.set_progress_bar_config(disable=True)
    made = export.model(
        CAPTIONS[:2], image=picture, latents=noise, output_type="latent", **export.sampling["1"]
    ).images
    torch.testing.assert_close(made, ours.float(), rtol=1e-4, atol=1e-4 * ours.abs().max().item())
    rows = method.pictures(CAPTIONS, seed=0)
    assert [r.shape for r in rows.values()] == [(4, 3, 16, 16)] * 3
    assert torch.equal(rows["condition"], method.pictures(CAPTIONS, seed=0)["condition"])
