"""Score a pipeline or an image folder: the same as `fewstep compare`, from a clone."""

import sys

from fewstep.distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
