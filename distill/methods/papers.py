"""Which papers a configured method is from, and the family that it stands in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Paper:
    name: str
    arxiv: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


@dataclass(frozen=True)
class Variant:
    """Another paper that a method follows where a key of its configuration has this value.

    beside  the method's own paper is named too: the key adds something to it and does not replace it
    """

    key: str
    value: Any
    paper: Paper
    beside: bool = False

    def holds(self, config: Mapping[str, Any]) -> bool:
        found: Any = config
        for part in self.key.split("."):
            found = (found or {}).get(part)
        return found is not None if self.value is ... else bool(found == self.value)


@dataclass(frozen=True)
class Origin:
    """family: a few words for methods of one idea; variants: the first that holds counts."""

    family: str
    paper: Paper
    variants: tuple[Variant, ...] = ()


CM = "2303.01469"

ORIGINS = {
    "lcd": Origin(
        "latent consistency",
        Paper("LCM", "2310.04378"),
        (Variant("student.kind", "lora", Paper("LCM-LoRA", "2311.05556"), beside=True),),
    ),
    "rg_lcd": Origin(
        "latent consistency",
        Paper("RG-LCD", "2403.11027"),
        (Variant("method.uncertainty", ..., Paper("Ctrl-U", "2410.11236"), beside=True),),
    ),
    "scott": Origin("latent consistency", Paper("SCott", "2403.01505")),
    "ict": Origin(
        "consistency training",
        Paper("iCT", "2310.14189"),
        (
            Variant("method.ode_source", "teacher", Paper("CD", CM)),
            Variant("method.target", "ema", Paper("CT", CM)),
            Variant("method.curriculum", "continuous", Paper("ECT", "2406.14548")),
        ),
    ),
    "lct": Origin("consistency training", Paper("sLCT", "2502.01441")),
    "meanflow": Origin(
        "mean flow",
        Paper("MeanFlow", "2505.13447"),
        (
            Variant("method.target", "alpha_flow", Paper("α-Flow", "2510.20771")),
            Variant("method.target", "split", Paper("SplitMeanFlow", "2507.16884")),
            Variant("method.tangent", "student", Paper("iMF", "2512.02012")),
        ),
    ),
    "rcm": Origin(
        "score distillation",
        Paper("rCM", "2510.08431"),
        (Variant("method.score_weight", 0, Paper("sCM", "2410.11081")),),
    ),
    "dmd2": Origin("score distillation", Paper("DMD2", "2405.14867")),
    "nct": Origin("control", Paper("NCT", "2506.19741")),
    "controlnet": Origin("control", Paper("ControlNet", "2302.05543")),
    "interlcm": Origin("restoration", Paper("InterLCM", "2502.02215")),
    "q_sched": Origin("search", Paper("Q-Sched", "2509.01624")),
    "lcsc": Origin(
        "search",
        Paper("LCSC", "2404.02241"),
        (Variant("method.family", "mwa", Paper("MWA", "2504.18580")),),
    ),
}


def family_of(method: str | None) -> str | None:
    """`method` may have a student's kind behind a comma, as reports have it."""
    origin = ORIGINS.get((method or "").partition(",")[0])
    return origin.family if origin else None


def papers_of(config: Mapping[str, Any]) -> list[Paper]:
    """The papers of a run's whole configuration, the variant's before the one that it builds on; none without a
    method that is published."""
    origin = ORIGINS.get((config.get("method") or {}).get("name", ""))
    if origin is None:
        return []
    for variant in origin.variants:
        if variant.holds(config):
            return [variant.paper, origin.paper] if variant.beside else [variant.paper]
    return [origin.paper]


def papers_of_model(method: str | None, config: Mapping[str, Any]) -> list[Paper]:
    """Those of its configuration; where none is known, the method's own if it has no variants."""
    if config:
        return papers_of(config)
    origin = ORIGINS.get((method or "").partition(",")[0])
    return [origin.paper] if origin and not origin.variants else []
