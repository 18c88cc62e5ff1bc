"""``python -m profiler``."""

import sys

from profiler.command import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m profiler"))
