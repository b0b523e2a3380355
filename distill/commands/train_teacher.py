"""Trains an embedded teacher stage by stage: autoencoder, text encoder, then the diffusion network."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ...pipelines.export import Export, sampling_of, write_export
from ...pipelines.pipeline_edm import EDMPipeline
from ..catalog.configuration import load_config
from ..catalog.recipes import CONFIGS
from ..config.nearest import hint
from ..config.run import RunConfig
from ..config.tree import read_yaml
from ..config.validation import shown
from ..data.sources import load_data
from ..errors import UserError
from ..models.teacher import class_of, load_edm
from ..pretrain.card import PIXEL_STEPS, STEPS, write_card, write_own_card, write_pixel_card
from ..training.run_folder import RunFolder
from ..training.run_lock import locked
from ..training.runner import Runner
from ..writers import recover, write_folder

STAGES = ("autoencoder", "text_encoder", "diffusion")
PIXEL_STAGES = ("pixels",)
RECIPES: dict[str, Callable[[Path], Any]] = {  # of the embedded teachers
    "emoji": write_card,
    "fashion": write_pixel_card,
}


def train(tree: dict[str, Any]) -> Path:
    """The stages of a teacher configuration, each a run folder below output_dir that resumes by itself.

    tree: output_dir and stages, run configurations without output_dir: either {pixels}; or {autoencoder, text_encoder,
    diffusion}, beside network (UNet2DConditionModel's arguments) and scheduler (DDIMScheduler's arguments).
    Returns the pipeline folder, in float16. Raises UserError for missing and unknown keys.
    """
    for key in ("output_dir", "stages"):
        if not tree.get(key):
            raise UserError(
                f"{key}: missing; see configs/emoji/teacher.yaml and configs/fashion/teacher.yaml"
            )
    if not isinstance(tree["stages"], dict):
        raise UserError(f"stages: {shown(tree['stages'])} has no keys; write `stages: {{pixels: ...}}`")
    pixels = "pixels" in tree["stages"]
    _check_keys("", tree, ("output_dir", "stages", *(() if pixels else ("network", "scheduler"))))
    _check_keys("stages.", tree["stages"], PIXEL_STAGES if pixels else STAGES)
    root = Path(str(tree["output_dir"]))
    if not pixels:
        _check_arguments("network", UNet2DConditionModel, tree["network"])
        _check_arguments("scheduler", DDIMScheduler, tree["scheduler"])
    stages = _stages(root, tree["stages"])
    with locked(root):
        recover(root)
        last = root / (_train_pixels if pixels else _train_latents)(root, tree, stages)
        pipeline = halve(last / "pipeline", root / "pipeline")
        name = next((recipe for recipe in RECIPES if is_recipe(tree, recipe)), None)
        if name is not None:
            RECIPES[name](pipeline)
        else:
            stage = stages["pixels" if pixels else "diffusion"]
            write_own_card(pipeline, root.name, stage.data, steps=PIXEL_STEPS if pixels else (STEPS,))
    return pipeline


def is_recipe(tree: dict[str, Any], name: str) -> bool:
    """Whether this is an embedded teacher's own configuration, wherever it is written to."""
    file = CONFIGS / name / "teacher.yaml"
    return file.is_file() and {**read_yaml(file), "output_dir": None} == {**tree, "output_dir": None}


def _stages(root: Path, trees: dict[str, Any]) -> dict[str, RunConfig]:
    """The configuration of every stage, before the first of them takes its hours."""
    out = {}
    for name, tree in trees.items():
        if not isinstance(tree, dict):
            raise UserError(
                f"stages.{name}: {shown(tree)} has no keys; write `stages: {{{name}: {{method: ...}}}}`"
            )
        placed: dict[str, Any] = {"output_dir": str(root / name)}
        if name == "diffusion":
            placed["teacher"] = {"path": str(root / "start")}
        for key in placed:
            if key in tree:
                raise UserError(f"stages.{name}.{key}: follows from output_dir; leave it out")
        out[name] = load_config({**tree, **placed}, f"stages.{name}.")
    return out


def _check_keys(prefix: str, tree: dict[str, Any], wanted: tuple[str, ...]) -> None:
    for key in wanted:
        if key not in tree:
            raise UserError(
                f"{prefix}{key}: missing; see configs/emoji/teacher.yaml and configs/fashion/teacher.yaml"
            )
    for key in tree:
        if key not in wanted:
            raise UserError(f"{prefix}{key}: no such key; {hint(str(key), wanted)}")


def _check_arguments(key: str, cls: Any, given: Any) -> None:
    """UserError for what the class does not take."""
    if not isinstance(given, dict):
        raise UserError(f"{key}: {shown(given)} has no keys; give the arguments of diffusers' {cls.__name__}")
    known = [name for name in signature(cls).parameters if not name.startswith("_")]
    for name in given:
        if name not in known:
            raise UserError(f"{key}.{name}: {cls.__name__} takes no such argument; {hint(str(name), known)}")


def _train_pixels(root: Path, tree: dict[str, Any], stages: dict[str, RunConfig]) -> str:
    finish(stages["pixels"])
    return "pixels"


def _train_latents(root: Path, tree: dict[str, Any], stages: dict[str, RunConfig]) -> str:
    for name in STAGES[:2]:
        finish(stages[name])
    start = root / "start"
    # Before the network's first checkpoint another `network` or `scheduler` may have been meant.
    if not start.is_dir() or not RunFolder(stages["diffusion"]).binding():
        pipeline = assemble(stages["autoencoder"], root, tree)
        write_folder(start, lambda folder: pipeline.save_pretrained(folder))
    finish(stages["diffusion"])
    return "diffusion"


def finish(config: RunConfig) -> None:
    runner = Runner(config)
    if not runner.finished():
        runner.train()


def assemble(autoencoder: RunConfig, root: Path, tree: dict[str, Any]) -> StableDiffusionPipeline:
    """The trained parts around a new network; the latents' scale is set so that they have unit variance."""
    vae = AutoencoderKL.from_pretrained(root / "autoencoder" / "pipeline")
    text = root / "text_encoder" / "pipeline"
    data = autoencoder.data
    assert autoencoder.resolution is not None
    images = load_data(data.name, split=data.split, resolution=autoencoder.resolution).images()
    with torch.no_grad():
        std = torch.cat(
            [vae.encode(x.float() / 127.5 - 1).latent_dist.sample() for x in images.split(256)]
        ).std()
    vae.register_to_config(scaling_factor=round(1 / float(std), 5))
    torch.manual_seed(0)
    encoder = CLIPTextModel.from_pretrained(text)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(text),
        unet=UNet2DConditionModel(cross_attention_dim=encoder.config.hidden_size, **tree["network"]),
        scheduler=DDIMScheduler(**tree["scheduler"]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def halve(source: Path, target: Path) -> Path:
    """The same pipeline in float16 safetensors, with its sampling.json and card."""
    pipeline: Any
    if class_of(str(source)) == EDMPipeline.__name__:
        pipeline = load_edm(str(source), dtype=torch.float16)
    else:
        pipeline = StableDiffusionPipeline.from_pretrained(source, dtype=torch.float16)
    card = (source / "README.md").read_text()
    export = Export(pipeline, sampling=sampling_of(source))
    write_folder(target, lambda folder: write_export(export, folder, card))
    return target
