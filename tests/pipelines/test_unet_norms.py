"""Non-scaling LayerNorm and the norms beside it, in U-Nets and in our transformer: statistics, shapes, files."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from fewstep.distill.diffusion.process import EDM
from fewstep.distill.errors import UserError
from fewstep.distill.methods.meanflow.meanflow import MeanFlow
from fewstep.distill.methods.meanflow.settings import MeanFlowSettings
from fewstep.distill.models.network_adapters import denoiser_of
from fewstep.distill.models.student import Student, new_denoiser
from fewstep.distill.pretrain.edm import EDMTraining
from fewstep.distill.pretrain.settings import EDMSettings
from fewstep.distill.settings import Norm, StudentSettings
from fewstep.distill.training.contract import Parts
from fewstep.pipelines import transformer_two_time, unet_norms
from fewstep.pipelines.transformer_two_time import TwoTimeDiT
from fewstep.pipelines.unet_norms import NORM_TYPES, NormedUNet2DConditionModel, NormedUNet2DModel, SampleNorm
from torch import Tensor, nn

from ..methods.ict_parts import GREY, latent_teacher

ADM: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "attention_head_dim": 8, "norm_num_groups": 4,
    "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet", "upsample_type": "resnet",
    "attn_norm_num_groups": 4,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2, "cross_attention_dim": 12,
    "norm_num_groups": 4,
}  # fmt: skip
DIT: dict[str, Any] = {"sample_size": 8, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}


def norms(network: nn.Module) -> dict[str, SampleNorm]:
    kinds = (unet_norms.SampleNorm, transformer_two_time.SampleNorm)
    return {n: m for n, m in network.named_modules() if isinstance(m, kinds)}  # type: ignore[misc]


@pytest.mark.parametrize("kind", [unet_norms.SampleNorm, transformer_two_time.SampleNorm])
@pytest.mark.parametrize("shape", [(6, 4, 4), (5, 16)])
def test_a_sample_has_mean_0_and_variance_1_over_all_its_elements(kind: Any, shape: tuple[int, ...]) -> None:
    """Not over its channels alone, nor over the batch; eps 1e-5 inside the root; a bias for each element."""
    norm = kind(shape)
    x = 3 * torch.randn(4, *shape) * torch.arange(1.0, 5.0).view(4, *[1] * len(shape)) + 7
    x[:, 0] *= 5
    y = norm(x).flatten(1)
    assert y.mean(1).abs().max() < 1e-5 and (y.var(1, correction=0) - 1).abs().max() < 1e-4
    assert norm(x)[:, 0].var() > 2  # a channel has not
    small = 1e-3 * torch.randn(2, *shape)
    v, m = torch.var_mean(small.flatten(1), dim=1, correction=0)
    column = [-1] + [1] * len(shape)
    expected = (small - m.view(column)) / (v + 1e-5).sqrt().view(column)
    torch.testing.assert_close(norm(small), expected, rtol=1e-4, atol=1e-5)
    assert [tuple(p.shape) for p in norm.parameters()] == [shape]
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(x), y.view(x.shape) + norm.bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm(3 * x + 2), norm(x), rtol=1e-4, atol=1e-4)


def test_every_norm_of_a_unet_is_replaced_and_none_scales() -> None:
    network, plain = NormedUNet2DModel(**ADM), UNet2DModel(**ADM)
    names = {n for n, m in plain.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    found = norms(network)
    assert set(found) == names and len(names) == 25
    assert not any(isinstance(m, nn.GroupNorm | nn.LayerNorm) for m in network.modules())
    shapes = {n: tuple(m.bias.shape) for n, m in found.items()}
    assert shapes["conv_norm_out"] == (8, 8, 8) and shapes["down_blocks.0.resnets.0.norm1"] == (8, 8, 8)
    assert shapes["down_blocks.0.downsamplers.0.norm2"] == (8, 4, 4)
    assert shapes["up_blocks.1.resnets.0.norm1"] == (24, 8, 8) and shapes["mid_block.resnets.0.norm1"] == (
        16,
        4,
        4,
    )
    assert shapes["mid_block.attentions.0.group_norm"] == (16, 16)  # of 4 x 4 positions
    student = Student(denoiser_of(network, EDM(), "edm"), StudentSettings())
    trained = {k for k in student.trained() if "norm" in k}
    assert trained == {f"{name}.bias" for name in names}
    assert not [k for k in student.network.state_dict() if "norm" in k and k.endswith("weight")]


def test_transformer_blocks_of_a_unet_are_normed_over_tokens_and_channels() -> None:
    network = NormedUNet2DConditionModel(**TEXT)
    plain = UNet2DConditionModel(**TEXT)
    names = {n for n, m in plain.named_modules() if isinstance(m, nn.GroupNorm | nn.LayerNorm)}
    found = norms(network)
    assert set(found) == names
    block = "mid_block.attentions.0.transformer_blocks.0.norm1"
    assert tuple(found[block].bias.shape) == (16, 16) and tuple(found["conv_norm_out"].bias.shape) == (
        8,
        8,
        8,
    )
    assert len({n.split(".")[-1] for n in names}) == 5
    states = torch.randn(2, 7, 12)
    x = torch.randn(2, 4, 8, 8)
    whole = network(x, torch.ones(2), states).sample
    alone = network(x[1:], torch.ones(1), states[1:]).sample
    torch.testing.assert_close(whole[1:], alone, rtol=1e-4, atol=1e-5)


def test_film_stays_after_the_norm() -> None:
    """silu(shift + norm(x) (1 + scale))."""
    block = NormedUNet2DModel(**ADM).down_blocks[0].resnets[0]
    x, temb = torch.randn(2, 8, 8, 8), torch.randn(2, 32)
    h = block.conv1(nn.functional.silu(block.norm1(x)))
    scale, shift = block.time_emb_proj(nn.functional.silu(temb))[:, :, None, None].chunk(2, dim=1)
    normed = nn.functional.layer_norm(h, h.shape[1:])
    expected = x + block.conv2(nn.functional.silu(shift + normed * (1 + scale)))
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-4, atol=1e-5)


def test_norms_of_the_ablation() -> None:
    def built(norm_type: str) -> UNet2DModel:
        return NormedUNet2DModel(**ADM, norm_type=norm_type)

    x = 2 * torch.randn(3, 8, 8, 8) + 1
    first = {k: built(k).down_blocks[0].resnets[0].norm1 for k in NORM_TYPES}
    layer = nn.functional.layer_norm(x, (8, 8, 8))
    for kind, expected in (
        ("non_scaling", layer),
        ("layer", layer),
        ("rms", x / (x.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()),
        ("non_scaling_last", nn.functional.group_norm(x, 4)),
        ("non_scaling_group", nn.functional.group_norm(x, 4)),
        ("non_scaling_instance", nn.functional.instance_norm(x)),
    ):
        torch.testing.assert_close(first[kind](x), expected, rtol=1e-4, atol=1e-5)
        assert (first[kind].weight is None) == (kind.startswith("non_scaling") and kind != "non_scaling_last")
        assert first[kind].bias is not None
    assert list(norms(built("non_scaling_last"))) == ["conv_norm_out"]
    assert set(NORM_TYPES) == set(Norm.__args__)  # type: ignore[attr-defined]
    nn.init.normal_(first["layer"].weight)
    torch.testing.assert_close(first["layer"](x), layer * first["layer"].weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm_type", NORM_TYPES)
@pytest.mark.parametrize("kind", ["plain", "text"])
def test_files_open_as_what_was_saved(kind: str, norm_type: str, tmp_path: Path) -> None:
    cls, config = (NormedUNet2DModel, ADM) if kind == "plain" else (NormedUNet2DConditionModel, TEXT)
    network: Any = cls(**config, norm_type=norm_type).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    network.save_pretrained(tmp_path)
    assert [f.name for f in tmp_path.glob("*.safetensors")] == ["diffusion_pytorch_model.safetensors"]
    opened: Any = cls.from_pretrained(tmp_path).eval()
    assert opened.config.norm_type == norm_type and opened.config.norm_num_groups == 4
    arguments: tuple[Tensor, ...] = (torch.randn(2, 4, 8, 8), torch.ones(2))
    if kind == "text":
        arguments = (*arguments, torch.randn(2, 7, 12))
    assert torch.equal(network(*arguments).sample, opened(*arguments).sample)
    assert {"norm_type", *config} <= set(inspect.signature(cls).parameters)


def test_a_transformer_is_normed_over_tokens_and_channels(tmp_path: Path) -> None:
    network = TwoTimeDiT(**DIT, norm_type="non_scaling").eval()
    assert {tuple(m.bias.shape) for m in norms(network).values()} == {(16, 16)} and len(norms(network)) == 5
    assert not any(isinstance(m, nn.LayerNorm) for m in network.modules())
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    block = network.transformer_blocks[0]
    x, c = torch.randn(2, 16, 16), torch.randn(2, 16)
    y = block.norm1(x, emb=c)[0]
    emb = block.norm1.linear(nn.functional.silu(c)).chunk(6, dim=1)
    normed = nn.functional.layer_norm(x, (16, 16)) + block.norm1.norm.bias
    torch.testing.assert_close(y, normed * (1 + emb[1][:, None]) + emb[0][:, None], rtol=1e-4, atol=1e-5)
    network.save_pretrained(tmp_path)
    opened = TwoTimeDiT.from_pretrained(tmp_path).eval()
    arguments = torch.randn(2, 4, 8, 8), torch.rand(2)
    labels = torch.tensor([3, 1000])
    expected = network(*arguments, class_labels=labels).sample
    assert torch.equal(opened(*arguments, class_labels=labels).sample, expected)
    zero = network(*arguments, span=torch.zeros(2), class_labels=labels).sample
    assert torch.equal(zero, expected) and expected.std() > 0.1
    other = network(*arguments, span=torch.ones(2), class_labels=labels).sample
    assert (other - expected).norm() > 1e-3 * expected.norm()


def test_a_dry_run_builds_them_without_values() -> None:
    with torch.device("meta"):
        for network in (NormedUNet2DModel(**ADM, num_class_embeds=3), NormedUNet2DConditionModel(**TEXT)):
            assert all(p.is_meta for p in network.parameters()) and norms(network)


@pytest.mark.parametrize("cls", [None, "UNet2DConditionModel", "TwoTimeDiT"])
def test_a_student_is_given_its_norm_by_its_settings(cls: str | None) -> None:
    name = {} if cls is None else {"_class_name": cls}
    config = {None: ADM, "UNet2DConditionModel": TEXT, "TwoTimeDiT": DIT}[cls]
    denoiser = new_denoiser({**name, **config}, EDM(), "edm", "non_scaling")
    assert denoiser.network.config.norm_type == "non_scaling" and norms(denoiser.network)
    plain = new_denoiser({**name, **config}, EDM(), "edm")
    assert not norms(plain.network) and type(plain) is type(denoiser)
    with pytest.raises(
        UserError, match=r"student\.norm: the teacher's weights have its norms; set student\.init"
    ):
        Student(plain, StudentSettings(norm="non_scaling"))
    with pytest.raises(ValueError, match="norm_type 'batch' is n"):
        new = {
            None: NormedUNet2DModel,
            "UNet2DConditionModel": NormedUNet2DConditionModel,
            "TwoTimeDiT": TwoTimeDiT,
        }
        new[cls](**config, norm_type="batch")


def test_methods_with_new_weights_take_the_norm(tiny_pipeline: Path) -> None:
    """MeanFlow's second time is an input beside it; the pixel teacher's own training reads the same key."""
    scratch = StudentSettings(init="scratch", norm="non_scaling")
    method = MeanFlow(MeanFlowSettings(), Parts(latent_teacher(tiny_pipeline), scratch, [], (), 16))
    assert isinstance(method.student.network, NormedUNet2DConditionModel) and norms(method.student.network)
    assert method.student.network.class_embedding is not None
    grey = StudentSettings(init="scratch", network=GREY, norm="non_scaling")
    teacher = EDMTraining(EDMSettings(), Parts(None, grey, [], (), 8))
    assert isinstance(teacher.student.network, NormedUNet2DModel) and norms(teacher.student.network)
