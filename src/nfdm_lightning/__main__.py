"""Runs the command line: python -m nfdm_lightning."""

import sys

from nfdm_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
