"""The fixture that other tests stand on is a real Stable Diffusion folder."""

from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline


def sample(pipeline: StableDiffusionPipeline, prompt: str, guidance_scale: float) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    return pipeline(
        prompt, num_inference_steps=2, guidance_scale=guidance_scale, generator=generator, output_type="np"
    ).images


def test_stock_pipeline_loads_and_samples_it(tiny_pipeline: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline)
    cat = sample(pipeline, "red cat", 3.0)
    assert cat.shape == (1, 16, 16, 3)
    assert cat.std() > 0.01
    again = sample(StableDiffusionPipeline.from_pretrained(tiny_pipeline), "red cat", 3.0)
    assert np.array_equal(cat, again)
    assert np.abs(cat - sample(pipeline, "red dog", 3.0)).max() > 1e-4


def test_tokenizer_merges_its_words_and_pads_to_its_length(tiny_pipeline: Path) -> None:
    tokenizer = StableDiffusionPipeline.from_pretrained(tiny_pipeline).tokenizer
    tokens = tokenizer("Red cat go", padding="max_length", truncation=True).input_ids
    words = ["<|startoftext|>", "red</w>", "cat</w>", "g", "o</w>", "<|endoftext|>"]
    assert tokenizer.convert_ids_to_tokens(tokens) == words + ["<|endoftext|>"] * 6
