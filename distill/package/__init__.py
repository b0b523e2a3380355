"""Distil diffusion models into few-step generators, and score them.

The commands as functions: the same recipes and run folders, and the same mistakes, each a `UserError` of one line.

>>> import fewstep
>>> run = fewstep.run("emoji/lcd", output_dir="runs/two_steps", max_train_steps=2, train_batch_size=2)
method    lcd (LCM), all weights
...
score     fewstep evaluate runs/two_steps/pipeline --steps 1 2 4
>>> pipeline = run.pipeline()
>>> pipeline("red apple", **run.calls[2]).images[0].size
(32, 32)

Importing this imports nothing else: each name when it is first used, so that `fewstep.kernels` needs torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fewstep.distill.catalog.recipes import Recipe, recipes
    from fewstep.distill.commands.python import Run, compare, evaluate, methods, run, sample
    from fewstep.distill.errors import UserError

__version__ = "0.1.0"

_PLACES = {
    "distill.catalog.recipes": ("Recipe", "recipes"),
    "distill.commands.python": ("Run", "compare", "evaluate", "methods", "run", "sample"),
    "distill.errors": ("UserError",),
}

__all__ = [
    "Recipe",
    "Run",
    "UserError",
    "__version__",
    "compare",
    "evaluate",
    "methods",
    "recipes",
    "run",
    "sample",
]


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
