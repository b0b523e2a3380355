"""What each method is, in the words of the page of methods: distill/methods/README.md."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Described:
    """data: what is needed beside the teacher that the settings ask for; switches: keys that make it another method;
    export: how the result is loaded."""

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
        CAPTIONED,
        "`student.kind: lora` (LCM-LoRA)",
        STOCK_LCM,
    ),
    "rg_lcd": Described(
        CAPTIONED,
        "`lrm` (a reward learnt on latents), `uncertainty` (Ctrl-U)",
        "as `lcd`",
    ),
    "scott": Described(
        CAPTIONED,
        "`solver`, `lambda_adv: 0` (no discriminator)",
        "as `lcd`",
    ),
    "ict": Described(
        "pictures; captions for latents",
        "`ode_source: teacher` (CD), `target: ema` (CT, CD), `curriculum: continuous` (ECT)",
        "pixels, stock: `ConsistencyModelPipeline`; latents: `pipeline_latent_cm.py`",
    ),
    "lct": Described(
        "pictures and an autoencoder",
        "`distance`, `coupling`, `diffusion_weight`, `student.norm`",
        "texts: `pipeline_latent_cm.py`; classes or none: `pipeline_class_latent_cm.py`",
    ),
    "meanflow": Described(
        "pictures; with a teacher captions",
        "`source: teacher`, `tangent: student` (iMF), `target: alpha_flow` or `split`",
        "texts: `pipeline_latent_meanflow.py`; classes or none: `pipeline_meanflow.py`",
    ),
    "rcm": Described(
        CAPTIONED,
        "`score_weight: 0` (sCM), `scm_weight: 0` (score alone), `source: data` (sCM from pictures)",
        "stock: the teacher's pipeline with `LCMScheduler` or, of SD3 and Flux, `FlowMatchEulerDiscreteScheduler`; "
        "Wan: `scheduler_few_sigmas.py`; pixels and new networks: `pipeline_trigflow.py`",
    ),
    "dmd2": Described(
        CAPTIONED,
        "`num_steps`, `gan_weight: 0` (no discriminator)",
        "as `rcm`",
    ),
    "nct": Described(
        "captions alone",
        "`control.name`: `canny`, `soft_edges`, `hed`, `depth`, `luminance`, `superres`, `inpaint`, `image`",
        "stock: `StableDiffusionControlNetPipeline` with `LCMScheduler`; `image`: the student's pipeline with "
        "`ip_adapter/` for `load_ip_adapter`",
    ),
    "interlcm": Described(
        "pictures alone",
        "`visual: null`, `spatial`, `gan_weight: 0`",
        "`pipeline_restoration.py` with `visual_encoder.py`",
    ),
    "q_sched": Described(
        "a student's pipeline and captions",
        "`quantisation`, `family`, `strategy`",
        "the student's pipeline with `scheduler_q_sched.py`",
    ),
    "lcsc": Described(
        "a run with `raw_weights.every` and captions",
        "`family: mwa` (no search), `ema`, `uniform`",
        "as the run",
    ),
}  # fmt: skip
