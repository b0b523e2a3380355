"""Students: the teacher's network trained whole, a new network, or a LoRA on one shared base."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from ...pipelines.transformer_two_time import TwoTimeDiT
from ...pipelines.unet_norms import NormedUNet2DConditionModel, NormedUNet2DModel
from ..diffusion.denoiser import Denoiser
from ..diffusion.process import VP, NoiseProcess
from ..errors import UserError
from ..settings import LORA_TARGETS, StudentSettings
from .frozen import without_adapter
from .network_adapters import denoiser_of, takes_span
from .quantise import dequantise, is_quantised

ADAPTER = "student"
# The attention's projections, as diffusers' LoRA scripts for SD3 and Flux take them; Wan has the first four.
TRANSFORMER_LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
)  # fmt: skip


class Student(nn.Module):
    """The trained network behind the call of `base`, the denoiser that it starts from.

    full: a float32 copy, with a guidance embedding input of `guidance_dim` or a second time where a method asks for
    one; its new layer starts at zero, so that the student is the teacher at step 0. lora: the teacher's own network
    with an adapter; `teacher_mode()` switches the adapter off, and there is no second base network.
    """

    def __init__(
        self,
        base: Denoiser,
        settings: StudentSettings,
        guidance_dim: int | None = None,
        two_times: bool = False,
    ):
        super().__init__()
        assert not (two_times and guidance_dim is not None)
        self.lora = settings.kind == "lora"
        network: Any = base.network
        if settings.norm is not None and network.config.get("norm_type") != settings.norm:
            raise UserError("student.norm: the teacher's weights have its norms; set student.init to scratch")
        if self.lora:
            targets = list(lora_targets(network, settings))
            lora = LoraConfig(
                r=settings.rank,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=targets,
            )
            try:
                network.add_adapter(lora, adapter_name=ADAPTER)
            except ValueError as error:  # peft's words for it need the names of its classes
                kind, named = type(network).__name__, ", ".join(targets)
                raise UserError(
                    f"student.target_modules: {named}: no LoRA fits these in {kind}; name linear or convolutional "
                    "layers of it, such as to_q, or leave the key out"
                ) from error
        elif is_quantised(network):
            raise UserError(
                "teacher.quantisation: integer weights are not trained; set student.kind to lora, or leave it out"
            )
        else:
            network = full_copy(network, guidance_dim, two_times)
        kind = base.kind
        if settings.prediction is not None:
            kind = converted_kind(base, settings)
        if settings.dropout is not None:
            set_dropout(network, settings.dropout)
        self.denoiser = denoiser_of(network, base.process, kind)
        for p in self.trained().values():
            p.data = p.data.float()

    @property
    def network(self) -> Any:
        return self.denoiser.network

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their name in the network."""
        return {k: p for k, p in self.network.named_parameters() if p.requires_grad}

    @contextmanager
    def teacher_mode(self) -> Iterator[None]:
        """Within it the shared base answers as the teacher; without effect for a full student."""
        with without_adapter(self.network):
            yield

    def lora_weights(self) -> dict[str, Tensor]:
        """The adapter in peft's key layout, as diffusers' save_lora_weights takes it.

        The scale alpha / rank is multiplied into B: the file does not carry alpha, and loaders then take alpha = rank.
        """
        config = self.network.peft_config[ADAPTER]
        scale = config.lora_alpha / config.r
        weights = get_peft_model_state_dict(self.network, adapter_name=ADAPTER)
        return {k: v * scale if ".lora_B." in k else v for k, v in weights.items()}

    def fused(self) -> Any:
        """A float32 copy with the LoRA added to its weights; the trained network stays as it is."""
        network = copy.deepcopy(self.network)
        if is_quantised(network):  # peft's layers on integer weights do not merge
            network.unload_lora()
            dequantise(network)
            network.load_lora_adapter(self.lora_weights(), adapter_name=ADAPTER, prefix=None)
        network.float()
        network.fuse_lora(adapter_names=[ADAPTER])
        network.unload_lora()
        return network


def converted_kind(base: Denoiser, settings: StudentSettings) -> str:
    """student.prediction, where a network that gave `base.kind` can learn to give it and stock schedulers say so."""
    wanted = settings.prediction
    assert wanted is not None
    if settings.kind == "lora":
        raise UserError(
            f"student.prediction: {wanted}: a LoRA is loaded on the teacher's base, which predicts {base.kind}; set "
            "student.kind to full, or leave the key out"
        )
    if not isinstance(base.process, VP):
        raise UserError(
            f"student.prediction: {wanted}: the teacher's own pipeline has a scheduler for {base.kind} alone; leave "
            "the key out"
        )
    if wanted == base.kind:
        raise UserError(f"student.prediction: {wanted} is what the teacher gives already; leave the key out")
    if settings.conversion_steps == 0:
        raise UserError(
            f"student.conversion_steps: 0, but a network that gave {base.kind} has to learn {wanted} first; give some "
            "(300 do for emoji-sd)"
        )
    return wanted


