"""Train a teacher: the same as `fewstep train-teacher`, from a clone."""

import sys

from fewstep.distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-teacher", *sys.argv[1:]]))
