"""The Inception network of FID: TensorFlow's inception-2015-12-05 graph as torch-fidelity ports it."""

import hashlib
import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..data.cache import cache_directory
from ..errors import UserError
from .extractor import Extractor

FILE = "weights-inception-2015-12-05-6726825d.pth"
SAME_FILE = "pt_inception-2015-12-05-6726825d.pth"  # as pytorch-fid publishes it, with the same hash
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 299
LAYERS = ("64", "192", "768", "2048")
TRUNK: dict[str, tuple[str, ...]] = {
    "64": ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1"),
    "192": ("Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    "768": (
        *("Mixed_5b", "Mixed_5c", "Mixed_5d"),
        *("Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ),
    "2048": ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
}


def tf1(x: Tensor) -> Tensor:
    """TensorFlow 1 bilinear, aligned origin, no antialias; (x - 128) / 128 (TTUR, EDM, ADM, torch-fidelity)."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    return (interpolate_bilinear_2d_like_tensorflow1x(x, (SIZE, SIZE), align_corners=False) - 128) / 128


def clean(x: Tensor) -> Tensor:
    """Bicubic, antialiased, unquantised, clipped; (x - 128) / 128 (clean-fid's mode clean), differentiable.

    It is Pillow's filter to 0.01 grey levels. uint8 pictures go through Pillow itself: see InceptionFID.
    """
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True).clamp(0, 255)
    return (x - 128) / 128


def pytorch(x: Tensor) -> Tensor:
    """torch bilinear, half-pixel centres, no antialias; 2x/255 - 1 (pytorch-fid, clean-fid's legacy_pytorch)."""
    return 2 * F.interpolate(x / 255, (SIZE, SIZE), mode="bilinear", align_corners=False) - 1


RESIZES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "tf1": (tf1, "299 px TF1 bilinear, aligned origin, no antialias; (x - 128) / 128"),
    "clean": (clean, "299 px PIL bicubic on float, antialiased, unquantised; (x - 128) / 128"),
    "pytorch": (pytorch, "299 px torch bilinear, no antialias; 2x / 255 - 1"),
}


def pillow_resize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, 299, 299) in [0, 255]: clean-fid's mode clean, equal to the bit."""
    planes = images.cpu().numpy().astype(np.float32).reshape(-1, *images.shape[-2:])
    resized = [Image.fromarray(p).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for p in planes]
    out = np.stack([np.asarray(p) for p in resized]).clip(0, 255)
    return torch.from_numpy(out).view(len(images), 3, SIZE, SIZE).to(images.device)


class InceptionFID(Extractor):
    """Mean-pooled features of inception-2015-12-05 after one of four stages; 2048 is pool3, that of FID.

    The name is "inception", with the first 8 digits of the hash if the weights are not the published ones, with
    the resize rule unless it is tf1, and with the layer unless it is 2048.
    """

    LAYER_TEXT: ClassVar[dict[str, str]] = {
        "64": "first max pool, mean-pooled",
        "192": "second max pool, mean-pooled",
        "768": "Mixed_6e, mean-pooled",
        "2048": "pool3",
    }

    def __init__(self, weights: Path | None = None, *, layer: int = 2048, resize: str = "tf1"):
        """`weights`: a file with torch-fidelity's keys; None looks where `find_weights` does, without a network.

        Raises UserError on an unknown layer or resize rule, and on missing or foreign files.
        """
        super().__init__()
        if str(layer) not in LAYERS:
            raise UserError(f"extractor inception: no layer {layer}; available: {', '.join(LAYERS)}")
        if resize not in RESIZES:
            raise UserError(f"extractor inception: no resize {resize!r}; available: {', '.join(RESIZES)}")
        path = weights or find_weights()
        if not path.is_file():
            raise UserError(f"{path}: no such weights file; give the path of {FILE}")
        self.weights_sha256 = sha256_of(path)
        if weights is None and self.weights_sha256 != SHA256:
            raise UserError(
                f"{path}: sha256 {self.weights_sha256[:12]}, expected {SHA256[:12]}; delete it and run "
                "`fewstep prepare-data inception`"
            )
        self.network: Any = _network(path)
        self.rule, self.num_features = resize, layer
        self.resize, self.layer = RESIZES[resize][1], f"{layer} ({self.LAYER_TEXT[str(layer)]})"
        marks = [
            "inception",
            self.weights_sha256[:8] if self.weights_sha256 != SHA256 else "",
            resize if resize != "tf1" else "",
            str(layer) if layer != 2048 else "",
        ]
        self.name = "-".join(mark for mark in marks if mark)
        self.eval()

    @property
    def is_fid(self) -> bool:
        """Whether a Frechet distance in these features is a FID: pool3 of the published weights."""
        return self.weights_sha256 == SHA256 and self.num_features == 2048

    def features(self, images: Tensor) -> Tensor:
        return self._trunk(RESIZES[self.rule][0](images * 255))

    def forward(self, images: Tensor) -> Tensor:
        if self.rule != "clean" or images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            return super().forward(images)
        return self._trunk((pillow_resize(images) - 128) / 128)

    def _trunk(self, x: Tensor) -> Tensor:
        for layer, names in TRUNK.items():
            for name in names:
                x = getattr(self.network, name)(x)
            if layer == str(self.num_features):
                break
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def inception_extractor(name: str) -> InceptionFID:
    """inception[-clean | -pytorch][-64 | -192 | -768] with the published weights. UserError for another name."""
    marks = name.split("-")[1:]
    layer = int(marks.pop()) if marks and marks[-1] in LAYERS else 2048
    resize = marks.pop() if marks and marks[-1] in RESIZES and marks[-1] != "tf1" else "tf1"
    if marks or not name.startswith("inception"):
        raise UserError(
            f"extractor: unknown name {name!r}; inception has the forms inception[-clean|-pytorch][-64|-192|-768]"
        )
    return InceptionFID(layer=layer, resize=resize)


def frechet_label(network: Extractor) -> str:
    """What a Frechet distance is printed as: "FID" for pool3 of the published weights, else FD-<extractor>."""
    if isinstance(network, InceptionFID) and network.is_fid:
        return "FID"
    return f"FD-{network.name}"


def weights_folder(directory: Path | None = None) -> Path:
    """Where prepare-data puts the weights: `directory` (default $FEWSTEP_CACHE/protocols)/inception."""
    return (directory or cache_directory() / "protocols") / "inception"


def find_weights(directory: Path | None = None) -> Path:
    """The prepared weights, else those in torch's hub cache. Raises UserError, and never fetches, without any."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    places = [weights_folder(directory) / FILE, hub / FILE, hub / SAME_FILE]
    for place in places:
        if place.is_file():
            return place
    raise UserError(
        f"extractor inception: no weights {FILE} in {places[0].parent} or {hub}; run "
        "`fewstep prepare-data inception` with a network, or with --weights PATH"
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file, read once a process for each size and time of change."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _network(path: Path) -> Any:
    """torch-fidelity's network with the file's weights, which are read without running any code in the file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        safe = io.BytesIO()
        torch.save(weights, safe)
        safe.seek(0)
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=safe)
    except Exception as error:
        reason = " ".join(str(error).split())[:100]
        raise UserError(f"{path}: not inception-2015-12-05 weights ({reason}); give {FILE}") from None
