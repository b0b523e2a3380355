"""Trains an embedded teacher stage by stage: autoencoder, text encoder, then the diffusion network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from ...pipelines.export import Export, sampling_of, write_export
from ...pipelines.pipeline_edm import EDMPipeline
from ..catalog.recipes import CONFIGS
from ..config.run import RunConfig
from ..config.tree import read_yaml
from ..data.images import ImageData
from ..data.sources import load_data
from ..models.teacher import class_of, load_edm
from ..pretrain.card import PIXEL_STEPS, STEPS, write_card, write_own_card, write_pixel_card
from ..pretrain.text_encoder import distinct
from ..reports.trained_on import DEFAULTS
from ..scorers.minilm import minilm_folder
from ..training.run_folder import RunFolder
from ..training.run_lock import locked
from ..training.runner import Runner
from ..writers import recover, write_folder
from .teacher_stages import STAGES, is_pixels, network_of, shared_of, stages_of

MOST_PICTURES, PIXELS_AT_ONCE = 4096, 256 * 32**2  # of which the latents' scale is measured
RECIPES: dict[str, Callable[[Path], Any]] = {  # of the embedded teachers
    "emoji": write_card,
    "fashion": write_pixel_card,
}


def train(tree: dict[str, Any]) -> Path:
    """The stages of a teacher configuration, each a run folder below output_dir that resumes by itself.

    tree: output_dir; data and resolution, of every stage; name and license, of the card; and stages, run configurations
    without output_dir: either {pixels}; or {autoencoder, text_encoder, diffusion}, beside network
    (UNet2DConditionModel's arguments) and scheduler (DDIMScheduler's arguments).
    Returns the pipeline folder, in float16. Raises UserError for what the caller can mend.
    """
    shared = shared_of(tree)
    stages, pixels = stages_of(tree), is_pixels(tree)
    root = Path(str(tree["output_dir"]))
    network = {} if pixels else network_of(tree, stages)
    if not pixels and not (root / "text_encoder" / "pipeline").is_dir():
        minilm_folder()
        distinct(rows_of_stage(stages["text_encoder"]).captions)
    with locked(root):
        recover(root)
        last = root / (_train_pixels(stages) if pixels else _train_latents(root, network, tree, stages))
        pipeline = halve(last / "pipeline", root / "pipeline")
        name = next((recipe for recipe in RECIPES if is_recipe(tree, recipe)), None)
        if name is not None:
            RECIPES[name](pipeline)
        else:
            stage = stages["pixels" if pixels else "diffusion"]
            steps = PIXEL_STEPS if pixels else (STEPS,)
            write_own_card(
                pipeline, shared.name or root.name, stage.data, license=shared.license, steps=steps
            )
    return pipeline


def is_recipe(tree: dict[str, Any], name: str) -> bool:
    """Whether this is an embedded teacher's own configuration, wherever it is written to."""
    file = CONFIGS / name / "teacher.yaml"
    return file.is_file() and {**read_yaml(file), "output_dir": None} == {**tree, "output_dir": None}


def rows_of_stage(config: RunConfig) -> ImageData:
    """The training pictures of a stage."""
    data = config.data
    assert config.resolution is not None
    return load_data(
        data.name,
        split=data.split,
        resolution=config.resolution,
        **{k: getattr(data, k) for k in DEFAULTS},
    )


def _train_pixels(stages: dict[str, RunConfig]) -> str:
    finish(stages["pixels"])
    return "pixels"


def _train_latents(
    root: Path, network: dict[str, Any], tree: dict[str, Any], stages: dict[str, RunConfig]
) -> str:
    for name in STAGES[:2]:
        finish(stages[name])
    start = root / "start"
    # Before the network's first checkpoint another `network` or `scheduler` may have been meant.
    if not start.is_dir() or not RunFolder(stages["diffusion"]).binding():
        pipeline = assemble(stages["autoencoder"], root, network, tree["scheduler"])
        write_folder(start, lambda folder: pipeline.save_pretrained(folder))
    finish(stages["diffusion"])
    return "diffusion"


def finish(config: RunConfig) -> None:
    runner = Runner(config)
    if not runner.finished():
        runner.train()


@torch.no_grad()
def unit_scale(vae: AutoencoderKL, config: RunConfig) -> float:
    """What the latents of a stage's pictures, of MOST_PICTURES at most, are multiplied by for a variance of one."""
    data = rows_of_stage(config)
    chosen = range(0, len(data), -(-len(data) // MOST_PICTURES))
    at_once = max(1, PIXELS_AT_ONCE // data.resolution**2)
    parts = (chosen[i : i + at_once] for i in range(0, len(chosen), at_once))
    latents = [vae.encode(data.images(part).float() / 127.5 - 1).latent_dist.sample() for part in parts]
    return round(1 / float(torch.cat(latents).std()), 5)


def assemble(
    autoencoder: RunConfig, root: Path, network: dict[str, Any], scheduler: dict[str, Any]
) -> StableDiffusionPipeline:
    """The trained parts around a new network; the latents' scale is set so that they have unit variance."""
    vae = AutoencoderKL.from_pretrained(root / "autoencoder" / "pipeline")
    text = root / "text_encoder" / "pipeline"
    vae.register_to_config(scaling_factor=unit_scale(vae, autoencoder))
    torch.manual_seed(0)
    encoder = CLIPTextModel.from_pretrained(text)
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(text),
        unet=UNet2DConditionModel(cross_attention_dim=encoder.config.hidden_size, **network),
        scheduler=DDIMScheduler(**scheduler),
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
