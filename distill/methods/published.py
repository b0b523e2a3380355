"""What the papers give for their methods, shown beside our numbers and never mixed with them."""

from ..settings import Published

# Our protocols that these papers used, and what the pictures are made from.
CIFAR10 = ("cifar10-50k", "none")
IMAGENET64 = ("imagenet64-50k", "class")
IMAGENET256 = ("imagenet256-50k", "class")
COCO2014 = ("coco2014-30k", "caption")
COCO2017 = ("coco2017-5k", "caption")

LCD_FIGURE = "LCM, guidance scale 8: the authors' figure speed_fid.png (github.com/luosiallen/latent-consistency-model)"
LCD = tuple(
    Published("LAION-Aesthetics 768 px, SD 2.1", "FID", steps, value, LCD_FIGURE)
    for steps, value in ((1, 34.2), (2, 16.3), (4, 13.5))
)

SCOTT = (
    Published(
        "COCO 2017, 5k, 512 px, SD 1.5",
        "FID",
        2,
        21.9,
        "SCott, arXiv 2403.01505, abstract of version 4",
        COCO2017,
    ),
)

ICT_ABSTRACT = "iCT, arXiv 2310.14189, abstract"
ICT = tuple(
    Published(benchmark, "FID", steps, value, ICT_ABSTRACT, standard)
    for benchmark, values, standard in (
        ("CIFAR-10, unconditional, iCT-deep", (2.51, 2.24), CIFAR10),
        ("ImageNet 64 x 64, class-conditional, iCT-deep", (3.25, 2.77), IMAGENET64),
    )
    for steps, value in zip((1, 2), values, strict=True)
)

LCT_RESULTS = "sLCT, arXiv 2502.01441, results"
LCT = tuple(
    Published(benchmark, "FID", steps, value, LCT_RESULTS)
    for benchmark, values in (
        ("CelebA-HQ 256 x 256", (7.27, 6.93)),
        ("LSUN Church 256 x 256", (8.87, 7.71)),
        ("FFHQ 256 x 256", (8.72, 8.29)),
    )
    for steps, value in zip((1, 2), values, strict=True)
)

MEANFLOW = (
    Published(
        "ImageNet 256 x 256, class-conditional, XL/2",
        "FID",
        1,
        3.43,
        "MeanFlow, arXiv 2505.13447, abstract",
        IMAGENET256,
    ),
    Published(
        "CIFAR-10, unconditional",
        "FID",
        1,
        2.92,
        "the paper's number in the README of its code (github.com/Gsunshine/py-meanflow)",
        CIFAR10,
    ),
)

RCM_RESULTS = "rCM, arXiv 2510.08431, results"
SCM_RESULTS = "sCM, arXiv 2410.11081, results"
RCM = tuple(
    Published(benchmark, metric, steps, value, source, CIFAR10 if benchmark.startswith("CIFAR") else None)
    for benchmark, metric, source, results in (
        ("Cosmos-Predict2 0.6B, text to image", "GenEval", RCM_RESULTS, {4: 0.79, 2: 0.78, 1: 0.78}),
        ("Cosmos-Predict2 2B, text to image", "GenEval", RCM_RESULTS, {4: 0.81, 2: 0.82, 1: 0.81}),
        ("Cosmos-Predict2 14B, text to image", "GenEval", RCM_RESULTS, {4: 0.83, 2: 0.81, 1: 0.82}),
        ("Wan2.1 1.3B, 480p", "VBench total", RCM_RESULTS, {4: 84.43, 2: 84.09, 1: 82.65}),
        ("Wan2.1 14B, 480p", "VBench total", RCM_RESULTS, {4: 84.92, 2: 85.05, 1: 83.02}),
        ("CIFAR-10, unconditional, sCT", "FID", SCM_RESULTS, {1: 2.85, 2: 2.06}),
        ("CIFAR-10, unconditional, sCD", "FID", SCM_RESULTS, {1: 3.66, 2: 2.52}),
        ("ImageNet 64 x 64, XL, sCT", "FID", SCM_RESULTS, {1: 2.04, 2: 1.48}),
        ("ImageNet 64 x 64, XL, sCD", "FID", SCM_RESULTS, {1: 2.44, 2: 1.66}),
        ("ImageNet 512 x 512, XXL, sCD", "FID", SCM_RESULTS, {1: 2.28, 2: 1.88}),
    )
    for steps, value in results.items()
)

DMD2_ABSTRACT = "DMD2, arXiv 2405.14867, abstract"
DMD2 = (
    Published("ImageNet 64 x 64, class-conditional", "FID", 1, 1.28, DMD2_ABSTRACT, IMAGENET64),
    Published("zero-shot COCO 2014, SD 1.5", "FID", 1, 8.35, DMD2_ABSTRACT, COCO2014),
)

NCT_RESULTS = "NCT, arXiv 2506.19741, results with the Diff-Instruct generator of SD 1.5"
NCT_SETTING = "internal prompts, FID to the uncontrolled base model"
NCT = tuple(
    Published(f"{control}, {NCT_SETTING}", metric, 1, value, NCT_RESULTS)
    for control, results in (
        ("Canny", {"FID": 13.67, "consistency": 0.110}),
        ("HED", {"FID": 14.96, "consistency": 0.060}),
        ("depth", {"FID": 16.45, "consistency": 0.088}),
        ("super-resolution x8", {"FID": 12.17, "consistency": 0.053}),
    )
    for metric, value in results.items()
) + tuple(
    Published("image prompt, COCO-2017 5k, 4 images per prompt", metric, 1, value, NCT_RESULTS)
    for metric, value in (("CLIP-T", 0.593), ("CLIP-I", 0.821))
)

INTERLCM_AGAIN = "measured again by the authors of DMDP-FR, in their README"
INTERLCM = tuple(
    Published(f"{data}, 512 px, blind restoration", metric, 3, value, INTERLCM_AGAIN)
    for data, metric, value in (
        ("CelebA-Test", "FID", 51.524),
        ("CelebA-Test", "LPIPS", 0.398),
        ("CelebA-Test", "PSNR", 20.061),
        ("CelebA-Test", "SSIM", 0.541),
        ("LFW", "FID", 57.178),
        ("WebPhoto", "FID", 79.492),
        ("WIDER", "FID", 41.685),
    )
)

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "lcd": LCD,
    "scott": SCOTT,
    "ict": ICT,
    "lct": LCT,
    "meanflow": MEANFLOW,
    "rcm": RCM,
    "dmd2": DMD2,
    "nct": NCT,
    "interlcm": INTERLCM,
}
