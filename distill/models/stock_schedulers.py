"""diffusers' own schedulers for what was trained: made from the noise process, not from a teacher's configuration."""

from inspect import signature
from typing import Any

from diffusers import LCMScheduler

from ..diffusion.process import VP

PROCESS_KEYS = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type",
)  # fmt: skip


def lcm_scheduler(process: VP, kind: str, **own: Any) -> LCMScheduler:
    """Multistep consistency sampling in the process, of a network that gives `kind` (diffusers' prediction_type).

    A configuration of another scheduler class would bring its clipping and thresholding of x0, which no method here
    trains through, and leave what it has by default to LCMScheduler's defaults. own: LCMScheduler's further arguments
    """
    own.setdefault(
        "original_inference_steps", min(50, len(process.abar))
    )  # LCMScheduler refuses more than there are
    return LCMScheduler(
        **process.scheduler_keys(),
        prediction_type=kind,
        clip_sample=False,
        thresholding=False,
        set_alpha_to_one=False,
        steps_offset=1,  # without effect, but StableDiffusionPipeline asks for it
        **own,
    )


def exchanged(scheduler: Any, cls: Any, **changes: Any) -> Any:
    """A scheduler of another class in the same noise process, with what of the configuration is nobody's default.

    from_config alone would put the defaults of `cls` in place of those that the scheduler was made with.
    """
    config, takes = scheduler.config, signature(cls).parameters
    process = {k: config[k] for k in PROCESS_KEYS if k in config and k in takes}
    return cls.from_config(config, **{**process, **changes})
