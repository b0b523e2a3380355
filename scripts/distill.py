"""Distil a teacher: the same as `fewstep distill`, from a clone."""

import sys

from fewstep.distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
