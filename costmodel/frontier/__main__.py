"""``python -m costmodel.frontier``."""

import sys

from costmodel.commands.frontier import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m costmodel.frontier"))
