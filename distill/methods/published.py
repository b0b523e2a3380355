"""What the papers give for their methods, shown beside our numbers and never mixed with them."""

from ..settings import Published

# Our protocols that these papers used, and what the pictures are made from.
CIFAR10 = ("cifar10-50k", "none")
IMAGENET64 = ("imagenet64-50k", "class")
IMAGENET256 = ("imagenet256-50k", "class")
COCO2014 = ("coco2014-30k", "caption")
COCO2017 = ("coco2017-5k", "caption")
MJHQ = ("mjhq-5k", "caption")

LCD_TABLE = "LCM paper, guidance scale 8, SD 2.1; {}"
LCD = tuple(
    Published(f"LAION-Aesthetics {side} px", "FID", steps, value, LCD_TABLE.format(certainty))
    for side, values, certainty in (
        (768, (34.2, 16.3, 13.5), "values recalled, in agreement with the repository's speed_fid.png"),
        (512, (35.4, 13.3, 11.1), "values recalled, not checked"),
    )
    for steps, value in zip((1, 2, 4), values, strict=True)
)

RG_LCD_SECOND_HAND = "RG-LCD with ImageReward, {}; quoted by a third party, the paper's table was not read"
RG_LCD = (
    Published("MS-COCO (presumed), SD 2.1", "FID", 4, 42.7, RG_LCD_SECOND_HAND.format("direct")),
    Published(
        "MS-COCO (presumed), SD 2.1", "FID", 4, 17.2, RG_LCD_SECOND_HAND.format("through the latent proxy")
    ),
)

SCOTT_SECOND_HAND = "SCott, a summary of the paper; the paper's table was not read"
SCOTT = (
    Published(
        "COCO 2017, 5k, 512 px, SD 1.5", "FID", 2, 21.9, "SCott paper, abstract of its last version", COCO2017
    ),
    Published("COCO 2014, 30k, 512 px, SD 1.5", "FID", 2, 11.13, SCOTT_SECOND_HAND, COCO2014),
    Published("COCO 2014, 30k, 512 px, SD 1.5", "FID", 4, 10.68, SCOTT_SECOND_HAND, COCO2014),
    Published("MJHQ, 5k, SD 1.5", "FID", 2, 24.9, SCOTT_SECOND_HAND, MJHQ),
)

ICT_RECALLED = "iCT paper, table {}; recalled, not re-read"
ICT = tuple(
    Published(benchmark, "FID", steps, value, ICT_RECALLED.format(table), standard)
    for benchmark, table, values, standard in (
        ("CIFAR-10, unconditional", "2", (2.83, 2.46), CIFAR10),
        ("ImageNet 64 x 64, class-conditional", "3", (4.02, 3.20), IMAGENET64),
    )
    for steps, value in zip((1, 2), values, strict=True)
)

LCT_READ = "sLCT paper, 1 / 2 steps, as a stored copy of its tables has them"
LCT = tuple(
    Published(benchmark, "FID", steps, value, LCT_READ)
    for benchmark, values in (
        ("CelebA-HQ 256 x 256", (7.27, 6.93)),
        ("LSUN Church 256 x 256", (8.87, 7.71)),
        ("FFHQ 256 x 256", (8.72, 8.29)),
    )
    for steps, value in zip((1, 2), values, strict=True)
)

MEANFLOW = tuple(
    Published(benchmark, "FID", steps, value, f"MeanFlow paper; {certainty}", standard)
    for benchmark, steps, value, certainty, standard in (
        ("ImageNet 256 x 256, class-conditional, XL/2", 1, 3.43, "abstract", IMAGENET256),
        ("ImageNet 256 x 256, class-conditional, XL/2", 2, 2.93, "at second hand, not checked", IMAGENET256),
        ("CIFAR-10, unconditional", 1, 2.92, "FID of the paper as its code's README gives it", CIFAR10),
    )
)

RCM_TABLE = "rCM paper, results; read in its stored text"
SCM_TABLE = "sCM paper; read in its stored text"
RCM = tuple(
    Published(benchmark, metric, steps, value, source, CIFAR10 if benchmark.startswith("CIFAR") else None)
    for benchmark, metric, source, results in (
        ("Cosmos-Predict2 0.6B, text to image", "GenEval", RCM_TABLE, {4: 0.79, 2: 0.78, 1: 0.78}),
        ("Cosmos-Predict2 2B, text to image", "GenEval", RCM_TABLE, {4: 0.81, 2: 0.82, 1: 0.81}),
        ("Cosmos-Predict2 14B, text to image", "GenEval", RCM_TABLE, {4: 0.83, 2: 0.81, 1: 0.82}),
        ("Wan2.1 1.3B, 480p", "VBench total", RCM_TABLE, {4: 84.43, 2: 84.09, 1: 82.65}),
        ("Wan2.1 14B, 480p", "VBench total", RCM_TABLE, {4: 84.92, 2: 85.05, 1: 83.02}),
        ("CIFAR-10, unconditional, sCT", "FID", SCM_TABLE, {1: 2.85, 2: 2.06}),
        ("CIFAR-10, unconditional, sCD", "FID", SCM_TABLE, {1: 3.66, 2: 2.52}),
        ("ImageNet 64 x 64, XL, sCT", "FID", SCM_TABLE, {1: 2.04, 2: 1.48}),
        ("ImageNet 64 x 64, XL, sCD", "FID", SCM_TABLE, {1: 2.44, 2: 1.66}),
        ("ImageNet 512 x 512, XXL, sCD", "FID", SCM_TABLE, {1: 2.28, 2: 1.88}),
    )
    for steps, value in results.items()
)

DMD2_QUOTED = "DMD2 paper, abstract as its README quotes it"
DMD2 = (
    Published("ImageNet 64 x 64, class-conditional", "FID", 1, 1.28, DMD2_QUOTED, IMAGENET64),
    Published("zero-shot COCO 2014, SD 1.5", "FID", 1, 8.35, DMD2_QUOTED, COCO2014),
)

NCT_TABLE = "NCT paper, results (Diff-Instruct generator of SD 1.5); read in its stored text"
NCT_SETTING = "internal prompts, FID to the uncontrolled base model"
NCT = tuple(
    Published(f"{control}, {NCT_SETTING}", metric, 1, value, NCT_TABLE)
    for control, results in (
        ("Canny", {"FID": 13.67, "consistency": 0.110}),
        ("HED", {"FID": 14.96, "consistency": 0.060}),
        ("depth", {"FID": 16.45, "consistency": 0.088}),
        ("super-resolution x8", {"FID": 12.17, "consistency": 0.053}),
    )
    for metric, value in results.items()
) + tuple(
    Published("image prompt, COCO-2017 5k, 4 images per prompt", metric, 1, value, NCT_TABLE)
    for metric, value in (("CLIP-T", 0.593), ("CLIP-I", 0.821))
)

INTERLCM_TABLE = "DMDP-FR's README, which measured it again; the paper's own table was not read"
INTERLCM = tuple(
    Published(f"{data}, 512 px, blind restoration", metric, 3, value, INTERLCM_TABLE)
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
    "rg_lcd": RG_LCD,
    "scott": SCOTT,
    "ict": ICT,
    "lct": LCT,
    "meanflow": MEANFLOW,
    "rcm": RCM,
    "dmd2": DMD2,
    "nct": NCT,
    "interlcm": INTERLCM,
}