def lora_targets(network: nn.Module, settings: StudentSettings) -> tuple[str, ...]:
    """student.target_modules; a transformer has its own default."""
    if settings.target_modules == LORA_TARGETS and not isinstance(
        network, UNet2DConditionModel | UNet2DModel
    ):
        return TRANSFORMER_LORA_TARGETS
    return settings.target_modules


def full_copy(base: nn.Module, guidance_dim: int | None, two_times: bool = False) -> nn.Module:
    """A trainable copy; `guidance_dim` adds time_embedding.cond_proj, `two_times` an embedding of the span t - r, both
    started at zero unless the base has them."""
    if guidance_dim is not None:
        assert isinstance(base, UNet2DConditionModel)
        network: Any = with_guidance_input(base, guidance_dim)
    elif two_times and not takes_span(base):
        network = with_span_input(base)
    else:
        network = copy.deepcopy(base)
    return network.float().requires_grad_(True).train()


def with_guidance_input(base: UNet2DConditionModel, guidance_dim: int) -> UNet2DConditionModel:
    if base.config.time_cond_proj_dim == guidance_dim:
        return copy.deepcopy(base)
    network = extended(base, "time_embedding.cond_proj.", time_cond_proj_dim=guidance_dim)
    nn.init.zeros_(network.time_embedding.cond_proj.weight)
    return network


def with_span_input(base: Any) -> Any:
    """A diffusers UNet whose class_labels take t - r, embedded as t is and added to it."""
    if not isinstance(base, UNet2DConditionModel | UNet2DModel):
        raise UserError(
            f"student: {type(base).__name__} cannot take a second time; {TwoTimeDiT.__name__} can"
        )
    if base.class_embedding is not None:
        raise UserError(
            "student: the network is told a class where its second time would go; use one without classes"
        )
    network = extended(base, "class_embedding.", class_embed_type="timestep")
    nn.init.zeros_(network.class_embedding.linear_2.weight)
    nn.init.zeros_(network.class_embedding.linear_2.bias)
    return network


def extended(base: Any, prefix: str, **config: Any) -> Any:
    """A network of `base`'s class with changed configuration and its weights, those below `prefix` new."""
    kept = {k: v for k, v in base.config.items() if k != "_use_default_values"}  # or ours would be dropped
    network = type(base).from_config({**kept, **config})
    missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
    assert all(k.startswith(prefix) for k in missing) and not unexpected, (missing, unexpected)
    return network


def set_dropout(network: nn.Module, probability: float) -> None:
    """The dropout of every ResnetBlock2D, where diffusers' UNets have it."""
    blocks = [m for m in network.modules() if isinstance(m, ResnetBlock2D)]
    if not blocks:
        raise UserError(f"student.dropout: {type(network).__name__} has no residual blocks; leave it out")
    for block in blocks:
        block.dropout.p = probability


NORMED: dict[Any, Any] = {
    UNet2DModel: NormedUNet2DModel,
    UNet2DConditionModel: NormedUNet2DConditionModel,
    TwoTimeDiT: TwoTimeDiT,
}


def new_denoiser(
    architecture: dict[str, Any], process: NoiseProcess, kind: str, norm: str | None = None
) -> Denoiser:
    """A network with new weights: a diffusers class or our TwoTimeDiT under `_class_name`, else UNet2DModel, and its
    arguments; `norm` in place of its own."""
    name = architecture.get("_class_name", "UNet2DModel")
    cls: Any = TwoTimeDiT if name == TwoTimeDiT.__name__ else getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
        raise UserError(f"student.network: diffusers has no model {name!r}; see _class_name in the configs")
    config = {k: v for k, v in architecture.items() if not k.startswith("_")}
    known = inspect.signature(cls).parameters
    for key in config:
        if key not in known:
            raise UserError(f"student.network.{key}: {name} takes no such argument")
    cls, config = normed(cls, config, norm)
    try:
        network = cls(**config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"student.network: {name} refuses this ({' '.join(str(error).split())[:160]})"
        ) from None
    return denoiser_of(network, process, kind)


@torch.no_grad()
def renewed(base: Denoiser, process: NoiseProcess, kind: str, norm: str | None = None) -> Denoiser:
    """A network of the same architecture as `base`'s with new weights; `norm` in place of its own."""
    network: Any = base.network
    config = {k: v for k, v in network.config.items() if k != "_use_default_values"}
    cls, config = normed(type(network), config, norm)
    return denoiser_of(cls.from_config(config), process, kind)


def normed(cls: Any, config: dict[str, Any], norm: str | None) -> tuple[Any, dict[str, Any]]:
    """A network's class and arguments with `norm` in place of its own norms."""
    if norm is None:
        return cls, config
    if cls not in NORMED:
        raise UserError(f"student.norm: {norm}: a {cls.__name__} has its own norms; leave the key out")
    return NORMED[cls], {**config, "norm_type": norm}
