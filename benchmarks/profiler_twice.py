"""Two profiles of this machine, one after the other: do they agree within their stated spread?

``python -m benchmarks.profiler_twice`` prints each number of both hardware files, and whether they differ by no more
than the sum of both interquartile ranges (and 3 %, what repeats settle at). Idle machines agree; busy ones say so.
"""

import argparse
import sys

from costmodel import words
from costmodel.hardware import quantities
from profiler.effort import EFFORTS
from profiler.hardware import hardware
from profiler.session import Request, profile
from profiler.timing import SETTLED_SPREAD
from runtime import environment


def main() -> int:
    """Profile twice and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--effort", choices=tuple(EFFORTS), default="default")
    args = parser.parse_args()
    request = Request(effort=EFFORTS[args.effort])
    print(
        f"{environment.cpu_name()}, {words.counted(environment.usable_cores(), 'core')}, "
        f"load {environment.load_per_core():.1f} a core, "
        f"commit {environment.commit()}, {environment.today()}, effort {args.effort}"
    )
    machines = [hardware(profile(request, progress=lambda title: None), name=name) for name in ("first", "second")]
    first, second = (dict(quantities(machine)) for machine in machines)
    print(f"{'':<34}{'first':>12}{'second':>12}{'differ':>9}{'allowed':>9}")
    outside = 0
    for path, one in first.items():
        other = second[path]
        if one.spread is None or other.spread is None:
            continue
        middle = (one.value + other.value) / 2
        differ = abs(one.value - other.value) / middle if middle else 0.0
        allowed = one.spread + other.spread + SETTLED_SPREAD
        outside += differ > allowed
        mark = "" if differ <= allowed else "   outside"
        print(f"{path:<34}{one.value:>12.4g}{other.value:>12.4g}{differ:>9.1%}{allowed:>9.1%}{mark}")
    print(f"{outside} outside")
    return 0 if outside == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
