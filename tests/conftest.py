"""Shared by all tests: no network, one thread, fixed seeds, and a tiny real Stable Diffusion folder."""

import functools
import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # a suite under nohup, which commands respect
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import numpy as np
import pytest
import torch

from .whole_files import pytest_make_collect_report  # noqa: F401

MERGES = ["c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>"]
MAX_TOKENS = 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """The global generators of random, numpy and torch start every test in the same state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that StableDiffusionPipeline loads: random weights, 16 px, 4x8x8 latents, eps prediction.

    Shared by the session: copy it before changing anything in it.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            cross_attention_dim=16,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        text_encoder = CLIPTextModel(text_config)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: Path):
    """A CLIPTokenizer of the letters and the words cat, dog and red, read from files written to `folder`."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = letters + [f"{letter}</w>" for letter in letters]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=MAX_TOKENS)


@pytest.fixture(scope="session")
def lcm_pipeline(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with an embedding of the guidance scale that does something."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler, StableDiffusionPipeline
    from fewstep.distill.models.student import with_guidance_input

    folder = tmp_path_factory.mktemp("lcm") / "pipeline"
    pipe = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = with_guidance_input(pipe.unet, 16)
        torch.nn.init.normal_(unet.time_embedding.cond_proj.weight)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    LatentConsistencyModelPipeline(
        **{**parts, "unet": unet, "scheduler": scheduler}, requires_safety_checker=False
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """tiny_families("sdxl"), sd3, flux or wan: a folder that its stock pipeline loads, random weights, 16 px."""
    from .tiny_families import saved

    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def build(name: str) -> Path:
        return saved(name, tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")), folder / name)

    return build
