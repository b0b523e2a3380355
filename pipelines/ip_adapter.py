"""An IP-Adapter (arXiv 2308.06721) beside a stock pipeline, in the files that `load_ip_adapter` of diffusers reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

FOLDER, FILE = "ip_adapter", "ip_adapter.safetensors"
ENCODER = "image_encoder"
ENCODER_FOLDER = f"{FOLDER}/{ENCODER}"


@dataclass(frozen=True)
class IPAdapterFiles:
    """weights: `image_proj.` and `ip_adapter.` keys of IP-Adapter's authors; encoder: the network of transformers that
    embeds pictures; image_input: size in pixels, mean and std of [0, 1] of what it sees."""

    weights: Mapping[str, Tensor]
    encoder: Any
    image_input: Mapping[str, Any]

    def save_pretrained(self, folder: Path) -> None:
        place = Path(folder) / FOLDER
        place.mkdir()
        save_file({k: v.detach().cpu().contiguous() for k, v in self.weights.items()}, place / FILE)
        self.encoder.save_pretrained(place / ENCODER, safe_serialization=True)

    @property
    def stock(self) -> bool:
        """Whether pipelines embed pictures by this network themselves."""
        return isinstance(self.encoder, CLIPVisionModelWithProjection)

    @property
    def argument(self) -> str:
        """Of the pipeline's call, after `loading_lines`."""
        return "ip_adapter_image=picture" if self.stock else "ip_adapter_image_embeds=[embeds]"

    def loading_lines(self, folder: str) -> str:
        """Python that puts the adapter on `pipe`, which was loaded from `folder`, and prepares a picture."""
        without = "" if self.stock else ", image_encoder_folder=None"
        lines = [
            f'pipe.load_ip_adapter("{folder}", subfolder="{FOLDER}", weight_name="{FILE}"{without})',
            'picture = load_image("prompt.png")  # one image prompt a call',
        ]
        if not self.stock:
            kind, side = type(self.encoder).__name__, self.image_input["size"]
            mean, std = ([float(v) for v in self.image_input[k]] for k in ("mean", "std"))
            lines += [
                "",
                f"from transformers import {kind}  # and pip install timm",
                f'encoder = {kind}.from_pretrained("{folder}/{ENCODER_FOLDER}", dtype=torch.float32)',
                "pixels = pipe.image_processor.preprocess(picture) / 2 + 0.5",
                f'pixels = torch.nn.functional.interpolate(pixels, ({side}, {side}), mode="bicubic", antialias=True)',
                f"mean, std = (torch.tensor(v).view(3, 1, 1) for v in ({mean}, {std}))",
                "with torch.no_grad():",
                "    embeds = encoder((pixels.clamp(0, 1) - mean) / std).last_hidden_state.mean((2, 3))[:, None]",
            ]
        return "\n".join(lines) + "\n"
