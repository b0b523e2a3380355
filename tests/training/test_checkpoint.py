"""Checkpoints appear whole or not at all, and what was saved before stays as it was."""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fewstep.distill.errors import UserError
from fewstep.distill.training.checkpoint import (
    Checkpoints,
    ProgressFile,
    RawWeights,
    kept_state,
    restore_state,
)
from fewstep.distill.writers import recover, write_file, write_folder
from safetensors.torch import load_file
from torch import nn

PROGRESS: ProgressFile = {"updates": {"student": 3}, "seconds": 1.5, "batch": 4}
STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}
MOMENTS = {"players": {"student": {"state": {0: {"exp_avg": torch.ones(3)}}}}}
BIG = {"a": torch.zeros(100_000)}


class Shared(nn.Module):
    """A frozen base under a trained layer, and one network under two names, as latent consistency has it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(2, 2).requires_grad_(False)
        self.student = nn.Linear(2, 2)
        self.function = nn.ModuleDict({"network": self.student, "base": self.base})
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("words", torch.ones(5), persistent=False)


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """Files can grow to `size` bytes and no further: the writes fail as on a full disk, for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in folder.rglob("*")
        if p.is_file()
    }


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(3, STATE, MOMENTS, PROGRESS)
    state, optimisers, progress = checkpoints.load(tmp_path / "checkpoint-3")
    assert state.keys() == STATE.keys() and all(torch.equal(state[k], STATE[k]) for k in STATE)
    assert torch.equal(optimisers["players"]["student"]["state"][0]["exp_avg"], torch.ones(3))
    assert progress == PROGRESS


