"""Settings of the skeleton: the keys below `method` in a YAML file, read without torch."""

from typing import ClassVar

from pydantic import Field

from ...settings import Distance, Idle, MethodSettings, NeedsTeacher, settings


@settings
class SkeletonSettings(MethodSettings):
    """num_teacher_steps   of DDIM, from noise to the sample that the student learns

    guidance_scale      of the teacher, 1 for none
    distance, huber_c   between the student's sample and the teacher's
    """

    num_teacher_steps: int = Field(8, ge=1)
    guidance_scale: float = Field(3.0, ge=1)
    distance: Distance = "l2"
    huber_c: float = Field(1e-3, gt=0)

    needs_teacher: ClassVar[NeedsTeacher] = "always"
    ignores: ClassVar[tuple[str, ...]] = ("student.init", "student.network", "student.norm")
    idle: ClassVar[tuple[Idle, ...]] = (Idle("method.huber_c", "method.distance", only=("huber",)),)
