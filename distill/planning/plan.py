"""What a configuration would train and hold in memory, from its architecture alone, on the meta device."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config.run import RunConfig
from ..data.names import STYLES
from ..diffusion.condition import Condition
from ..diffusion.draws import Draws
from ..diffusion.ema import EMA
from ..errors import UserError
from ..models.codec import Autoencoder, Codec
from ..models.lora_files import lora_place
from ..models.teacher import LatentTeacher, Teacher
from ..scorers.rewards import Reward, UnloadedReward
from ..scorers.vision import PlannedVision
from ..training.assembly import DTYPES
from ..training.contract import Batch, Method, Parts, Progress
from ..training.processes import num_processes
from ..training.runner import Carry
from ..training.teacher_data import NAME as TAUGHT
from ..training.teacher_data import captions_of, check_keys, open_data
from .known_teachers import Blueprint, blueprint, meta_teacher
from .meta_memory import LiveBytes, fused_attention, nbytes

TITLES = {
    "unet": "teacher network",
    "transformer": "teacher network",
    "vae": "autoencoder",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "text_encoder_3": "third text encoder",
}
META = torch.device("meta")
Frozen = Teacher | Autoencoder | None  # what a run holds beside the student


@dataclass(frozen=True)
class Plan:
    """A run on the meta device: its parts, what it would hold, and what a step adds.

    captions    of the data, as far as they are known without opening it
    held        bytes that stay on the device, by title
    activations bytes beyond them at the peak of a step, were all of it float32; None where a step needs values
    asked       what the method would look up when the run starts: rewards and networks that look at pictures
    """

    config: RunConfig
    blueprint: Blueprint | None
    teacher: Teacher | None
    method: Method
    frozen: Frozen
    resolution: int
    captions: list[str]
    asked: list[str]
    held: dict[str, int]
    activations: int | None

    @property
    def half(self) -> bool:
        return self.config.mixed_precision != "no"

    @property
    def memory(self) -> tuple[int, int] | None:
        """Bytes at the peak: with all activations in the run's precision, and in float32."""
        if self.activations is None:
            return None
        total = sum(self.held.values())
        return total + self.activations // (2 if self.half else 1), total + self.activations

    def cached(self) -> tuple[int, int]:
        """Bytes of an image and of a distinct caption in the caches."""
        teacher, needs = self.frozen, self.method.needs
        if not isinstance(teacher, Codec) or "latents" not in needs:
            return 0, 0
        image = 2 * torch.Size(latent_record(teacher, self.resolution)).numel()
        if self.config.data.name == TAUGHT:  # no variance
            image //= 2
        if not isinstance(teacher, LatentTeacher) or "prompts" not in needs:
            return image, 0
        return image, DTYPES[self.config.mixed_precision].itemsize * prompt_size(teacher)

    def caches(self) -> int:
        """Bytes of the caches, as far as the data are known."""
        image, caption = self.cached()
        return image * len(self.captions) + caption * len(set(self.captions))

    def downloads(self) -> dict[str, int]:
        """Bytes of the teacher's missing components."""
        c = self.config.teacher
        if c is None or self.blueprint is None or self.teacher is None:
            return {}
        item = 2 if c.variant in ("fp16", "bf16") else self.blueprint.architecture.item
        parts, known = components(self.teacher), self.blueprint.sizes
        return {k: known.get(k) or item * count(without_training(parts[k])) for k in self.blueprint.missing}


