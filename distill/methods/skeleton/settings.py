"""Settings of the skeleton: the keys below `method` in a YAML file, read without torch."""

from typing import ClassVar

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, settings


@settings
class SkeletonSettings(MethodSettings):
    """What the student learns, and how far it is from it.

    num_teacher_steps  the teacher's steps of DDIM from noise to the sample that the student learns
    guidance_scale     guidance of the teacher; 1 = off
    distance           between the student's sample and the teacher's: mean d^2, or sqrt(d^2 + c^2) - c
    huber_c            c of huber
    """

    num_teacher_steps: int = Field(8, ge=1)
    guidance_scale: float = Field(3.0, ge=1)
    distance: Distance = "l2"
    huber_c: float = Field(1e-3, gt=0)

    idea: ClassVar[str] = "one step draws what the teacher draws in several"
    needs_teacher: ClassVar[NeedsTeacher] = "always"
    ignores: ClassVar[tuple[str, ...]] = ("student.init", "student.network", "student.norm")
    idle: ClassVar[tuple[Idle, ...]] = (Idle("method.huber_c", "method.distance", only=("huber",)),)
