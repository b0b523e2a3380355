"""Score a pipeline or an image folder: the same as `fewstep evaluate`, from a clone."""

import sys

from fewstep.distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
