"""The named protocols, each value with where it is stated.

"code" names a public repository and files that were read. No published hash of a reference file was found: the first
fetch pins it. The one hash of a prompt file is that of its bytes at the commit in its address.
"""

from ..errors import UserError
from .archives import Crop
from .fetched_files import RemoteFile
from .standards import Standard, Stated

EDM = "code NVlabs/edm fid.py, generate.py, README.md"
ADM = "code openai/guided-diffusion evaluations/README.md, evaluator.py"
DMD2 = "code tianweiy/DMD2 main/coco_eval/coco_evaluator.py, main/test_folder_sd.py, experiments/sdv1.5/README.md"
QSCHED = "code enyac-group/q-sched src/MJHQ.py, src/eval_dataset.py, env.yml"
MEANFLOW = "code zhuyu-cs/MeanFlow evaluate.py"
SCOTT = "SCott's abstract gives the set and the count alone"
COCO = "COCO's own download page"
IMAGENET_TRAIN = 1_281_167

CIFAR10 = Standard(
    name="cifar10-50k",
    num_images=Stated(50_000, EDM),
    image_size=Stated(32, EDM),
    crop=Stated(Crop(), EDM + ": pictures go to the detector as they are"),
    quantisation=Stated("round", EDM + ": (127.5 x + 128).clip(0, 255)"),
    extractor=Stated("inception", EDM + ": inception-2015-12-05 with TF1 resize in its graph"),
    reference=Stated(
        RemoteFile(
            "cifar10-32x32.npz", "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz", EDM
        ),
        EDM,
    ),
    keys=("mu", "sigma"),
    n_ref=Stated(50_000, "all of CIFAR-10's training split: " + EDM),
    conditioning=Stated("label uniform at random from picture i's seed, or none", EDM),
    num_classes=Stated(10, "CIFAR-10"),
    others="clean-fid publishes cifar10_{clean,legacy_tensorflow,legacy_pytorch}_{train,test}_32.npz",
)

IMAGENET64 = Standard(
    name="imagenet64-50k",
    num_images=Stated(50_000, EDM),
    image_size=Stated(64, EDM),
    crop=Stated(Crop(), EDM + ": pictures go to the detector as they are"),
    quantisation=Stated("round", EDM + "; consistency_models and CTM truncate"),
    extractor=Stated("inception", EDM + ": inception-2015-12-05 with TF1 resize in its graph"),
    reference=Stated(
        RemoteFile(
            "imagenet-64x64.npz", "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz", EDM
        ),
        EDM,
    ),
    keys=("mu", "sigma"),
    n_ref=Stated(IMAGENET_TRAIN, "all of ImageNet's training split, centre-cropped to 64: " + EDM),
    conditioning=Stated(
        "label uniform at random from picture i's seed", EDM + "; other papers balance the classes", False
    ),
    num_classes=Stated(1000, "ImageNet"),
    others="EDM2's dataset-refs/img64.pkl (FastGen, sCM) and ADM's VIRTUAL_imagenet64_labeled.npz (consistency "
    "models, CTM) are other references, EDM's imagenet-64x64-baseline.npz that of ADM's model",
)

IMAGENET256 = Standard(
    name="imagenet256-50k",
    num_images=Stated(50_000, ADM),
    image_size=Stated(256, ADM),
    crop=Stated(Crop(), ADM + ": pictures go to the network as they are"),
    quantisation=Stated(
        "truncate", MEANFLOW + ": clamp(255 (x + 1) / 2) to uint8; other papers round", False
    ),
    extractor=Stated(
        "inception", ADM + ": the TensorFlow graph, whose TF1 resize and weights torch-fidelity ports"
    ),
    reference=Stated(
        RemoteFile(
            "VIRTUAL_imagenet256_labeled.npz",
            "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
            "VIRTUAL_imagenet256_labeled.npz",
            ADM,
        ),
        ADM + "; MeanFlow reads adm_in256_stats.npz",
    ),
    keys=("mu", "sigma"),
    n_ref=Stated(IMAGENET_TRAIN, "statistics over the whole dataset: " + ADM),
    conditioning=Stated(
        "label uniform at random", MEANFLOW + "; other papers make 50 of each class", established=False
    ),
    num_classes=Stated(1000, "ImageNet"),
    others="MeanFlow in JAX uses statistics of its own (keys ref_mu, ref_sigma)",
)

