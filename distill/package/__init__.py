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

Importing this takes no torch: what a function needs is imported when it is called.
"""

from fewstep.distill.catalog.recipes import Recipe, recipes
from fewstep.distill.commands.python import Run, compare, evaluate, methods, run, sample
from fewstep.distill.errors import UserError

__version__ = "0.1.0"

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