def planned(config: RunConfig) -> Plan:
    """Builds the run on the meta device. Reads and fetches no weights.

    UserError for whatever the run itself would refuse: a missing teacher, a setting that does not fit it.
    """
    c = config
    plan = blueprint(c.teacher) if c.teacher else None
    if c.teacher and c.teacher.lora:
        lora_place(c.teacher.lora, "teacher.lora")
    teacher = meta_teacher(c.teacher, plan.architecture, c.resolution) if c.teacher and plan else None
    if c.teacher and c.teacher.quantisation and isinstance(teacher, LatentTeacher):
        teacher.quantise(DTYPES[c.mixed_precision])
    vae = Autoencoder.planned(c.vae) if c.vae else None
    resolution = c.resolution or (teacher.resolution if teacher else None)
    if resolution is None:
        raise UserError("resolution: missing; without `teacher: {path: ...}` the image size must be given")
    captions, classes = _texts(c, resolution)
    rewards, vision = list[str](), PlannedVision()
    with META:
        parts = Parts(
            teacher,
            c.student,
            captions,
            classes,
            resolution,
            reward=unloaded(rewards),
            vae=vae,
            vision=vision,
        )
        method: Method = c.method.load()(c.method.settings, parts)
        parts.check(method.needs)
        ema = EMA(method.averaged(), c.ema_decay) if c.use_ema else None
    frozen = teacher or vae
    if frozen is not None:
        frozen.to(META, DTYPES[c.mixed_precision])
    moments = 2 if c.optimizer == "adamw_8bit" else 8
    held = held_bytes(method, frozen, ema, offloaded=c.cpu_offload, moments=moments)
    if c.mixed_precision != "no":
        trained = nbytes([p for p in method.parameters() if p.requires_grad])
        held["autocast's 16-bit copy of the trained weights"] = trained // 2
    if num_processes() > 1:
        held["gradient buckets of the processes' exchange"] = held["gradients"]
    activations = step_bytes(c, method, frozen, resolution)
    asked = [*(f"reward {name}" for name in rewards), *vision.asked]
    return Plan(c, plan, teacher, method, frozen, resolution, captions, asked, held, activations)


def parameters(method: Method, teacher: Frozen) -> dict[str, int]:
    """Numbers of parameters by title. A LoRA's student includes the network that it shares with the teacher."""
    own, players = list(method.parameters()), method.players()
    several = {f"trained as {name}": count(p) for name, p in players.items()} if len(players) > 1 else {}
    title = "all players" if several else next(iter(players))
    out = {title: count(own), "trained": count([p for p in own if p.requires_grad]), **several}
    if teacher is None:
        return out
    frozen = {
        f"{TITLES.get(name, name)} ({type(m).__name__})": count(
            [p for p in m.parameters() if not p.requires_grad]
        )
        for name, m in components(teacher).items()
    }
    return {**frozen, **out}


def held_bytes(
    method: Method, teacher: Frozen, ema: EMA | None, *, offloaded: bool = False, moments: int = 8
) -> dict[str, int]:
    """Bytes that stay on the device during the whole run, by title.

    offloaded: text encoders and autoencoder are not there; moments: bytes of the optimiser's for each parameter.
    """
    trained = [p for p in method.parameters() if p.requires_grad]
    counted: set[int] = {id(p) for p in trained}
    out = {}
    for name, module in components(teacher).items():
        if offloaded and (name == "vae" or name.startswith("text_encoder")):
            continue
        tensors = [t for t in tensors_of(module) if id(t) not in counted]
        counted |= {id(t) for t in tensors}
        dtype = str(getattr(module, "dtype", tensors[0].dtype)).removeprefix("torch.")
        out[f"{TITLES.get(name, name)}, {dtype}"] = nbytes(tensors)
    rest = [t for t in tensors_of(method) if id(t) not in counted]
    out["trained weights, float32"] = nbytes(trained)
    out["gradients"] = nbytes(trained)
    out["the optimiser's two moments"] = moments * count(trained)
    out["moving targets and other state of the method"] = nbytes(rest)
    if ema is not None:
        out["average of the trained weights (use_ema)"] = nbytes(ema.buffers())
    return {title: size for title, size in out.items() if size}


