"""Whether the parts of a latent teacher fit each other: read from their configurations before anything is encoded."""

from typing import Any

from ..errors import UserError
from .codec import vae_scale_factor
from .families.base import Family

Size = int | list[int] | tuple[int, ...] | None
REMEDY = "give a text-to-image teacher"


def check_parts(family: Family, path: str, latent_channels: int) -> None:
    """UserError for a network that is told other things than latents, time and prompts, or gives more than one output
    for each of them, and for encoders that it was not trained with."""
    missing = [n for n in family.encoders if n not in family.optional and getattr(family.pipeline, n) is None]
    if missing:
        raise UserError(f"teacher.path: {path} has no {missing[0]}; save the pipeline with its {missing[0]}")
    taken, given = family.channels()
    if taken != latent_channels:
        raise UserError(
            f"teacher.path: {path}: its network takes {taken} channels, its autoencoder's latents have "
            f"{latent_channels} (networks for inpainting or editing take more); {REMEDY}"
        )
    if given != latent_channels:
        raise UserError(
            f"teacher.path: {path}: its network gives {given} channels for latents of {latent_channels} (a learned "
            "variance doubles them); give a teacher that predicts the mean alone"
        )
    config = family.network.config
    for key in ("num_class_embeds", "class_embed_type", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise UserError(f"teacher.path: {path}: its network has {key} {config[key]}; {REMEDY} without it")
    if config.get("addition_embed_type") != family.addition:
        raise UserError(
            f"teacher.path: {path}: its network has addition_embed_type {config.get('addition_embed_type')}, a "
            f"{type(family.pipeline).__name__} tells it {family.addition}; {REMEDY} whose parts belong together"
        )
    for key, (wanted, width) in family.widths().items():
        if wanted is not None and wanted != width:
            raise UserError(
                f"teacher.path: {path}: its network's {key} is {wanted}, its text encoders give {width}; save the "
                "network with the text encoders that it was trained with"
            )
    for name in family.encoders:
        check_tokenizer(family.pipeline, name, path)


def check_tokenizer(pipeline: Any, encoder: str, path: str) -> None:
    """UserError for a tokenizer that pads to more places than its text encoder has."""
    name = encoder.replace("text_encoder", "tokenizer")
    tokenizer = getattr(pipeline, name, None)  # there is none in a plan
    places = getattr(getattr(getattr(pipeline, encoder), "config", None), "max_position_embeddings", None)
    if tokenizer is None or places is None or tokenizer.model_max_length <= places:
        return
    length = tokenizer.model_max_length
    raise UserError(
        f"teacher.path: {path}: its {name} has model_max_length {length if length < 1e6 else 'none'}, its {encoder} "
        f"{places} places; set it to {places} in {name}/tokenizer_config.json"
    )


def settle_side(network: Any, vae: Any, resolution: int | None, path: str) -> None:
    """Writes one number for the side of a network's samples, where its configuration has two equal ones, or none.

    None: the side of `resolution`, else that of the autoencoder's pictures. UserError for sides that differ.
    """
    if "sample_size" not in network.config:
        return
    side = one_side(network.config.sample_size, path, "network")
    if side is None:
        pixels = resolution or one_side(vae.config.get("sample_size"), path, "autoencoder")
        if pixels is None:
            raise UserError(
                f"resolution: missing; {path} has no sample_size: say the side of its pictures in pixels"
            )
        side = pixels // vae_scale_factor(vae)
    if network.config.sample_size != side:
        network.register_to_config(sample_size=side)


def one_side(size: Size, path: str, part: str) -> int | None:
    sides = [size] if size is None or isinstance(size, int) else list(size)
    if len(set(sides)) != 1:
        raise UserError(
            f"teacher.path: {path}: its {part}'s sample_size is {sides}; pictures here are square: give a square one"
        )
    return sides[0]
