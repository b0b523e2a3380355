"""What torchrun and `accelerate launch` ask for, against what a configuration says: honoured or refused."""

import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from ..config.run import RunConfig
from ..errors import UserError
from .processes import RANKS, SIZES, num_processes

REPLICATED = (
    DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_NPU, DistributedType.MULTI_XPU,
)  # fmt: skip


def together_on_cpus() -> bool:
    """Whether this is one of several processes that have no device each, or want none."""
    launched = num_processes() > 1 and any(name in os.environ for name in RANKS)
    alone = not torch.accelerator.is_available() or torch.accelerator.current_accelerator() == torch.device(
        "mps"
    )
    return launched and (alone or parse_flag_from_env("ACCELERATE_USE_CPU"))


def join_on_cpus() -> None:
    """Processes without a device work together; left to itself accelerate would run each for itself."""
    if together_on_cpus():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        PartialState(cpu=True)


def check_launcher(config: RunConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where the launcher asks for what the configuration says otherwise.

    `accelerate launch` also passes on what nobody asked for: precision "no" and the backend "no", which are taken for
    silence.
    """
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", config.mixed_precision):
        raise UserError(
            f"mixed_precision: {config.mixed_precision}, but the launcher says {precision}; "
            + (
                f"add --mixed_precision {precision}, or launch with --mixed_precision no"
                if precision in ("fp16", "bf16")
                else "launch with --mixed_precision no"
            )
        )
    steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", str(config.gradient_accumulation_steps)):
        raise UserError(
            f"gradient_accumulation_steps: {config.gradient_accumulation_steps}, but the launcher says {steps}; "
            f"add --gradient_accumulation_steps {steps}, or unset ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
        )
    backend = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no":
        raise UserError(
            f"compile: the launcher's dynamo backend {backend.lower()} is not supported; "
            "launch with --dynamo_backend no, and add --compile"
        )
    by_accelerate, processes = "ACCELERATE_DYNAMO_MODE" in environment, set(SIZES) & environment.keys()
    if by_accelerate and "MASTER_ADDR" in environment and not processes:
        raise UserError(
            "launcher: `accelerate launch --cpu` starts one process, however many it is asked for; use `torchrun "
            "--nproc_per_node N`, or --num_processes 1 without MASTER_ADDR in the environment"
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """Raises UserError for a kind of launch that the trainer cannot follow."""
    if accelerator.distributed_type not in (DistributedType.NO, *REPLICATED):
        kind = accelerator.distributed_type.value
        raise UserError(f"accelerate's {kind} is not supported; launch with --multi_gpu (replicated weights)")
    if accelerator.num_processes != num_processes():
        raise UserError(
            f"launcher: {num_processes()} processes were started and each would run for itself; start one, or set "
            "ACCELERATE_USE_CPU=true for processes on CPUs"
        )
