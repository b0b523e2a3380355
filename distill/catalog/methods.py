"""The list of methods and searches: one line each."""

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from ..config.nearest import hint
from ..errors import UserError
from ..methods.consistency_training.settings import ICTSettings, LCTSettings
from ..methods.control.settings import NCTSettings
from ..methods.latent_consistency.settings import LCDSettings, RGLCDSettings, SCottSettings
from ..methods.meanflow.settings import MeanFlowSettings
from ..methods.restoration.settings import InterLCMSettings
from ..methods.score_distillation.settings import DMD2Settings, RCMSettings
from ..pretrain.settings import (
    AutoencoderSettings,
    ControlNetSettings,
    DiffusionSettings,
    EDMSettings,
    TextEncoderSettings,
)
from ..search.settings import LCSCSettings, QSchedSettings
from ..settings import MethodSettings, Origin


@dataclass(frozen=True)
class Entry:
    """A method's settings, which need no torch, and where its class stands below distill/: imported when it is used, so
    that help and a mistyped key take no seconds."""

    settings: type[MethodSettings]
    place: str


METHODS = {
    "lcd": Entry(LCDSettings, "methods.latent_consistency.lcd:LCD"),
    "rg_lcd": Entry(RGLCDSettings, "methods.latent_consistency.rg_lcd:RGLCD"),
    "scott": Entry(SCottSettings, "methods.latent_consistency.scott:SCott"),
    "ict": Entry(ICTSettings, "methods.consistency_training.ict:ICT"),
    "lct": Entry(LCTSettings, "methods.consistency_training.lct:LCT"),
    "meanflow": Entry(MeanFlowSettings, "methods.meanflow.meanflow:MeanFlow"),
    "rcm": Entry(RCMSettings, "methods.score_distillation.rcm:RCM"),
    "dmd2": Entry(DMD2Settings, "methods.score_distillation.dmd2:DMD2"),
    "nct": Entry(NCTSettings, "methods.control.nct:NCT"),
    "interlcm": Entry(InterLCMSettings, "methods.restoration.interlcm:InterLCM"),
    "diffusion": Entry(DiffusionSettings, "pretrain.diffusion:Diffusion"),
    "controlnet": Entry(ControlNetSettings, "pretrain.controlnet:ControlNetTraining"),
    "edm": Entry(EDMSettings, "pretrain.edm:EDMTraining"),
    "autoencoder": Entry(AutoencoderSettings, "pretrain.autoencoder:Autoencoder"),
    "text_encoder": Entry(TextEncoderSettings, "pretrain.text_encoder:TextEncoder"),
}

SEARCHES = {
    "q_sched": Entry(QSchedSettings, "search.q_sched:QSched"),
    "lcsc": Entry(LCSCSettings, "search.lcsc:LCSC"),
}


def origins() -> dict[str, Origin]:
    """Where the methods and searches are from, by name; those of no paper are left out."""
    found = ((name, entry.settings.origin) for name, entry in (METHODS | SEARCHES).items())
    return {name: origin for name, origin in found if origin is not None}


def method_named(name: str) -> type[MethodSettings]:
    """The settings of a method that trains."""
    if name in SEARCHES:
        raise UserError(
            f"method.name: {name} is a search and trains nothing; give a method that does: {', '.join(METHODS)}"
        )
    if name not in METHODS:
        raise UserError(f"method.name: there is no method {name!r}; {hint(name, [*METHODS, *SEARCHES])}")
    return METHODS[name].settings


def settings_of(name: str) -> type[MethodSettings]:
    """The settings of a method or a search."""
    return SEARCHES[name].settings if name in SEARCHES else method_named(name)


def load(name: str) -> type[Any]:
    """The class of a method or a search that is in the list."""
    root = __name__.rpartition(".catalog.")[0]
    found: type[Any] = resolve_name(f"{root}.{(METHODS | SEARCHES)[name].place}")
    return found