def step_bytes(config: RunConfig, method: Method, teacher: Frozen, resolution: int) -> int | None:
    """Bytes beyond `held_bytes` at the peak of a step, were all of it float32; None where a step needs values.

    Forward and backward of each player run on the meta device, attention without its score matrix.
    """
    method.train()
    modules: list[Any] = [*method.modules(), *method.passed_through()]
    if config.gradient_checkpointing:
        for module in modules:
            if hasattr(module, "enable_gradient_checkpointing"):
                module.enable_gradient_checkpointing()
    known = tensors_of(method) + [t for m in components(teacher).values() for t in tensors_of(m)]
    for t in known:
        t.data = t.data.float() if t.is_floating_point() else t.data
    for p in method.parameters():
        if p.requires_grad:
            p.grad = torch.empty_like(p)
            known.append(p.grad)
    batch, total = _batch(config, method, teacher, resolution), config.max_train_steps
    updates = dict.fromkeys(method.players(), 0)
    late = [Progress(i, total, updates) for i in range(max(0, total - 100), total)]  # every player has joined
    kinds = {method.turns(progress): progress for progress in late}  # iterations may differ in who moves
    with LiveBytes(known) as counter, fused_attention():
        try:
            for turns, progress in kinds.items():
                carry = Carry()
                for player in turns:
                    torch.autograd.backward(method(player, batch, progress, carry)["loss"])
        except (RuntimeError, NotImplementedError) as error:
            if "meta" not in str(error):
                raise
            return None
    return counter.peak


def components(teacher: Frozen) -> dict[str, nn.Module]:
    if isinstance(teacher, Autoencoder):
        return {"vae": teacher.vae}
    pipeline = teacher.pipeline.components if teacher else {}
    return {name: m for name, m in pipeline.items() if isinstance(m, nn.Module)}


def tensors_of(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def without_training(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if not p.requires_grad]


def count(tensors: list[nn.Parameter]) -> int:
    return sum(t.numel() for t in tensors)


def _texts(c: RunConfig, resolution: int) -> tuple[list[str], tuple[str, ...]]:
    """Captions and classes of prompts and of embedded data. Other data are not opened: whatever classes they have may
    fit."""
    check_keys(c.data)
    if c.data.name == TAUGHT:
        return captions_of(c.data), ()
    if c.data.name not in STYLES:
        return [], ("unknown",)
    data = open_data(c.data, None, resolution)
    return data.captions, data.classes


def _batch(c: RunConfig, method: Method, teacher: Frozen, resolution: int) -> Batch:
    size = c.train_batch_size
    batch = Batch(Draws(c.seed, 0, range(size), META), captions=[""] * size)
    if "images" in method.needs:
        batch.images = torch.empty(size, 3, resolution, resolution, device=META)
    if "latents" in method.needs:
        assert isinstance(teacher, Codec)
        batch.latents = torch.empty(size, *latent_record(teacher, resolution), device=META)
    if "prompts" in method.needs:
        assert isinstance(teacher, LatentTeacher)
        shapes = teacher.family.shapes()
        texts = {k: torch.empty(size, *shape, device=META) for k, shape in shapes.items()}
        batch.condition = teacher.told(texts, {k: v[:1] for k, v in texts.items()})
    if "labels" in method.needs:
        batch.condition = Condition({"class_labels": torch.zeros(size, dtype=torch.long, device=META)}, {})
    return batch


def latent_record(codec: Codec, resolution: int) -> tuple[int, int, int]:
    """Shape of what the latent cache keeps of an image: mean and log-variance."""
    channels, height, width = codec.latent_shape(resolution)
    return 2 * channels, height, width


def prompt_size(teacher: LatentTeacher) -> int:
    """Numbers that the prompt cache keeps of a caption."""
    return sum(math.prod(shape) for shape in teacher.family.shapes().values())


def unloaded(asked: list[str]) -> Callable[[str], Reward]:
    """Gives stand-ins of rewards and notes their names in `asked`."""

    def note(spec: str) -> Reward:
        asked.append(spec)
        return UnloadedReward()

    return note
