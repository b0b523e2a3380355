"""The list of methods: one line each."""

from typing import Any

from ..config.nearest import hint
from ..errors import UserError
from ..methods.consistency_training.ict import ICT
from ..methods.consistency_training.lct import LCT
from ..methods.control.nct import NCT
from ..methods.latent_consistency.lcd import LCD
from ..methods.latent_consistency.rg_lcd import RGLCD
from ..methods.latent_consistency.scott import SCott
from ..methods.meanflow.meanflow import MeanFlow
from ..methods.restoration.interlcm import InterLCM
from ..methods.score_distillation.dmd2 import DMD2
from ..methods.score_distillation.rcm import RCM
from ..pretrain.autoencoder import Autoencoder
from ..pretrain.controlnet import ControlNetTraining
from ..pretrain.diffusion import Diffusion
from ..pretrain.edm import EDMTraining
from ..pretrain.text_encoder import TextEncoder
from ..search.candidates import Search
from ..search.lcsc import LCSC
from ..search.q_sched import QSched
from ..training.contract import Method

METHODS: dict[str, type[Method]] = {
    "lcd": LCD,
    "rg_lcd": RGLCD,
    "scott": SCott,
    "ict": ICT,
    "lct": LCT,
    "meanflow": MeanFlow,
    "rcm": RCM,
    "dmd2": DMD2,
    "nct": NCT,
    "interlcm": InterLCM,
    "diffusion": Diffusion,
    "controlnet": ControlNetTraining,
    "edm": EDMTraining,
    "autoencoder": Autoencoder,
    "text_encoder": TextEncoder,
}

SEARCHES: dict[str, type[Search]] = {
    "q_sched": QSched,
    "lcsc": LCSC,
}


def method_named(name: str) -> type[Method]:
    if name in SEARCHES:
        raise UserError(
            f"method.name: {name} is a search and trains nothing; give a method that does: {', '.join(METHODS)}"
        )
    if name not in METHODS:
        raise UserError(f"method.name: there is no method {name!r}; {hint(name, [*METHODS, *SEARCHES])}")
    return METHODS[name]


def settings_of(name: str) -> type[Any]:
    return SEARCHES[name].Settings if name in SEARCHES else method_named(name).Settings
