"""Students: the teacher's network trained whole, or a LoRA on one shared base."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from .config import StudentSettings
from .denoiser import UNet2DConditionDenoiser
from .teacher import Teacher

ADAPTER = "student"


class Student(nn.Module):
    """The trained network behind the teacher's call.

    full: a float32 copy, with a guidance embedding input of `guidance_dim` where a method asks for one; its new layer
    starts at zero, so that the student is the teacher at step 0. lora: the teacher's own network with an adapter;
    `teacher_mode()` switches the adapter off, and there is no second base network.
    """

    def __init__(self, teacher: Teacher, settings: StudentSettings, guidance_dim: int | None = None):
        super().__init__()
        self.lora = settings.kind == "lora"
        base: UNet2DConditionModel = teacher.pipeline.unet
        if self.lora:
            base.add_adapter(
                LoraConfig(
                    r=settings.rank,
                    lora_alpha=settings.lora_alpha,
                    lora_dropout=settings.lora_dropout,
                    target_modules=list(settings.target_modules),
                ),
                adapter_name=ADAPTER,
            )
            network = base
        else:
            network = full_copy(base, guidance_dim)
        self.denoiser = UNet2DConditionDenoiser(network, teacher.process, teacher.denoiser.kind)
        for p in self.trained().values():
            p.data = p.data.float()

    @property
    def network(self) -> UNet2DConditionModel:
        return self.denoiser.network

    def trained(self) -> dict[str, nn.Parameter]:
        """Trained parameters by their name in the network."""
        return {k: p for k, p in self.network.named_parameters() if p.requires_grad}

    @contextmanager
    def teacher_mode(self) -> Iterator[None]:
        """Within it the shared base answers as the teacher; without effect for a full student."""
        if not self.lora:
            yield
            return
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()

    def lora_weights(self) -> dict[str, Tensor]:
        """The adapter in peft's key layout, as diffusers' save_lora_weights takes it.

        The scale alpha / rank is multiplied into B: the file does not carry alpha, and loaders then take alpha = rank.
        """
        config = self.network.peft_config[ADAPTER]
        scale = config.lora_alpha / config.r
        weights = get_peft_model_state_dict(self.network, adapter_name=ADAPTER)
        return {k: v * scale if ".lora_B." in k else v for k, v in weights.items()}

    def fused(self) -> UNet2DConditionModel:
        """A float32 copy with the LoRA added to its weights; the trained network stays as it is."""
        network = copy.deepcopy(self.network).float()
        network.fuse_lora(adapter_names=[ADAPTER])
        network.unload_lora()
        return network


def full_copy(base: UNet2DConditionModel, guidance_dim: int | None) -> UNet2DConditionModel:
    """A trainable copy; `guidance_dim` adds time_embedding.cond_proj, started at zero unless the base has one."""
    if guidance_dim is None or base.config.time_cond_proj_dim == guidance_dim:
        network = copy.deepcopy(base)
    else:
        config = {
            k: v for k, v in base.config.items() if k != "_use_default_values"
        }  # or ours would be dropped
        network = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": guidance_dim})
        missing, unexpected = network.load_state_dict(base.state_dict(), strict=False)
        assert missing == ["time_embedding.cond_proj.weight"] and not unexpected, (missing, unexpected)
        nn.init.zeros_(network.time_embedding.cond_proj.weight)
    return network.float().requires_grad_(True).train()
