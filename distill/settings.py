"""Typed sections of a configuration that the nouns read; every method's own settings are built the same way."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

settings = partial(dataclass, frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))

SEEDS = 2**63  # torch's generators take no seed from here on
COUNTS = 10**9  # no run has more steps, no data set more rows


@dataclasses.dataclass(frozen=True)
class Idle:
    """When `keys`, dotted and separated by spaces, have no effect: by the value of the key `beside`.

    only     values of `beside` beside which the keys have an effect, or
    values   values beside which they have none, or
    longer   they have none where their own value is above that of `beside`
    where    another key and its value: else the row does not speak
    """

    keys: str
    beside: str
    only: tuple[Any, ...] = ()
    values: tuple[Any, ...] = ()
    longer: bool = False
    where: tuple[str, Any] | None = None

    def holds(self, value: Any, get: Callable[[str], Any]) -> bool:
        """Whether a key of value `value` is idle; get: the value of any key."""
        if self.where is not None and get(self.where[0]) != self.where[1]:
            return False
        beside = get(self.beside)
        if self.longer:
            return bool(value > beside)
        return beside not in self.only if self.only else beside in self.values

    def refusal(self, key: str, value: Any, beside: Any, default: Any) -> str:
        if self.longer:
            return (
                f"{key}: {value} is longer than the run ({self.beside} {beside}); lower it, or train longer"
            )
        shown = f"{plain(value)} has" if len(plain(value)) < 60 else "has"
        wanted = (
            f"set {self.beside} to {' or '.join(map(plain, self.only))}"
            if self.only
            else f"change {self.beside}"
        )
        return (
            f"{key}: {shown} no effect beside {self.beside}: {plain(beside)}; {wanted}, or leave the key at "
            f"its default{'' if len(plain(default)) > 30 else f' {plain(default)}'}"
        )


NeedsTeacher = Literal["always", "to_start", "never"]


@dataclasses.dataclass(frozen=True)
class Paper:
    """name: what the field calls its method; author: the first, as BibTeX writes names; arxiv: the number."""

    name: str
    title: str
    author: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"

    def bibtex(self) -> str:
        year = f"20{self.arxiv[:2]}"
        family = "".join(c for c in self.author.partition(",")[0].lower() if c.isalpha())
        return (
            f"@misc{{{family}{year}_{self.arxiv.replace('.', '_')},\n"
            f"  title = {{{{{self.title}}}}},\n"
            f"  author = {{{self.author} and others}},\n"
            f"  year = {{{year}}},\n"
            f"  eprint = {{{self.arxiv}}},\n"
            "  archivePrefix = {arXiv},\n"
            "}"
        )


@dataclasses.dataclass(frozen=True)
class Variant:
    """The paper that a method follows where `key`, dotted, of a run's configuration has `value`; `...`: any but null.

    beside  the method's own paper is named too: the key adds something to it and does not replace it
    """

    key: str
    value: Any
    paper: Paper
    beside: bool = False

    def holds(self, config: Mapping[str, Any]) -> bool:
        found: Any = config
        for part in self.key.split("."):
            found = (found or {}).get(part)
        return found is not None if self.value is ... else bool(found == self.value)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a method is from. family: a few words for methods of one idea; variants: the first that holds counts."""

    family: str
    paper: Paper
    variants: tuple[Variant, ...] = ()

    def papers(self, config: Mapping[str, Any]) -> list[Paper]:
        """Of a run's whole configuration; the variant's before the one that it builds on."""
        for variant in self.variants:
            if variant.holds(config):
                return [variant.paper, self.paper] if variant.beside else [variant.paper]
        return [self.paper]

    def all_papers(self) -> list[Paper]:
        """Its own and its variants', each once."""
        found = (self.paper, *(variant.paper for variant in self.variants))
        return list({paper.name: paper for paper in found}.values())