def test_the_limit_keeps_the_newest_by_number(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (8, 9, 10, 11):
        checkpoints.save(step, STATE, MOMENTS, PROGRESS)
    assert checkpoints.steps() == [10, 11]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-11"]


def test_what_a_killed_write_leaves_is_ignored_and_replaced(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(2, STATE, MOMENTS, PROGRESS)
    partial = tmp_path / ".checkpoint-4.partial"
    partial.mkdir()
    (partial / "state.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoint-old").mkdir()
    assert checkpoints.steps() == [2] and checkpoints.choose("latest") == tmp_path / "checkpoint-2"
    checkpoints.save(4, STATE, MOMENTS, PROGRESS)
    assert not partial.exists()
    assert torch.equal(checkpoints.load(tmp_path / "checkpoint-4")[0]["a"], STATE["a"])


def test_which_checkpoint_is_meant(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    assert checkpoints.choose("latest") is None and checkpoints.choose(None) is None
    for step in (9, 10):
        checkpoints.save(step, STATE, MOMENTS, PROGRESS)
    assert checkpoints.choose("latest") == tmp_path / "checkpoint-10"
    assert checkpoints.choose("checkpoint-9") == tmp_path / "checkpoint-9"
    with pytest.raises(UserError, match=r"no checkpoint-7 in .*there are: checkpoint-9, checkpoint-10"):
        checkpoints.choose("checkpoint-7")
    with pytest.raises(UserError, match=r"null, but .* holds checkpoint-10; choose another --output_dir"):
        checkpoints.choose(None)


def test_a_checkpoint_of_another_run_is_meant_by_its_path(tmp_path: Path) -> None:
    there, here = (Checkpoints(tmp_path / name, None) for name in ("there", "here"))
    for step in (2, 4):
        there.save(step, STATE, MOMENTS, PROGRESS)
    path = tmp_path / "there" / "checkpoint-2"
    assert here.choose(str(path)) == path
    here.save(3, STATE, MOMENTS, PROGRESS)
    assert here.choose(str(path)) == tmp_path / "here" / "checkpoint-3"
    assert there.choose(str(path)) == path  # a path into the run itself means what it says
    held = "there are: checkpoint-2, checkpoint-4"
    with pytest.raises(UserError, match=f"no checkpoint-3 in .*there; {held}"):
        here.choose(f"{tmp_path}/there/checkpoint-3")
    with pytest.raises(UserError, match=f"no checkpoint-<step> named in {tmp_path}/there; {held}"):
        here.choose(f"{tmp_path}/there")
    (path / "optimizers.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 is cut short .*; choose another"):
        here.load(path)


@pytest.mark.parametrize("name", ["state.safetensors", "optimizers.pt", "progress.json"])
@pytest.mark.parametrize("size", [None, 0, 9, 40])
def test_a_checkpoint_cut_short_names_itself_and_the_remedy(
    tmp_path: Path, name: str, size: int | None
) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    for step in (2, 4):
        checkpoints.save(step, STATE, MOMENTS, PROGRESS)
    path = tmp_path / "checkpoint-4" / name
    if size is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"checkpoint-4 is cut short .*delete it.* goes on from checkpoint-2"):
        checkpoints.load(tmp_path / "checkpoint-4")
    assert torch.equal(checkpoints.load(tmp_path / "checkpoint-2")[0]["a"], STATE["a"])


def test_the_only_checkpoint_cut_short_means_a_new_start(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    checkpoints.save(2, STATE, MOMENTS, PROGRESS)
    (tmp_path / "checkpoint-2" / "optimizers.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="the run then starts anew"):
        checkpoints.load(tmp_path / "checkpoint-2")


@pytest.mark.parametrize(("state", "optimisers"), [(BIG, MOMENTS), (STATE, BIG)])
def test_a_full_disk_leaves_the_older_checkpoints(tmp_path: Path, state: dict, optimisers: dict) -> None:
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save(2, STATE, MOMENTS, PROGRESS)
    before = hashes(tmp_path)
    with (
        no_room_beyond(50_000),
        pytest.raises(UserError, match=r"checkpoint-4 could not be written \(File too large") as refused,
    ):
        checkpoints.save(4, state, optimisers, PROGRESS)
    assert "free space or choose another --output_dir" in str(refused.value)
    assert hashes(tmp_path) == before


def test_a_full_disk_leaves_the_older_raw_weights_and_texts(tmp_path: Path) -> None:
    ring = RawWeights(tmp_path, keep=1)
    ring.save(1, STATE)
    write_file(tmp_path / "config.yaml", "before")
    before = hashes(tmp_path)
    with no_room_beyond(50_000), pytest.raises(UserError, match=r"step-00000002\.safetensors could not"):
        ring.save(2, BIG)
    with no_room_beyond(10), pytest.raises(UserError, match=r"config\.yaml could not be written"):
        write_file(tmp_path / "config.yaml", "x" * 100)
    assert {k: v for k, v in hashes(tmp_path).items() if k in before} == before
    assert sorted(p.name for p in (tmp_path / "raw_weights").iterdir()) == ["step-00000001.safetensors"]


def test_a_folder_that_cannot_be_filled_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    write_folder(folder, lambda f: (f / "model").write_text("old") and None)

    def fail(f: Path) -> None:
        (f / "model").write_text("new")
        raise RuntimeError("a bug, not the disk")

    with pytest.raises(RuntimeError, match="a bug"):
        write_folder(folder, fail)
    assert (folder / "model").read_text() == "old"
    write_folder(folder, lambda f: (f / "other").write_text("new") and None)
    assert [p.name for p in folder.iterdir()] == ["other"]
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]


def test_below_a_file_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"checkpoint-1 could not be written \(Not a directory\); choose another"
    ):
        Checkpoints(tmp_path / "file", None).save(1, STATE, MOMENTS, PROGRESS)


def test_kept_state_is_what_is_trained_and_the_buffers_once() -> None:
    module = Shared()
    assert kept_state(module).keys() == {"student.weight", "student.bias", "average"}


def test_a_shared_network_is_restored_under_both_names(tmp_path: Path) -> None:
    first, second = Shared(), Shared()
    first.average += 3
    restore_state(second, kept_state(first), tmp_path)
    assert second.function["network"] is second.student
    for name, value in kept_state(first).items():
        assert torch.equal(kept_state(second)[name], value), name
    assert not torch.equal(second.base.weight, first.base.weight)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    module = Shared()
    state = kept_state(module)
    with pytest.raises(UserError, match=r"differs in average\); choose another"):
        restore_state(module, {k: v for k, v in state.items() if k != "average"}, tmp_path)
    with pytest.raises(UserError, match=r"is of another model \(size mismatch for average"):
        restore_state(module, {**state, "average": torch.zeros(3)}, tmp_path)


def test_the_ring_keeps_the_newest_weights(tmp_path: Path) -> None:
    ring = RawWeights(tmp_path, keep=2)
    for step in (8, 90, 100):
        ring.save(step, {"w": torch.full((2, 3), float(step)).t()})
    saved = sorted((tmp_path / "raw_weights").iterdir())
    assert [p.name for p in saved] == ["step-00000090.safetensors", "step-00000100.safetensors"]
    assert torch.equal(load_file(saved[-1])["w"], torch.full((3, 2), 100.0))


def test_the_newest_whole_checkpoint_is_gone_on_from_and_damaged_ones_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, 2)
    for step in (2, 4):
        checkpoints.save(step, STATE, MOMENTS, PROGRESS)
    (tmp_path / "checkpoint-4" / "progress.json").write_text('{"updates": []}')
    assert checkpoints.choose("latest") == tmp_path / "checkpoint-2"
    assert "checkpoint-4 is cut short or unreadable (" in capsys.readouterr().err
    checkpoints.save(6, STATE, MOMENTS, PROGRESS)
    assert checkpoints.steps() == [2, 6] and (tmp_path / "checkpoint-4.damaged").is_dir()
    for step in (2, 6):
        (tmp_path / f"checkpoint-{step}" / "state.safetensors").write_bytes(b"")
    before = hashes(tmp_path)
    with pytest.raises(UserError, match=r"checkpoint-6 is cut short .*no other that is whole; delete it"):
        checkpoints.choose("latest")
    assert hashes(tmp_path) == before and checkpoints.steps() == [2, 6]


def test_the_other_processes_of_a_launch_choose_alike_and_touch_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints(tmp_path, None)
    for step in (2, 4):
        checkpoints.save(step, STATE, MOMENTS, PROGRESS)
    (tmp_path / "checkpoint-4" / "optimizers.pt").unlink()
    monkeypatch.setenv("RANK", "1")
    assert checkpoints.choose("latest") == tmp_path / "checkpoint-2"
    assert (tmp_path / "checkpoint-4").is_dir() and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("there", "left"),
    [
        ({".pipeline.old": "old", ".pipeline.partial": "new"}, {"pipeline": "old"}),
        ({"pipeline": "new", ".pipeline.old": "old"}, {"pipeline": "new"}),
        ({"pipeline": "old", ".pipeline.partial": "new"}, {"pipeline": "old"}),
        ({".other.old": "old", ".cells.partial": "new"}, {"other": "old"}),
    ],
)
def test_what_a_kill_between_two_renames_left_is_put_right(
    there: dict[str, str], left: dict[str, str], tmp_path: Path
) -> None:
    for name, text in there.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_text(text)
    (tmp_path / ".config.yaml.partial").write_text("cut")
    recover(tmp_path)
    assert {p.name: (p / "model").read_text() for p in tmp_path.iterdir()} == left


def test_an_interrupt_between_two_renames_keeps_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "pipe[1]", Path.rename
    write_folder(folder, lambda f: (f / "model").write_text("old") and None)

    def interrupted(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupted)
        write_folder(folder, lambda f: (f / "model").write_text("new") and None)
    assert [p.name for p in tmp_path.iterdir()] == ["pipe[1]"]
    assert (folder / "model").read_text() == "old"
