"""MeanFlow in the runner: accumulation and two processes follow one, and plain diffusers opens what it exports."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from fewstep.distill.errors import UserError
from fewstep.distill.training.runner import Runner
from safetensors.torch import load_file
from torch import Tensor

from ..runs import train, train_in_two_processes

WEIGHTS = "pipeline/unet/diffusion_pytorch_model.safetensors"
DIT = {"_class_name": "TwoTimeDiT", "sample_size": 8, "patch_size": 2, "num_class_embeds": 8}
DIT |= {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8}

# Arguments: call by pipeline folder as JSON, file to write.
PLAIN_DIFFUSERS = """
import json, sys
import torch
from diffusers import DiffusionPipeline

calls, output = sys.argv[1:]
out = {}
for folder, call in json.loads(calls).items():
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    for steps, arguments in json.load(open(folder + "/sampling.json")).items():
        generator = [torch.Generator().manual_seed(i) for i in (3, 8)]
        images = pipe(**call, **arguments, generator=generator, output_type="latent").images
        out.setdefault(folder, {})[steps] = images
assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
torch.save(out, output)
"""


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


def settings(teacher: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """Four steps from the teacher, half of the rows with a derivative."""
    return {
        "output_dir": str(output),
        "teacher": {"path": str(teacher)},
        "data": {"name": "emoji-noto", "split": "score"},
        "method": {"name": "meanflow", "source": "teacher", "ratio": 0.5, "omega": 2.0},
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,
        "logging_steps": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def reference(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return train(settings(tiny_pipeline, tmp_path_factory.mktemp("reference") / "run"))


def assert_near(run: Path, reference: Path, tolerance: float = 1e-6) -> None:
    ours, theirs = load_file(run / WEIGHTS), load_file(reference / WEIGHTS)
    assert ours.keys() == theirs.keys()
    a, b = (torch.cat([w[k].flatten() for k in sorted(ours)]) for w in (ours, theirs))
    assert ((a - b).norm() / b.norm()).item() < tolerance


def test_accumulated_batches_follow_whole_ones(
    reference: Runner, tiny_pipeline: Path, tmp_path: Path
) -> None:
    train(settings(tiny_pipeline, tmp_path / "run", train_batch_size=2, gradient_accumulation_steps=2))
    assert_near(tmp_path / "run", reference.run)


@pytest.mark.slow
def test_two_processes_follow_one(reference: Runner, tiny_pipeline: Path, tmp_path: Path) -> None:
    """The derivative's pass leaves the exchange of gradients alone."""
    train_in_two_processes(settings(tiny_pipeline, tmp_path / "run", train_batch_size=2), tmp_path)
    assert_near(tmp_path / "run", reference.run)


def test_gradient_checkpointing_changes_nothing(
    reference: Runner, tiny_pipeline: Path, tmp_path: Path
) -> None:
    train(settings(tiny_pipeline, tmp_path / "run", gradient_checkpointing=True))
    assert_near(tmp_path / "run", reference.run)


@pytest.fixture(scope="module")
def transformer(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """An autoencoder and no teacher; categories are the classes."""
    run = tmp_path_factory.mktemp("transformer") / "run"
    tree = settings(tiny_pipeline, run, vae={"path": str(tiny_pipeline), "subfolder": "vae"})
    tree |= {"resolution": 16, "student": {"init": "scratch", "network": DIT}, "validation_steps": 4}
    tree |= {"validation_prompts": ["Objects", "Symbols"], "method": {"name": "meanflow", "kappa": 0.5}}
    del tree["teacher"]
    tree["data"] = {"name": "emoji-noto", "split": "score", "caption_column": "category"}
    return train(tree)


def test_plain_diffusers_opens_both_exports(reference: Runner, transformer: Runner, tmp_path: Path) -> None:
    calls: dict[Runner, dict[str, Any]] = {
        reference: {"prompt": ["red cat", "dog"]},
        transformer: {"batch_size": 2, "class_labels": [3, 6]},
    }
    captions = {reference: ["red cat", "dog"], transformer: ["Objects", "Symbols"]}
    given = json.dumps({str(runner.run / "pipeline"): call for runner, call in calls.items()})
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, given, "out.pt"],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    theirs: dict[str, dict[str, Tensor]] = torch.load(tmp_path / "out.pt")
    for runner in calls:
        method, found = runner.method.eval(), theirs[str(runner.run / "pipeline")]
        assert list(found) == ["1", "2", "4"]
        for steps, latents in found.items():
            generators = [torch.Generator().manual_seed(i) for i in (3, 8)]
            ours = method.sample(captions[runner], int(steps), generators)
            assert ((ours - latents).norm() / latents.norm()).item() < 1e-5


def test_what_stands_in_the_folders(reference: Runner, transformer: Runner, tiny_pipeline: Path) -> None:
    """A network class of ours has its file beside its weights; no file names the machine."""
    folder = transformer.run / "pipeline"
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["transformer_two_time", "TwoTimeDiT"]
    assert index["guidance"] == {"scale": 2.0, "start": 0.0, "end": 1.0} and index["t_max"] == 1.0
    assert (folder / "unet" / "transformer_two_time.py").is_file()
    assert (transformer.run / "samples" / "step-000004.png").is_file()
    assert "class_labels=0" in (folder / "README.md").read_text()
    saved = AutoencoderKL.from_pretrained(folder / "vae").state_dict()
    own = AutoencoderKL.from_pretrained(tiny_pipeline / "vae").state_dict()
    assert all(torch.equal(saved[k], own[k]) for k in own)
    for run, name in ((reference, "pipeline_latent_meanflow.py"), (transformer, "pipeline_meanflow.py")):
        folder = run.run / "pipeline"
        names = {p.name for p in folder.iterdir() if p.is_file()}
        assert names == {
            "README.md", "model_index.json", "sampling.json", "samples.png", "config.yaml", name,
        }  # fmt: skip
        assert not [p for p in folder.rglob("*.json") if str(run.run.parent) in p.read_text()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": {"path": "nowhere"}}, "vae.path: no AutoencoderKL can be read from nowhere"),
        ({"vae": {"pth": "x"}}, "vae"),
        ({"teacher": True}, "vae: the teacher has an autoencoder of its own; leave the key out"),
        ({"pixels": True}, "the latents of 16 px are 4 x 8 x 8"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    tree = settings(tiny_pipeline, tmp_path / "run", vae={"path": str(tiny_pipeline), "subfolder": "vae"})
    tree |= {"resolution": 16, "method": {"name": "meanflow"}}
    tree["student"] = {"init": "scratch", "network": {**DIT, "num_class_embeds": None}}
    if changes.pop("pixels", False):
        tree["student"]["network"]["in_channels"] = 3
    if not changes.pop("teacher", False):
        del tree["teacher"]
    with pytest.raises(UserError, match=message):
        train({**tree, **changes})