class MethodSettings:
    """What can be known of a method or a search before torch is loaded: its keys are the fields of a subclass.

    idea           how it works, in one line
    origin         its papers and family; None for what no paper has
    needs_teacher  every run, or those whose student starts from the teacher's weights (`student.init: teacher`)
    ignores        keys and sections of a run's configuration that the method does not read
    idle           keys that have no effect beside others
    before         values of keys that run folders of before these keys were made with
    """

    idea: ClassVar[str] = ""
    origin: ClassVar[Origin | None] = None
    needs_teacher: ClassVar[NeedsTeacher] = "never"
    ignores: ClassVar[tuple[str, ...]] = ()
    idle: ClassVar[tuple[Idle, ...]] = ()
    before: ClassVar[dict[str, Any]] = {}


def plain(value: Any) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ", ".join(map(plain, value)) + "]" if isinstance(value, list | tuple) else str(value)


Norm = Literal["non_scaling", "non_scaling_last", "layer", "rms", "non_scaling_group", "non_scaling_instance"]

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2",
    "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip


@settings
class TeacherSettings:
    """The model that is distilled.

    path          an embedded teacher's name, a diffusers pipeline folder, or a hub id
    variant       which of the folder's weight files: fp16 for those named so; null for the plain ones
    revision      of a hub id: branch, tag or commit
    lora          a .safetensors file, or owner/name/file.safetensors of the hub, added to the weights of network and
                  text encoders
    lora_scale    the LoRA is added so many times
    quantisation  w8: the network's linear layers hold integers of 8 bits (torchao), for a LoRA student
    """

    path: str
    variant: str | None = None
    revision: str | None = None
    lora: str | None = None
    lora_scale: float = Field(1.0, ge=-100, le=100)
    quantisation: Literal["w8"] | None = None


@settings
class AutoencoderSettings:
    """The autoencoder of a method that works in latents without a teacher.

    path       a folder of AutoencoderKL or a hub id
    subfolder  where it stands in a pipeline's folder
    revision   of a hub id: branch, tag or commit
    """

    path: str
    subfolder: str | None = None
    revision: str | None = None


@settings
class StudentSettings:
    """What is trained.

    kind              full: all weights; lora: a LoRA on the teacher's network (LCM-LoRA, arXiv 2311.05556)
    init              where a method allows both: the teacher's weights, or new ones
    network           architecture of new weights: a diffusers model's arguments and its `_class_name` (UNet2DModel
                      where there is none; TwoTimeDiT is ours); null for the teacher's architecture
    prediction        what a full U-Net student gives, where that is not what its teacher gives: one step from noise
                      multiplies the error of an epsilon network by sigma / alpha (14.6 in Stable Diffusion), that of
                      v_prediction or sample by at most 1
    conversion_steps  first steps of the run, in which the student learns the teacher's own output in those terms; the
                      method has the others
    dropout           dropout of the residual blocks while training; null for what the architecture says
    norm              norms of new weights, in place of the architecture's: those of pipelines/unet_norms.py, which tie
                      a UNet to its resolution
    rank              rank of the LoRA
    lora_alpha        the LoRA is added alpha / rank times
    lora_dropout      share of the LoRA's inputs that are dropped while training
    target_modules    layers of the LoRA; the default is a U-Net's, in place of which a transformer takes its
                      attention's
    export_fused      of a LoRA also export a pipeline/ with it added to the weights, beside lora/
    """

    kind: Literal["full", "lora"] = "full"
    init: Literal["teacher", "scratch"] = "teacher"
    network: dict[str, Any] | None = None
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = None
    conversion_steps: int = Field(0, ge=0, le=COUNTS)
    dropout: float | None = Field(None, ge=0, lt=1)
    norm: Norm | None = None
    rank: int = Field(64, ge=1, le=4096)
    lora_alpha: int = Field(64, ge=1, le=65536)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = LORA_TARGETS
    export_fused: bool = True


@dataclass(frozen=True)
class Published:
    """A number that a paper gives for a method, shown beside ours and never mixed with it.

    benchmark  data and resolution, in the paper's terms
    source     where it stands
    standard   the protocol of ours (`fewstep evaluate --protocol`) whose numbers stand beside it, and what that
               protocol's pictures are made from; None where none is the same
    """

    benchmark: str
    metric: str
    steps: int
    value: float
    source: str
    standard: tuple[str, str] | None = None


Distance = Literal["huber", "l2"]


Derivative = Literal["kernel", "math", "double_backward", "finite_difference"]


DistanceName = Literal["efflite0", "efflite2", "lpips", "lpips-imagenet"]
