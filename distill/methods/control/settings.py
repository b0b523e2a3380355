"""Settings of NCT."""

from typing import ClassVar, Literal

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, Paper, settings
from .controls import Control

Grid = Literal["trig", "linear"]


NCT_PAPER = Paper(
    "Noise Consistency Training: A Native Approach for One-Step Generator in Learning Additional Controls",
    "Luo, Yihong",
    "2506.19741",
)


@settings
class NCTSettings(MethodSettings):
    """control: what the adapter sees of a picture, by its name and that control's own keys.

    num_levels, grid   coupling levels N and their sigmas; a level is drawn uniformly (none is published)
    distance, huber_c  of both losses between latents: mean d^2, or sqrt(|d|^2 + c^2) - c
    margin             xi that the boundary loss may have: a few percent of the distance between unrelated samples
    boundary_weight    lambda at the start; dual_lr: eta of its rule, 0 to keep it fixed
    prompt_dropout     share of samples without their prompt
    timestep           of the generator's one step; null for that of its sampling.json, else its last
    guidance_scale     that a guidance-embedding generator is told; null for that of its sampling.json
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

    label: ClassVar[str] = "NCT"
    papers: ClassVar[tuple[Paper, ...]] = (NCT_PAPER,)
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    idle: ClassVar[tuple[Idle, ...]] = (
        Idle("method.huber_c", "method.distance", values=("l2",)),
        Idle("method.margin", "method.dual_lr", values=(0,)),
    )
