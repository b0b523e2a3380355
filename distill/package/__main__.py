"""`python -m fewstep`: the command line."""

import sys

from fewstep.distill.cli import main

if __name__ == "__main__":
    sys.exit(main())
