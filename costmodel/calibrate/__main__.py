"""``python -m costmodel.calibrate``."""

import sys

from costmodel.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m costmodel.calibrate"))
