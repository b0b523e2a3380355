"""PatchGAN: a convolutional discriminator of pictures (arXiv 1611.07004, as VQGAN, arXiv 2012.09841, has it)."""

from torch import nn

from ...errors import UserError
from .settings import PatchSettings


class PatchDiscriminator(nn.Sequential):
    """Pictures (B, 3, H, W) to logits of overlapping patches (B, 1, h, w); batch norms by the batch's own moments."""

    def __init__(self, chosen: PatchSettings, resolution: int):
        if resolution >> chosen.layers < 3:  # two layers without a stride take a pixel each
            raise UserError(
                f"method.discriminator.layers: {chosen.layers} leave nothing of {resolution} pixels; give fewer"
            )
        inner = nn.Conv2d(3, chosen.width, 4, stride=2, padding=1)
        layers: list[nn.Module] = [inner, nn.LeakyReLU(0.2)]
        width = chosen.width
        for i in range(1, chosen.layers + 1):
            out = chosen.width * min(2**i, 8)
            layers += [
                nn.Conv2d(width, out, 4, stride=2 if i < chosen.layers else 1, padding=1, bias=False),
                nn.BatchNorm2d(out, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            width = out
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
