"""Train the offline image-text scorers: python scripts/train_scorer.py CONFIG [--key value ...]"""

import sys

from fewstep.distill.commands.train_scorer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
