"""Exported folders of the iCT family, opened by plain diffusers in one process that never imports this package."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fewstep.distill.methods.consistency_training.ict import ICT
from fewstep.distill.methods.consistency_training.settings import ICTSettings
from fewstep.distill.settings import StudentSettings
from fewstep.distill.training.contract import Parts
from fewstep.pipelines.export import Export, write_export

from ..methods.ict_parts import CLASSES, COLOUR, GREY, latent_ict, pixel_ict, pixel_teacher, shaken
from ..methods.lct_parts import CLASSED, DIT, lct

# Arguments: a JSON list of [name, folder, arguments of the loader, arguments of the call], and the file to write.
PLAIN_DIFFUSERS = """
import json, sys
import numpy as np
import torch
from diffusers import DiffusionPipeline

images, pipes = {}, {}
for name, folder, loading, call in json.loads(sys.argv[1]):
    if folder not in pipes:
        pipes[folder] = DiffusionPipeline.from_pretrained(folder, **loading)
        pipes[folder].set_progress_bar_config(disable=True)
        images[f"{name} class"] = np.array(type(pipes[folder]).__name__)
        pipes[folder].scheduler.register_to_config(clip_denoised=False)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 8)]
    images[name] = pipes[folder](generator=generators, output_type="np", **call).images

assert not [name for name in sys.modules if name.split(".")[0] == "fewstep"]
np.savez(sys.argv[2], **images)
"""
PROMPTS = ["red cat", "dog"]
LABELS = [0, 2]
TRUST = {"trust_remote_code": True}


@dataclass
class Opened:
    """methods and folders by name; images (2, H, W, C) of plain diffusers by "name calls"."""

    methods: dict[str, Any]
    folders: dict[str, Path]
    images: dict[str, np.ndarray]


def ict_methods(tiny_pipeline: Path) -> dict[str, ICT]:
    scratch = StudentSettings(init="scratch")
    ect = {"curriculum": "continuous", "huber_c": 0}
    cd = {"ode_source": "teacher", "target": "ema", "curriculum": "constant"}
    classes = {"num_class_embeds": len(CLASSES)}
    return {
        "grey": pixel_ict(sigma_min=0.004, sigma_data=0.6),
        "classes": pixel_ict(network={**COLOUR, **classes}, classes=CLASSES),
        "latent scratch": latent_ict(tiny_pipeline, student=scratch),
        "latent ect": shaken(latent_ict(tiny_pipeline, **ect), size=0.02),
        "latent cd": shaken(latent_ict(tiny_pipeline, prediction="v_prediction", **cd), size=0.02),
    }


def lct_methods(tiny_pipeline: Path) -> dict[str, Any]:
    """Normalised but for "plain lct"; "normed grey" is iCT on pixels in a network of ours."""
    grey = StudentSettings(init="scratch", network=GREY, norm="non_scaling")
    return {
        "latent lct": shaken(lct(tiny_pipeline, network=None)),
        "plain lct": shaken(lct(tiny_pipeline, norm=None, normalise=False, sigma_data=1.0)),
        "lct classes": shaken(lct(tiny_pipeline, network=CLASSED)),
        "dit lct classes": shaken(lct(tiny_pipeline, network=DIT, sigma_data=0.8)),
        "normed grey": shaken(ICT(ICTSettings(), Parts(None, grey, [], (), 8))),
    }


@pytest.fixture(scope="session")
def opened(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    root = tmp_path_factory.mktemp("exports")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        methods: dict[str, Any] = {**ict_methods(tiny_pipeline), **lct_methods(tiny_pipeline)}
        exports = {name: method.eval().export() for name, method in methods.items()}
        for name, network in (("edm", GREY), ("edm classes", {**COLOUR, "num_class_embeds": 3})):
            methods[name] = pixel_teacher(network, sigma_data=0.4, sigma_min=0.01, rho=5.0).pipeline
            exports[name] = Export(methods[name], sampling={"3": {"num_inference_steps": 3}})
    folders = {name: root / name.replace(" ", "_") for name in exports}
    jobs = []
    for name, export in exports.items():
        write_export(export, folders[name])
        told: dict[str, Any] = {"prompt": PROMPTS} if name.startswith("latent") else {"batch_size": 2}
        if name.endswith("classes"):
            told["class_labels"] = LABELS
        loading = {} if name in ("grey", "classes") else TRUST
        for steps, call in json.loads((folders[name] / "sampling.json").read_text()).items():
            jobs.append([f"{name} {steps}", str(folders[name]), loading, {**told, **call}])
    output = root / "images.npz"
    child = subprocess.run(
        [sys.executable, "-c", PLAIN_DIFFUSERS, json.dumps(jobs), str(output)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(root / "modules")},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    return Opened(methods, folders, dict(np.load(output)))
