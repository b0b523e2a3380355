"""Trains an embedded teacher stage by stage: autoencoder, text encoder, then the diffusion network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ...pipelines.export import Export, sampling_of, write_export
from ...pipelines.pipeline_edm import EDMPipeline
from ..checkpoint import write_folder
from ..config import RunConfig, load_config, read_yaml
from ..data import load_data
from ..errors import UserError
from ..runner import Runner
from ..teacher import class_of, load_edm
from .card import PIXEL_STEPS, STEPS, write_card, write_own_card, write_pixel_card

STAGES = ("autoencoder", "text_encoder", "diffusion")
PIXEL_STAGES = ("pixels",)
CONFIGS = Path(__file__).parents[2] / "configs"
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
        raise UserError(f"stages: {tree['stages']!r} has no keys; write `stages: {{pixels: ...}}`")
    pixels = "pixels" in tree["stages"]
    _check_keys("", tree, ("output_dir", "stages", *(() if pixels else ("network", "scheduler"))))
    _check_keys("stages.", tree["stages"], PIXEL_STAGES if pixels else STAGES)
    root = Path(tree["output_dir"])
    last = root / (_train_pixels if pixels else _train_latents)(root, tree)
    pipeline = halve(last / "pipeline", root / "pipeline")
    name = next((recipe for recipe in RECIPES if is_recipe(tree, recipe)), None)
    if name is not None:
        RECIPES[name](pipeline)
    else:
        stage = load_config({**tree["stages"]["pixels" if pixels else "diffusion"], "output_dir": str(root)})
        write_own_card(pipeline, root.name, stage.data, steps=PIXEL_STEPS if pixels else (STEPS,))
    return pipeline


def is_recipe(tree: dict[str, Any], name: str) -> bool:
    """Whether this is an embedded teacher's own configuration, wherever it is written to."""
    file = CONFIGS / name / "teacher.yaml"
    return file.is_file() and {**read_yaml(file), "output_dir": None} == {**tree, "output_dir": None}


def _check_keys(prefix: str, tree: dict[str, Any], wanted: tuple[str, ...]) -> None:
    for key in wanted:
        if key not in tree:
            raise UserError(
                f"{prefix}{key}: missing; see configs/emoji/teacher.yaml and configs/fashion/teacher.yaml"
            )
    for key in tree:
        if key not in wanted:
            raise UserError(f"{prefix}{key}: no such key; there are {', '.join(wanted)}")


def _train_pixels(root: Path, tree: dict[str, Any]) -> str:
    finish(load_config({**tree["stages"]["pixels"], "output_dir": str(root / "pixels")}))
    return "pixels"


def _train_latents(root: Path, tree: dict[str, Any]) -> str:
    runs = {s: load_config({**tree["stages"][s], "output_dir": str(root / s)}) for s in STAGES[:2]}
    for config in runs.values():
        finish(config)
    start = root / "start"
    if not start.is_dir():
        write_folder(start, lambda folder: assemble(runs["autoencoder"], root, tree).save_pretrained(folder))
    stage = {
        **tree["stages"]["diffusion"],
        "output_dir": str(root / "diffusion"),
        "teacher": {"path": str(start)},
    }
    finish(load_config(stage))
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
