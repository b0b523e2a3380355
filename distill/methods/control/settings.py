"""Settings of NCT."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, Origin, Paper, settings
from .controls import Control

Grid = Literal["trig", "linear"]


NCT_PAPER = Paper(
    "NCT",
    "Noise Consistency Training: A Native Approach for One-Step Generator in Learning Additional Controls",
    "Luo, Yihong",
    "2506.19741",
)


@settings
class NCTSettings(MethodSettings):
    """A control for a one-step generator.

    control          what the adapter sees of a picture, by its name and that control's own keys
    num_levels       coupling levels N; a level is drawn uniformly (none is published)
    grid             law of the levels' sigmas
    distance         of both losses between latents: l2, mean d^2; huber, sqrt(|d|^2 + c^2) - c
    huber_c          c of huber
    margin           xi that the boundary loss may have: a few percent of the distance between unrelated samples
    boundary_weight  lambda at the start
    dual_lr          eta of lambda's rule; 0 to keep it fixed
    prompt_dropout   share of samples without their prompt
    timestep         time of the generator's one step; null for that of its sampling.json, else its last
    guidance_scale   guidance that a guidance-embedding generator is told; null for that of its sampling.json
    """

    control: Control
    num_levels: int = Field(10, ge=2)
    grid: Grid = "trig"
    distance: Distance = "l2"
    huber_c: float = Field(0.03, gt=0)
    margin: float = Field(0.02, ge=0)
    boundary_weight: float = Field(1.0, ge=0)
    dual_lr: float = Field(0.5, ge=0)
    prompt_dropout: float = Field(0.0, ge=0, lt=1)
    timestep: int | None = Field(None, ge=0)
    guidance_scale: float | None = Field(None, ge=1)

    idea: ClassVar[str] = "a control for a frozen one-step generator, without pictures"
    origin: ClassVar[Origin | None] = Origin("control", NCT_PAPER)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.huber_c", "method.distance", values=("l2",)),
        Idle("method.margin", "method.dual_lr", values=(0,)),
    )
