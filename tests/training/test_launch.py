"""The launcher's wishes are the configuration's, or refused in one line."""

from typing import Any

import pytest
import torch
from fewstep.distill.config.run import RunConfig
from fewstep.distill.errors import UserError
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.launch import check_launcher, together_on_cpus
from fewstep.distill.training.processes import num_processes, rank

# What `accelerate launch` of one process sets, asked for nothing.
SILENT = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_DYNAMO_MODE": "default",
}


def config(**changes: Any) -> RunConfig:
    data: Any = {"name": "emoji"}
    return RunConfig(
        output_dir="run", method={"name": "lcd"}, data=data, student=StudentSettings(), **changes
    )


@pytest.mark.parametrize(
    ("changes", "environment"),
    [
        ({}, {}),
        ({"mixed_precision": "bf16"}, SILENT),
        ({"mixed_precision": "bf16"}, {**SILENT, "ACCELERATE_MIXED_PRECISION": "bf16"}),
        ({"gradient_accumulation_steps": 4}, {**SILENT, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}),
        ({"gradient_accumulation_steps": 4}, {**SILENT, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}),
        ({}, {**SILENT, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}),
        ({}, {"MASTER_ADDR": "127.0.0.1"}),
    ],
)
def test_what_agrees(changes: dict[str, Any], environment: dict[str, str]) -> None:
    check_launcher(config(**changes), environment)


@pytest.mark.parametrize(
    ("changes", "environment", "line"),
    [
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "mixed_precision: no, but the launcher says bf16; add --mixed_precision bf16, or launch with "
            "--mixed_precision no",
        ),
        (
            {"mixed_precision": "bf16"},
            {"ACCELERATE_MIXED_PRECISION": "fp16"},
            "mixed_precision: bf16, but the launcher says fp16; add --mixed_precision fp16, or launch with "
            "--mixed_precision no",
        ),
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "fp8"},
            "mixed_precision: no, but the launcher says fp8; launch with --mixed_precision no",
        ),
        (
            {"gradient_accumulation_steps": 2},
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "gradient_accumulation_steps: 2, but the launcher says 4; add --gradient_accumulation_steps 4, or unset "
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ),
        (
            {},
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"},
            "compile: the launcher's dynamo backend inductor is not supported; launch with --dynamo_backend no, and "
            "add --compile",
        ),
        (
            {},
            {"MASTER_ADDR": "127.0.0.1"},
            "launcher: `accelerate launch --cpu` starts one process, however many it is asked for; use `torchrun "
            "--nproc_per_node N`, or --num_processes 1 without MASTER_ADDR in the environment",
        ),
    ],
)
def test_what_does_not(changes: dict[str, Any], environment: dict[str, str], line: str) -> None:
    with pytest.raises(UserError) as refused:
        check_launcher(config(**changes), {**SILENT, **environment})
    assert str(refused.value) == line


def test_the_numbers_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (rank(), num_processes()) == (0, 1)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert (rank(), num_processes()) == (3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (rank(), num_processes()) == (1, 2)


@pytest.mark.parametrize(
    ("environment", "device", "together"),
    [
        ({}, None, False),
        ({"WORLD_SIZE": "2", "RANK": "1"}, None, True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "mps", True),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "cuda", False),
        ({"WORLD_SIZE": "2", "RANK": "1", "ACCELERATE_USE_CPU": "true"}, "cuda", True),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None, False),
        ({"WORLD_SIZE": "2"}, None, False),
    ],
)
def test_processes_without_a_device_work_together(
    environment: dict[str, str], device: str | None, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = None if device is None else torch.device(device)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    assert together_on_cpus() == together
