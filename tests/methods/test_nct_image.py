"""NCT with an IP-Adapter: the zero start, the shared U-Net, gradients, who moves, the stock pipelines' samples."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import IPAdapterAttnProcessor
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.errors import UserError
from fewstep.distill.methods.control.control_adapters import IPAdapter
from fewstep.distill.methods.control.nct import NCT
from fewstep.distill.methods.control.noise_consistency import coupled
from fewstep.distill.methods.control.settings import NCTSettings
from fewstep.distill.models.control_networks import ImageEmbedder
from fewstep.distill.models.frozen import weights_hash
from fewstep.distill.models.teacher import Teacher
from fewstep.distill.scorers.vision import Vision
from fewstep.distill.settings import StudentSettings, TeacherSettings
from fewstep.distill.training.contract import Batch, Parts, Progress
from fewstep.pipelines.export import write_export
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
from transformers.modeling_outputs import BaseModelOutput

CAPTIONS = ["red cat", "dog", "cat", "go"]
START = Progress(0, 10, {"control": 0})


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny CLIPVisionModelWithProjection's folder."""
    folder = tmp_path_factory.mktemp("clip") / "vision"
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=4,
        image_size=16, projection_dim=24,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = CLIPVisionModelWithProjection(config)
        with torch.no_grad():
            for p in network.parameters():
                p.mul_(8)  # or every picture has the same embedding
    network.save_pretrained(folder)
    return str(folder)


def built(folder: Path, encoder: str, *, moved: bool = True, **settings: Any) -> NCT:
    """Whose adapter is no longer zero, if `moved`."""
    teacher = Teacher.load(TeacherSettings(str(folder)))
    torch.manual_seed(0)
    settings = {"control": {"name": "image", "encoder": encoder}, **settings}
    method = NCT(NCTSettings(**settings), Parts(teacher, StudentSettings(), []))
    if moved:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in method.players()["control"]:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return method.train()


def step(method: NCT, iteration: int = 0) -> dict[str, Tensor]:
    condition = method.teacher.condition(CAPTIONS)
    return method("control", Batch(Draws(0, iteration, range(len(CAPTIONS))), condition=condition), START, {})


def processors(network: Any) -> list[Any]:
    return [p for p in network.attn_processors.values() if hasattr(p, "to_k_ip")]


@pytest.mark.parametrize("encoder", ["efflite0", "clip"])
def test_at_the_start_the_picture_changes_nothing(encoder: str, tiny_pipeline: Path, clip: str) -> None:
    method = built(tiny_pipeline, clip if encoder == "clip" else encoder, moved=False)
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    with torch.no_grad():
        x, seen = method.sampled(z, told, Draws(0, 0, range(4)))
        assert seen.shape == (4, 24 if encoder == "clip" else 1280) and seen.std(0).mean() > 1e-3
        names = [k for k in method.adapter.network.attn_processors if k.endswith("attn2.processor")]
        for layer, name in zip(processors(method.adapter.network), names, strict=True):
            text = method.generator.network.get_submodule(name.removesuffix(".processor")).to_k
            assert torch.equal(layer.to_k_ip[0].weight, text.weight)
        for other in (seen, seen.flip(0), 9 * torch.randn_like(seen), torch.zeros_like(seen)):
            assert torch.equal(method.adapter(z, told, other), x)
    out = step(method)
    assert out["boundary"].item() == 0 and out["consistency"].item() > 1e-3


def test_after_one_step_every_part_learns(tiny_pipeline: Path, clip: str) -> None:
    """At zero values alone have a gradient; then keys and projection too. The generator has none and stays."""
    method = built(tiny_pipeline, clip, moved=False)
    parts = method.teacher.modules()
    before, trained = [weights_hash(m) for m in parts], method.players()["control"]
    assert set(trained) == {p for p in method.parameters() if p.requires_grad}
    assert set(trained) == set(method.ip_adapter.parameters())
    optimiser = torch.optim.AdamW(trained, lr=1e-2)
    learning = []
    for i in range(2):
        optimiser.zero_grad()
        step(method, i)["loss"].backward()
        learning.append({k for k, p in method.ip_adapter.named_parameters() if p.grad.abs().max() > 0})
        optimiser.step()
    assert learning[0] == {k for k, _ in method.ip_adapter.named_parameters() if ".to_v_ip." in k}
    assert learning[1] == {k for k, _ in method.ip_adapter.named_parameters()}
    assert [weights_hash(m) for m in parts] == before
    assert all(p.grad is None for m in parts for p in m.parameters())
    assert not any(m.training for m in (*parts, method.adapter.network, method.view))
    assert not any(p.requires_grad for p in method.view.parameters())