COCO_CROP = Crop(square=True, side=256)
COCO2014 = Standard(
    name="coco2014-30k",
    num_images=Stated(30_000, DMD2),
    image_size=Stated(512, DMD2),
    crop=Stated(COCO_CROP, DMD2 + ": on both sides"),
    quantisation=Stated("truncate", DMD2),
    extractor=Stated("inception-clean", DMD2 + ": clean-fid, mode clean"),
    reference=Stated(
        RemoteFile(
            "val2014.zip", "http://images.cocodataset.org/zips/val2014.zip", COCO, option="--pictures"
        ),
        DMD2 + ": all of val2014 (its own copy lies on its hub page)",
    ),
    members=Stated("val2014/*.jpg", DMD2),
    n_ref=Stated(40_504, "COCO 2014 validation split"),
    conditioning=Stated("caption i", DMD2),
    prompts=Stated(
        RemoteFile(
            "captions_coco14_test.txt",
            "https://raw.githubusercontent.com/tianweiy/DMD2/4e54501cbe96b31f8a90f15aae3d4e6658b6001c/"
            "main/coco_eval/captions_coco14_test.txt",
            DMD2,
            sha256="edabd2a556026cbf5d36a5fffa35ad43d7ba71b72f6d640b727c1edefb7f1945",
            option="--prompts",
        ),
        "the text file of the repository; DMD2's scripts read a pickle of the same name, not compared",
        established=False,
    ),
    prompts_rule=Stated("lines", DMD2),
)

COCO2017 = Standard(
    name="coco2017-5k",
    num_images=Stated(5_000, SCOTT),
    image_size=Stated(512, SCOTT, established=False),
    crop=Stated(COCO_CROP, SCOTT + "; as coco2014-30k", established=False),
    quantisation=Stated("round", SCOTT + "; as diffusers pipelines", established=False),
    extractor=Stated("inception-clean", SCOTT + "; as coco2014-30k", established=False),
    reference=Stated(
        RemoteFile(
            "val2017.zip", "http://images.cocodataset.org/zips/val2017.zip", COCO, option="--pictures"
        ),
        SCOTT,
    ),
    members=Stated("val2017/*.jpg", "all of val2017; " + SCOTT),
    n_ref=Stated(5_000, "COCO 2017 validation split"),
    conditioning=Stated("caption i", SCOTT),
    prompts=Stated(
        RemoteFile(
            "annotations_trainval2017.zip",
            "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            COCO,
            option="--prompts",
        ),
        "COCO's own captions",
    ),
    prompts_rule=Stated("coco2017", SCOTT + "; first caption of each image by id", established=False),
)

MJHQ = Standard(
    name="mjhq-5k",
    num_images=Stated(5_000, QSCHED),
    image_size=Stated(1024, QSCHED + ": 512 or 1024 by model", established=False),
    crop=Stated(Crop(), QSCHED + ": none in the code read; real pictures as stored", established=False),
    quantisation=Stated("round", QSCHED + ": diffusers pipelines' PIL output"),
    extractor=Stated("inception-pytorch", QSCHED + ": pytorch-fid 0.3.0"),
    reference=Stated(
        RemoteFile(
            "mjhq30k_imgs.zip",
            "https://huggingface.co/datasets/playgroundai/MJHQ-30K/resolve/main/mjhq30k_imgs.zip",
            QSCHED,
            option="--pictures",
        ),
        QSCHED,
    ),
    members=Stated("mjhq", QSCHED + ": a statistics file that is not published; here the same 5,000", False),
    n_ref=Stated(5_000, "as members", established=False),
    conditioning=Stated("caption i", QSCHED),
    prompts=Stated(
        RemoteFile(
            "meta_data.json",
            "https://huggingface.co/datasets/playgroundai/MJHQ-30K/resolve/main/meta_data.json",
            QSCHED,
            option="--prompts",
        ),
        QSCHED,
    ),
    prompts_rule=Stated("mjhq", QSCHED + ": random.Random(0).shuffle, first 5,000, sort"),
)

STANDARDS = {s.name: s for s in (CIFAR10, IMAGENET64, IMAGENET256, COCO2014, COCO2017, MJHQ)}


def get_standard(name: str) -> Standard:
    """The protocol of that name. Raises UserError that lists them for another."""
    from .table import STANDARDS

    if name not in STANDARDS:
        raise UserError(f"protocol: no {name!r}; available: {', '.join(STANDARDS)}")
    return STANDARDS[name]
