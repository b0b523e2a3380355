"""Numbers that others published, from files that anyone can fetch: what verify-metrics reproduces."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from .archives import Crop, all_pictures, cifar10_pictures, npz_pictures, zip_pictures
from .fetched_files import RemoteFile
from .table import CIFAR10, IMAGENET256


@dataclass(frozen=True)
class Side:
    """One of the two sets: a file and how to read it.

    kind   "statistics" (.npz with mu, sigma of `count` pictures), "zip" (all its pictures), "npz" (arr_0) or
           "cifar10" (the first `count` of `split`)
    """

    kind: Literal["statistics", "zip", "npz", "cifar10"]
    file: RemoteFile
    count: int = 0
    split: str = ""

    def pictures(self, path: Path) -> Iterator[Tensor]:
        """uint8 (3, H, W) each, as stored."""
        if self.kind == "zip":
            return zip_pictures(path, all_pictures(), Crop())
        if self.kind == "npz":
            return npz_pictures(path)
        assert self.kind == "cifar10"
        return cifar10_pictures(path, self.split, self.count)


@dataclass(frozen=True)
class Check:
    """Frechet distance of two sets by extractor name, within an absolute tolerance.

    `published` is False for a value that follows from what the files are; `source` says why or where.
    """

    name: str
    a: Side
    b: Side
    values: dict[str, float]
    tolerance: float
    published: bool
    source: str

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """Without repetition."""
        return tuple(dict.fromkeys((self.a.file, self.b.file)))


CLEANFID = "code GaParmar/clean-fid tests/src/1_cmp_folders.py, .github/workflows/t1_fid_folders.yml"
CIFAR_ARCHIVE = RemoteFile(
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "CIFAR-10's page; hash as in code keras-team/keras datasets/cifar10",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
    option="--pictures",
)


def _cleanfid(name: str) -> Side:
    address = f"https://www.cs.cmu.edu/~clean-fid/tests/{name}.zip"
    return Side("zip", RemoteFile(f"{name}.zip", address, CLEANFID, option="--pictures"))


FOLDERS = Check(
    name="cleanfid-folders",
    a=_cleanfid("folder_real"),
    b=_cleanfid("folder_fake"),
    values={"inception-clean": 75.1679, "inception": 76.9118, "inception-pytorch": 77.2019},
    tolerance=0.05,
    published=True,
    source=CLEANFID
    + ": within 1e-3 there; fewer pictures than features, so their sqrtm rounds; the modes differ "
    "by 0.29 or more",
)
CIFAR_HALVES = Check(
    name="cifar10-5k",
    a=Side("cifar10", CIFAR_ARCHIVE, 5_000, "train"),
    b=Side("cifar10", CIFAR_ARCHIVE, 5_000, "test"),
    values={"inception": 10.3233274},
    tolerance=1e-3,
    published=True,
    source="code toshas/torch-fidelity tests/precision/test_metric_fid_fidelity.py: first 5,000 of each split",
)
ADM_BATCH = Check(
    name="adm-imagenet256",
    a=Side("statistics", IMAGENET256.reference.value, IMAGENET256.n_ref.value),
    b=Side(
        "npz",
        RemoteFile(
            "admnet_guided_upsampled_imagenet256.npz",
            "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
            "admnet_guided_upsampled_imagenet256.npz",
            "code openai/guided-diffusion evaluations/README.md",
            option="--pictures",
        ),
    ),
    values={"inception": 3.9425574129223264},
    tolerance=0.02,
    published=True,
    source="code openai/guided-diffusion evaluations/README.md, in TensorFlow; 0.5 % for the port",
)
CIFAR_STATISTICS = Check(
    name="cifar10-statistics",
    a=Side("statistics", CIFAR10.reference.value, CIFAR10.n_ref.value),
    b=Side(
        "statistics",
        RemoteFile(
            "cifar10_legacy_tensorflow_train_32.npz",
            "https://www.cs.cmu.edu/~clean-fid/stats/cifar10_legacy_tensorflow_train_32.npz",
            "code GaParmar/clean-fid cleanfid/features.py",
            option="--pictures",
        ),
        50_000,
    ),
    values={"inception": 0.0},
    tolerance=0.01,
    published=False,
    source="two parties' statistics of the same 50,000 pictures under the same extractor: 0 but for rounding",
)

CHECKS = {check.name: check for check in (FOLDERS, CIFAR_HALVES, ADM_BATCH, CIFAR_STATISTICS)}
