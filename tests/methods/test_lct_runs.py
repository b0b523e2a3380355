"""Runs of latent consistency training: statistics, resuming, parts of a batch, recipes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fewstep.distill.catalog.configuration import load_config, with_overrides
from fewstep.distill.cli import main
from fewstep.distill.config.tree import read_yaml
from fewstep.distill.errors import UserError
from fewstep.distill.methods.consistency_training.lct import LCT
from fewstep.distill.methods.consistency_training.normalised_latents import Statistics
from fewstep.distill.planning.dry_run import describe
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file

from ..runs import train, train_in_two_processes
from .lct_parts import PLAIN

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHARED = {"logging_steps": 1, "checkpointing_steps": 2, "adam_epsilon": 1e-3, "learning_rate": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        yield


@pytest.fixture
def tree(tiny_pipeline: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def build(name: str, coupling: str = "none", **changes: Any) -> dict[str, Any]:
        return {
            "output_dir": str(tmp_path / name),
            "vae": {"path": str(tiny_pipeline), "subfolder": "vae"},
            "student": {"init": "scratch", "network": PLAIN, "norm": "non_scaling"},
            "data": {"name": "emoji-noto", "split": "score"},
            "resolution": 16,
            "method": {"name": "lct", "coupling": coupling},
            "train_batch_size": 4,
            "max_train_steps": 4,
            **SHARED,
            **changes,
        }

    return build


def state(runner: Runner, step: int) -> dict[str, torch.Tensor]:
    return load_file(runner.run / f"checkpoint-{step}" / "state.safetensors")


Tree = Callable[..., dict[str, Any]]


def test_statistics_are_those_of_all_latents_and_a_resumed_run_does_not_measure(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[int] = []
    measure = Statistics.measure

    def counted(self: Statistics, latents: Any, *args: Any) -> None:
        measured.append(len(latents))
        measure(self, latents, *args)

    monkeypatch.setattr(Statistics, "measure", counted)
    plain = train(tree("plain"))
    assert measured == [len(plain.batches.data)] and len(plain.batches.data) > 50
    every = plain.batches.latents[range(len(plain.batches.latents))].double()
    mean, logvar = every.chunk(2, dim=1)
    method = plain.method
    assert isinstance(method, LCT) and method.statistics is not None
    scale = method.parts.vae.vae.config.scaling_factor  # type: ignore[union-attr]
    torch.testing.assert_close(method.statistics.mean.double(), scale * mean.mean(0), rtol=1e-5, atol=1e-7)
    expected = scale * (mean.var(0, correction=0) + logvar.exp().mean(0)).sqrt()
    torch.testing.assert_close(method.statistics.std.double(), expected, rtol=1e-5, atol=0)

    class Crash(BaseException):
        pass

    save = Runner._save

    def crash(self: Runner) -> None:
        save(self)
        if self.step == 2:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "_save", crash)
        with pytest.raises(Crash):
            train(tree("resumed"))
    resumed = train(tree("resumed"))
    assert len(measured) == 2
    ours, theirs = state(resumed, 4), state(plain, 4)
    assert {"method.statistics.mean", "method.statistics.std"} <= ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def test_accumulated_parts_are_the_whole_batch_without_coupling(tree: Tree) -> None:
    parts = {"train_batch_size": 2, "gradient_accumulation_steps": 2}
    weight = {"name": "lct", "diffusion_weight": 0}  # its mean is over the early rows of a part
    for coupling in ("none", "condition"):
        runs = [
            train(tree(f"{coupling} {i}", method={**weight, "coupling": coupling}, **change))
            for i, change in enumerate(({}, parts))
        ]
        whole, split = (state(run, 4) for run in runs)
        same = all(torch.allclose(v, split[k], rtol=1e-4, atol=1e-6) for k, v in whole.items())
        assert same == (coupling == "none")


@pytest.mark.slow
def test_two_processes_are_one_without_coupling(tree: Tree, tmp_path: Path) -> None:
    weight = {"name": "lct", "coupling": "none", "diffusion_weight": 0}
    alone = train(tree("alone", method=weight))
    train_in_two_processes(tree("both", method=weight, train_batch_size=2), tmp_path)
    ours, theirs = state(alone, 4), load_file(tmp_path / "both" / "checkpoint-4" / "state.safetensors")
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_pictures_without_captions(tree: Tree, tmp_path: Path) -> None:
    """A folder of pictures alone, told nothing."""
    from PIL import Image

    for i in range(3):
        (tmp_path / "faces").mkdir(exist_ok=True)
        Image.new("RGB", (20, 18), (80 * i, 200 - 50 * i, 90)).save(tmp_path / "faces" / f"{i}.png")
    data = {"name": str(tmp_path / "faces"), "caption_column": None}
    runner = train(tree("folder", data=data, max_train_steps=2, train_batch_size=2, validation_steps=2))
    assert (runner.run / "pipeline" / "statistics" / "latent_statistics.py").is_file()
    assert list((runner.run / "samples").glob("*.png"))


def dry_run(name: str, *overrides: str) -> str:
    return describe(load_config(with_overrides(read_yaml(CONFIGS / f"{name}.yaml"), overrides)))


@pytest.mark.parametrize(
    "data",
    ["celebahq256", *(pytest.param(d, marks=pytest.mark.slow) for d in ("ffhq256", "lsun_church256"))],
)
def test_the_papers_recipes_pass(data: str) -> None:
    text = " ".join(dry_run(f"{data}/lct").split())
    assert "stabilityai/sd-vae-ft-ema about 0.312 GiB" in text and "not estimated" not in text


@pytest.mark.parametrize(
    ("data", "steps"), [("celebahq256", 294_000), ("ffhq256", 764_400), ("lsun_church256", 842_400)]
)
def test_the_papers_recipes_have_its_values(data: str, steps: int) -> None:
    config = load_config(read_yaml(CONFIGS / data / "lct.yaml"))
    assert (config.max_train_steps, config.learning_rate, config.ema_decay) == (steps, 1e-4, 0.99993)
    assert (config.optimizer, config.adam_weight_decay, config.max_grad_norm) == ("radam", 1e-4, None)
    assert config.student.norm == "non_scaling" and config.student.dropout is None
    church = data == "lsun_church256"
    assert config.train_batch_size == (256 if church else 128)
    assert config.method["two_step_sigma"] == (0.5286 if church else 0.369)
    defaults = {k: v for k, v in config.method.items() if k not in ("two_step_sigma", "name")}
    assert all(v == getattr(LCT.Settings(), k) for k, v in defaults.items())


def ablation() -> list[list[str]]:
    """The overrides in the header of configs/emoji/lct.yaml."""
    lines = (CONFIGS / "emoji" / "lct.yaml").read_text().split("output_dir:")[0].splitlines()
    found = [line.partition(" --")[2] for line in lines if line.startswith("#   ") and " --" in line]
    return [f"--{row}".split() for row in found if "," not in row]


def test_emoji_recipes_and_the_ablation_of_their_header_pass() -> None:
    assert "activations, estimate" in dry_run("emoji/lct_unconditional")
    text = dry_run("emoji/lct")
    assert "activations, estimate" in text and "not estimated" not in text
    rows = ablation()
    assert len(rows) >= 12
    for overrides in rows:
        assert load_config(with_overrides(read_yaml(CONFIGS / "emoji" / "lct.yaml"), overrides))
    ict, ours = (load_config(read_yaml(CONFIGS / "emoji" / f"{name}.yaml")) for name in ("ict", "lct"))
    for key in ("train_batch_size", "max_train_steps", "learning_rate", "ema_decay", "optimizer"):
        assert getattr(ict, key) == getattr(ours, key)


def test_a_norm_without_new_weights_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    tree = read_yaml(CONFIGS / "emoji" / "lcd.yaml")
    overrides = [
        "--teacher.path",
        str(tiny_pipeline),
        "--student.norm",
        "non_scaling",
        "--method.guidance_dim",
        "8",
    ]
    with pytest.raises(UserError, match=r"student\.norm: has no effect on method lcd"):
        describe(load_config(with_overrides(tree, overrides)))
    assert main(["distill", str(CONFIGS / "emoji" / "lct.yaml"), "--method.c", "0", "--dry_run"]) == 2
