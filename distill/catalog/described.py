"""What each method is, in the words of the page of methods: distill/methods/README.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Described:
    """papers: short name and arXiv number of each; idea: one line; data: beside the teacher that its settings ask for;
    switches: keys that make it another paper's method; export: how the result is loaded."""

    papers: dict[str, str]
    idea: str
    data: str
    switches: str
    export: str


STOCK_LCM = (
    "stock: `LatentConsistencyModelPipeline` with `LCMScheduler`; a LoRA as its file and, fused, in the teacher's "
    "pipeline"
)
CAPTIONED = "pictures with captions, or the teacher's own"

DESCRIBED = {
    "lcd": Described(
        {"LCM": "2310.04378", "LCM-LoRA": "2311.05556"},
        "the answer at one time is pulled to the answer one guided teacher step later",
        CAPTIONED,
        "`student.kind: lora` (LCM-LoRA)",
        STOCK_LCM,
    ),
    "rg_lcd": Described(
        {"RG-LCD": "2403.11027", "Ctrl-U": "2410.11236"},
        "`lcd` and a reward on the one-step pictures",
        CAPTIONED,
        "`lrm` (a reward learnt on latents), `uncertainty` (Ctrl-U)",
        "as `lcd`",
    ),
    "scott": Described(
        {"SCott": "2403.01505"},
        "`lcd` with a teacher step that adds noise, and a discriminator",
        CAPTIONED,
        "`solver`, `lambda_adv: 0` (no discriminator)",
        "as `lcd`",
    ),
    "ict": Described(
        {"iCT": "2310.14189", "CT and CD": "2303.01469", "ECT": "2406.14548"},
        "two noise levels of one picture are pulled to one answer",
        "pictures; captions for latents",
        "`ode_source: teacher` (CD), `target: ema` (CT, CD), `curriculum: continuous` (ECT)",
        "pixels, stock: `ConsistencyModelPipeline`; latents: `pipeline_latent_cm.py`",
    ),
    "lct": Described(
        {"sLCT": "2502.01441"},
        "`ict` in latents with a loss that outliers cannot rule, and noise matched to pictures",
        "pictures and an autoencoder",
        "`distance`, `coupling`, `diffusion_weight`, `student.norm`",
        "texts: `pipeline_latent_cm.py`; classes or none: `pipeline_class_latent_cm.py`",
    ),
    "meanflow": Described(
        {"MeanFlow": "2505.13447", "iMF": "2512.02012", "α-Flow": "2510.20771", "SplitMeanFlow": "2507.16884"},
        "the network learns the mean velocity between two times",
        "pictures; with a teacher captions",
        "`source: teacher`, `tangent: student` (iMF), `target: alpha_flow` or `split`",
        "texts: `pipeline_latent_meanflow.py`; classes or none: `pipeline_meanflow.py`",
    ),
    "rcm": Described(
        {"rCM": "2510.08431", "sCM": "2410.11081"},
        "consistency by the exact derivative in time, and a score term on the student's own pictures",
        CAPTIONED,
        "`score_weight: 0` (sCM), `scm_weight: 0` (score alone), `source: data` (sCM from pictures)",
        "stock: the teacher's pipeline with `LCMScheduler` or, of SD3 and Flux, `FlowMatchEulerDiscreteScheduler`; "
        "Wan: `scheduler_few_sigmas.py`; pixels and new networks: `pipeline_trigflow.py`",
    ),
    "dmd2": Described(
        {"DMD2": "2405.14867"},
        "the student's pictures follow the difference of two scores, the teacher's and their own, and a discriminator",
        CAPTIONED,
        "`num_steps`, `gan_weight: 0` (no discriminator)",
        "as `rcm`",
    ),
    "nct": Described(
        {"NCT": "2506.19741"},
        "a frozen one-step student gets a control (edges, depth, a picture) without pictures to train on",
        "captions alone",
        "`control.name`: `canny`, `soft_edges`, `hed`, `depth`, `luminance`, `superres`, `inpaint`, `image`",
        "stock: `StableDiffusionControlNetPipeline` with `LCMScheduler`; `image`: the student's pipeline with "
        "`ip_adapter/` for `load_ip_adapter`",
    ),
    "interlcm": Described(
        {"InterLCM": "2502.02215"},
        "a frozen few-step student restores pictures: the degraded one stands for its first answer",
        "pictures alone",
        "`visual: null`, `spatial`, `gan_weight: 0`",
        "`pipeline_restoration.py` with `visual_encoder.py`",
    ),
    "q_sched": Described(
        {"Q-Sched": "2509.01624"},
        "a quantised student gets two factors a step, found by search",
        "a student's pipeline and captions",
        "`quantisation`, `family`, `strategy`",
        "the student's pipeline with `scheduler_q_sched.py`",
    ),
    "lcsc": Described(
        {"LCSC": "2404.02241", "MWA": "2504.18580"},
        "the last weights of a run are added up with coefficients found by search, or by rule",
        "a run with `raw_weights.every` and captions",
        "`family: mwa` (no search), `ema`, `uniform`",
        "as the run",
    ),
}  # fmt: skip
