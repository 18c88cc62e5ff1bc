"""``python -m costmodel.search``."""

import sys

from costmodel.commands.search import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m costmodel.search"))