def test_the_generators_own_sample_has_no_adapter(tiny_pipeline: Path, clip: str) -> None:
    """x is that of a pipeline that never had one, however far the adapter is; the network's weights are shared."""
    method = built(tiny_pipeline, clip)
    own, shared = method.teacher.family.network, method.adapter.network
    assert {id(p) for p in own.parameters()} == {id(p) for p in shared.parameters() if not p.requires_grad}
    assert not processors(own) and len(processors(shared)) == 4 and own.encoder_hid_proj is None
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    x, seen = method.sampled(z, told, Draws(0, 0, range(4)))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    pipe.scheduler = method.generator.scheduler
    made = pipe(CAPTIONS, latents=z, output_type="latent", **method.generator.call()).images
    torch.testing.assert_close(x, made, rtol=1e-4, atol=1e-4 * made.abs().max().item())
    assert (method.adapter(z, told, seen) - x).abs().max() > 1e-2 * x.abs().max()
    method.teacher.to(torch.device("cpu"), torch.bfloat16)
    assert next(shared.parameters()).dtype == torch.bfloat16
    assert {p.dtype for p in method.ip_adapter.parameters()} == {torch.float32}


def test_gradients_are_those_of_unfused_attention(tiny_pipeline: Path, clip: str) -> None:
    """Of the loss by hand: the noisier sample alone follows, towards the more coupled one, with lambda's share of the
    sample of z; through diffusers' processor without fused attention. Checkpointing changes nothing."""
    method = built(tiny_pipeline, clip, num_levels=3, boundary_weight=2.0)
    trained = method.players()["control"]
    ours = torch.autograd.grad(step(method)["loss"], trained)
    (network,) = method.passed_through()
    network.enable_gradient_checkpointing()
    calls: list[int] = []
    network.up_blocks[0].resnets[0].register_forward_pre_hook(lambda module, args: calls.append(1))
    again = torch.autograd.grad(step(method)["loss"], trained)
    assert len(calls) == 5  # three samples, two of them twice
    network.disable_gradient_checkpointing()
    plain = {}
    for name, old in network.attn_processors.items():
        plain[name] = old
        if hasattr(old, "to_k_ip"):
            plain[name] = IPAdapterAttnProcessor(old.hidden_size, old.cross_attention_dim, old.num_tokens)
            plain[name].to_k_ip, plain[name].to_v_ip = old.to_k_ip, old.to_v_ip
    network.set_attn_processor(plain)
    draws, told = Draws(0, 0, range(4)), method.teacher.condition(CAPTIONS)
    z, eps = draws.normal((4, 8, 8)), draws.normal((4, 8, 8))
    x, seen = method.sampled(z, told, draws)
    k = draws.integers(0, 3)
    high, low, own = (
        method.adapter(noise, told, seen)
        for noise in (coupled(z, eps, method.sigmas[k + 1]), coupled(z, eps, method.sigmas[k]), z)
    )
    loss = (high - low.detach()).square().mean() + 2 * (own - x).square().mean()
    by_hand = torch.autograd.grad(loss, trained)
    for found, repeated, expected in zip(ours, again, by_hand, strict=True):
        size = expected.abs().max().item()
        assert size > 0
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * size)
        torch.testing.assert_close(repeated, found, rtol=1e-4, atol=1e-4 * size)


def test_the_embedding_has_no_gradient(tiny_pipeline: Path, clip: str) -> None:
    method = built(tiny_pipeline, clip)
    assert isinstance(method.view, ImageEmbedder)
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    x, seen = method.sampled(z, told, Draws(0, 0, range(4)))
    assert not x.requires_grad and not seen.requires_grad
    pictures, draws = torch.rand(2, 3, 16, 16, requires_grad=True), Draws(0, 0, range(2))
    looked = method.view(pictures, draws)
    assert not looked.requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(method.view(pictures, draws), looked)


def test_prompts_are_dropped_and_pictures_kept(tiny_pipeline: Path, clip: str) -> None:
    method = built(tiny_pipeline, clip)
    told, z = method.teacher.condition(CAPTIONS), torch.randn(4, 4, 8, 8)
    seen = torch.randn(4, 24)
    dropped = told.drop(torch.tensor([True, False, True, False]))
    with torch.no_grad():
        changed = [
            (method.adapter(z, c, s) - method.adapter(z, told, seen)).abs().amax((1, 2, 3)) > 1e-4
            for c, s in ((dropped, seen), (told, seen.roll(1, 0)))
        ]
    assert changed[0].tolist() == [True, False, True, False] and changed[1].all()


