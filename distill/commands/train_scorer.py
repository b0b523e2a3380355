"""`scripts/train_scorer.py`: trains the offline image-text scorers."""

import json
import sys

from ..catalog.configuration import with_overrides
from ..config.tree import read_yaml
from ..errors import UserError
from ..pretrain.scorers import train_scorers


def main(arguments: list[str]) -> int:
    """CONFIG [--key.sub value ...]: trains, prints the figures. A user's mistake is one line and exit code 2."""
    if "--help" in arguments or "-h" in arguments:
        print(f"train_scorer.py {main.__doc__}")
        return 0
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                "which configuration? usage: train_scorer.py configs/emoji/scorers.yaml [--key value]"
            )
        path, *rest = arguments
        for figures in train_scorers(with_overrides(read_yaml(path), rest)):
            print(json.dumps(figures))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
