"""The list of methods: one line each."""

from typing import Any

from .errors import UserError
from .methods.base import Method
from .methods.dmd2 import DMD2
from .methods.ict import ICT
from .methods.interlcm import InterLCM
from .methods.lcd import LCD
from .methods.lcsc import LCSC
from .methods.lct import LCT
from .methods.meanflow import MeanFlow
from .methods.nct import NCT
from .methods.q_sched import QSched
from .methods.rcm import RCM
from .methods.rg_lcd import RGLCD
from .methods.scott import SCott
from .nearest import hint
from .pretrain.autoencoder import Autoencoder
from .pretrain.controlnet import ControlNetTraining
from .pretrain.diffusion import Diffusion
from .pretrain.edm import EDMTraining
from .pretrain.text_encoder import TextEncoder
from .search.candidates import Search

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
