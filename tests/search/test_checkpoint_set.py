"""Raw checkpoints combined tensor by tensor."""

from pathlib import Path

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.search.checkpoint_set import CheckpointSet
from fewstep.distill.search.lcsc import ema_alpha
from safetensors.torch import save_file


def write(run: Path, sets: list[dict[str, torch.Tensor]]) -> CheckpointSet:
    (run / "raw_weights").mkdir()
    for i, tensors in enumerate(sets):
        save_file(tensors, run / "raw_weights" / f"step-{i + 1:08d}.safetensors")
    return CheckpointSet.of(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_hot_is_that_checkpoint_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    sets = [{"w": torch.randn(3, 5).to(dtype), "ids": torch.tensor([7])} for _ in range(4)]
    checkpoints = write(tmp_path, sets)
    for i, tensors in enumerate(sets):
        out = checkpoints.combined("w", [float(j == i) for j in range(4)])
        assert out.dtype == dtype and torch.equal(out, tensors["w"])
    assert torch.equal(checkpoints.combined("ids", [0.25] * 4), torch.tensor([7]))


def test_integers_are_the_last_ones(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, [{"ids": torch.tensor([i, 2])} for i in (3, 9)])
    assert checkpoints.combined("ids", [0.5, 0.5]).tolist() == [9, 2]


def test_uniform_is_the_mean_and_ema_the_fold(tmp_path: Path) -> None:
    sets = [{"w": torch.randn(40)} for _ in range(5)]
    checkpoints = write(tmp_path, sets)
    mean = torch.stack([s["w"] for s in sets]).mean(0)
    torch.testing.assert_close(checkpoints.combined("w", [0.2] * 5), mean)
    fold = sets[0]["w"]
    for tensors in sets[1:]:
        fold = 0.9 * fold + 0.1 * tensors["w"]
    torch.testing.assert_close(checkpoints.combined("w", list(ema_alpha(5, 0.9))), fold, rtol=0, atol=1e-6)


def test_a_permutation_changes_nothing(tmp_path: Path) -> None:
    sets = [{"w": torch.randn(40)} for _ in range(3)]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    a = write(tmp_path / "a", sets).combined("w", [0.5, 0.9, -0.4])
    b = write(tmp_path / "b", sets[::-1]).combined("w", [-0.4, 0.9, 0.5])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_large_coefficients_do_not_cancel_in_half_precision(tmp_path: Path) -> None:
    sets = [{"w": (1 + i * 1e-2 * torch.arange(8.0)).bfloat16()} for i in range(3)]
    out = write(tmp_path, sets).combined("w", [6.0, -11.0, 6.0]).float()
    exact = 6 * sets[0]["w"].double() - 11 * sets[1]["w"].double() + 6 * sets[2]["w"].double()
    assert torch.equal(out, exact.bfloat16().float())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"v": torch.zeros(3)}, r"v is \('F32', \(3,\)\), in step-00000001\.safetensors None"),
        ({"w": torch.zeros(4)}, r"w is \('F32', \(4,\)\), in step-00000001\.safetensors \('F32', \(3,\)\)"),
        ({"w": torch.zeros(3).half()}, r"w is \('F16', \(3,\)\)"),
    ],
)
def test_unequal_sets_are_refused(tmp_path: Path, other: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(tmp_path, [{"w": torch.zeros(3)}, {"w": torch.zeros(3)}, other])


def test_too_few_sets(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 1 sets of weights; train with --raw_weights\.every"):
        write(tmp_path, [{"w": torch.zeros(3)}])
    with pytest.raises(UserError, match="holds 0 sets"):
        CheckpointSet.of(tmp_path / "nothing")


def test_the_newest_alone(tmp_path: Path) -> None:
    write(tmp_path, [{"w": torch.full((1,), float(i))} for i in range(5)])
    checkpoints = CheckpointSet.of(tmp_path, last=2)
    assert checkpoints.steps == (4, 5) and float(checkpoints.combined("w", [1.0, 0.0])) == 3.0


def test_damaged_files(tmp_path: Path) -> None:
    write(tmp_path, [{"w": torch.zeros(3)}] * 2)
    (tmp_path / "raw_weights" / "step-00000002.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"step-00000002\.safetensors: is not a readable .*: train again"):
        CheckpointSet.of(tmp_path)


LOG = '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 3.0}\n'


def test_losses_of_a_log_whose_last_line_was_cut(tmp_path: Path) -> None:
    checkpoints = write(tmp_path, [{"w": torch.zeros(3)}] * 2)
    (tmp_path / "log.jsonl").write_text(LOG + '{"step": 3, "lo')
    assert checkpoints.losses() == [1.0, 3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"log\.jsonl is missing; restore it, or use metric step"),
        ('{"step": 1, \n' + LOG, r"log\.jsonl: line 1: is not JSON .*: mend or delete the line"),
        ('{"loss": 1.0}\n' + LOG, r"log\.jsonl: line 1: step: field required"),
        ('{"step": -1}\n' + LOG, r"log\.jsonl: line 1: step: input should be greater"),
        ("[" * 100_000 + "\n" + LOG, r"log\.jsonl: line 1: is nested too deeply"),
        ("null\n" + LOG, r"log\.jsonl: line 1: its value: input should be a valid dictionary"),
        (LOG.replace("3.0", "NaN"), r"log\.jsonl: step 2: loss: .* finite number: use metric step"),
        (LOG.replace("3.0", '"x"'), r"log\.jsonl: step 2: loss: .* valid number"),
        ("", r"has no loss between steps 0 and 1; train with --logging_steps 1"),
    ],
)
def test_a_damaged_log(tmp_path: Path, text: str | None, message: str) -> None:
    checkpoints = write(tmp_path, [{"w": torch.zeros(3)}] * 2)
    if text is not None:
        (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        checkpoints.losses()
