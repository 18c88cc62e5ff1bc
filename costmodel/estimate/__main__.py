"""``python -m costmodel.estimate``."""

import sys

from costmodel.commands.estimate import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m costmodel.estimate"))