@pytest.mark.parametrize("family", ["sd", "lcm", "sdxl"])
def test_the_stock_pipeline_makes_the_same_sample(
    family: str, tiny_pipeline: Path, lcm_pipeline: Path, tiny_families: Any, clip: str, tmp_path: Path
) -> None:
    """With embeddings, and with pictures that it embeds itself."""
    folder = {"sd": tiny_pipeline, "lcm": lcm_pipeline}.get(family) or tiny_families(family)
    method = built(folder, clip).eval()
    export = method.export()
    write_export(export, tmp_path)
    noise, pictures = torch.randn(2, *method.teacher.shape), torch.rand(2, 3, 16, 16)
    seen = method.view(pictures, Draws(0, 0, range(2)))
    with torch.no_grad():
        ours = method.adapter(noise, method.teacher.condition(CAPTIONS[:2]), seen)
        without = method.generator(noise, method.teacher.condition(CAPTIONS[:2]))
    pipe = type(method.teacher.pipeline).from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(str(tmp_path), subfolder="ip_adapter", weight_name="ip_adapter.safetensors")
    call = {"output_type": "latent", **export.sampling["1"]}
    made = torch.cat([
        pipe(c, ip_adapter_image_embeds=[s[None, None]], latents=n[None], **call).images
        for c, s, n in zip(CAPTIONS, seen, noise, strict=False)
    ])  # fmt: skip
    size = ours.abs().max()
    assert (made - ours).abs().max() < 1e-5 * size and (ours - without).abs().max() > 1e-2 * size
    opened = Image.fromarray((pictures[0] * 255).round().byte().permute(1, 2, 0).numpy())
    alone = pipe(CAPTIONS[0], ip_adapter_image=opened, latents=noise[:1], **call).images
    assert (alone - ours[:1]).abs().max() < 0.02 * size


def test_rows_of_pictures_show_the_prompt(tiny_pipeline: Path, clip: str) -> None:
    method = built(tiny_pipeline, clip)
    rows = method.pictures(CAPTIONS, seed=0)
    assert [r.shape for r in rows.values()] == [(4, 3, 16, 16)] * 3
    torch.testing.assert_close(rows["condition"], rows["generator"].clamp(-1, 1))


def test_what_does_not_fit_is_refused(tiny_pipeline: Path, clip: str, tiny_families: Any) -> None:
    with pytest.raises(UserError, match=r"method.control.encoder: no CLIPVisionModelWithProjection can be r"):
        built(tiny_pipeline, "nobody/nothing")
    with pytest.raises(UserError, match=r"teacher.path: .* works in straight paths"):
        built(tiny_families("sd3"), clip)
    with pytest.raises(NotImplementedError, match="an IP-Adapter is trained with torch's own attention"):
        built(tiny_pipeline, clip).passed_through()[0].enable_xformers_memory_efficient_attention()
    method = built(tiny_pipeline, clip)
    method.generator.network.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(UserError, match=r"takes no IP-Adapter of diffusers"):
        IPAdapter(method.generator, method.view)


class Means(torch.nn.Module):
    """Of every channel, in the place of a network's last features."""

    def forward(self, pixels: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixels.mean((2, 3))[..., None, None])


class SeesMeans(Vision):
    def embedder(self, name: str) -> ImageEmbedder:
        return ImageEmbedder(Means(), 3, 8, (0.5,) * 3, (0.05,) * 3)


def learnt(folder: Path, patch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Where the mean colour of samples of other noise should be that of a picture: its squared error, relative to that
    of the generator's own, and the deviation of the samples' rest, relative to that of theirs."""
    teacher = Teacher.load(TeacherSettings(str(folder)), resolution=4)
    network = teacher.family.network
    for (
        name,
        p,
    ) in network.named_parameters():  # the random network's output counts beside the noise, text in it
        p.mul_(8 if name == "conv_out.weight" else 3 if "attn2.to_out" in name or "proj_out" in name else 1)
    patch.setattr(teacher, "decode", lambda x: x[:, :3] / 80)  # most of it within [-1, 1]
    torch.manual_seed(0)
    settings = NCTSettings(control={"name": "image"}, num_levels=4, dual_lr=0, boundary_weight=0.25)
    method = NCT(settings, Parts(teacher, StudentSettings(), [], vision=SeesMeans()))
    optimiser = torch.optim.AdamW(method.players()["control"], lr=3e-2, betas=(0.9, 0.95))
    told = teacher.condition(["cat"] * 64)
    for i in range(60):
        loss = method("control", Batch(Draws(1, i, range(64)), condition=told), START, {})["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    z, other = torch.randn(2, 64, 4, 2, 2, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        seen = method.sampled(z, told, Draws(0, 0, range(64)))[1]
        plain, made = method.generator(other, told), method.adapter(other, told, seen)
        wanted = method.generator(z, told)[:, :3].mean((2, 3))
    error, untrained = ((x[:, :3].mean((2, 3)) - wanted).square().mean() for x in (made, plain))
    rest, own = ((x - x.mean((2, 3), keepdim=True)).std() for x in (made, plain))
    return (error / untrained).item(), (rest / own).item()


def test_samples_learn_to_follow_the_picture(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 60 steps; without the consistency loss they ignore it."""
    error, rest = learnt(tiny_pipeline, monkeypatch)
    assert error < 0.6 and rest > 0.85
    monkeypatch.setattr(
        "fewstep.distill.methods.control.nct.noise_consistency", lambda generate, z, *rest: (z, z)
    )
    error, _ = learnt(tiny_pipeline, monkeypatch)
    assert error > 0.95
