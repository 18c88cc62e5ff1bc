"""How long planning takes, from the shell prompt to the answer: ``python -m benchmarks.planning [--json FILE]``.

Each case is a whole process, interpreter and imports included, run several times. The limits that a
planner in Python cannot beat stand above the cases: starting the interpreter, importing numpy and the
solver, and the linear programs times what one of them takes.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from costmodel import records

TARGET_S = 1.0
REFERENCE_S = 12.4
"""What the released FlexGen solver takes for OPT-175B on a T4 on the 2-core machine of the target."""

SCHEMA = "tierwise.planning-benchmark/1"

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("highspy", "numpy", "pulp", "pydantic", "rich")

LIMITS: dict[str, tuple[str, ...]] = {
    "the interpreter alone": ("-c", "pass"),
    "… and numpy": ("-c", "import numpy"),
    "… and numpy, pydantic, rich, HiGHS": ("-c", "import numpy, pydantic, rich.console, rich.table, highspy"),
    "import costmodel": ("-c", "import costmodel"),
}
CASES: dict[str, tuple[str, ...]] = {
    "search t4 opt-175b (the target)": ("costmodel.search", "--gpu", "t4", "--model", "opt-175b"),
    "search t4 opt-30b": ("costmodel.search", "--gpu", "t4", "--model", "opt-30b"),
    "search t4 opt-30b, best 4": ("costmodel.search", "--gpu", "t4", "--model", "opt-30b", "--top", "4"),
    "search t4 opt-30b, 1000 prompts": (
        "costmodel.search",
        "--gpu",
        "t4",
        "--model",
        "opt-30b",
        "--num-prompts",
        "1000",
    ),
    "search rtx4090 opt-66b": ("costmodel.search", "--gpu", "rtx4090", "--model", "opt-66b"),
    "search h100 opt-13b (all fits)": ("costmodel.search", "--gpu", "h100", "--model", "opt-13b"),
    "search t4-flexgen opt-30b, flexgen": ("costmodel.search", "--gpu", "t4-flexgen", "--formulation", "flexgen"),
    "frontier t4 opt-30b": ("costmodel.frontier", "--gpu", "t4", "--model", "opt-30b"),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one process over several runs, and what the search itself says of its own.

    ``cpu_s`` is the median of the processor time, which a busy machine inflates less than the wall's.
    """

    name: str
    median_s: float
    least_s: float
    most_s: float
    cpu_s: float
    search_s: float | None = None
    linear_programs: int | None = None

    @property
    def ms_per_program(self) -> float | None:
        """Milliseconds of search for each linear program."""
        if self.search_s is None or not self.linear_programs:
            return None
        return self.search_s / self.linear_programs * 1e3


def main(argv: Sequence[str] | None = None) -> int:
    """Time everything, print the table, write the JSON; slow runs are shown, never failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of each case (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the timings and their origin")
    args = parser.parse_args(argv)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    limits = [_timed(name, command, args.repeats) for name, command in LIMITS.items()]
    _print_heading("limits")
    for timing in limits:
        _print(timing)
    _print_heading("whole processes")
    cases = []
    for name, (module, *flags) in CASES.items():
        cases.append(_timed(name, ("-m", module, *flags), args.repeats, asks=module == "costmodel.search"))
        _print(cases[-1])
    target = cases[0].median_s
    print(
        f"\ntarget: {TARGET_S:.1f} s for {cases[0].name}: {target:.2f} s, {'met' if target <= TARGET_S else 'MISSED'}"
    )
    print(f"the released solver took {REFERENCE_S} s for it on that machine: {REFERENCE_S / target:.0f} times as long")
    if args.json is not None:
        data = {"limits": limits, "cases": cases}
        timings = {key: [asdict(timing) for timing in found] for key, found in data.items()}
        records.write_json(
            {"schema": SCHEMA, "origin": origin(args.repeats), "target_s": TARGET_S, **timings}, args.json
        )
    return 0


def _timed(name: str, command: tuple[str, ...], repeats: int, *, asks: bool = False) -> Timing:
    """Run once to warm the file cache, then time ``repeats`` runs."""
    line = [sys.executable, *command]
    first = subprocess.run(
        [*line, *(["--json", "-"] if asks else [])], cwd=ROOT, capture_output=True, check=True, text=True
    )
    proof = json.loads(first.stdout)["search"] if asks else {}
    walls, processor = [], []
    for _ in range(repeats):
        began, used = time.perf_counter(), _children_s()
        subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
        walls.append(time.perf_counter() - began)
        processor.append(_children_s() - used)
    return Timing(
        name=name,
        median_s=statistics.median(walls),
        least_s=min(walls),
        most_s=max(walls),
        cpu_s=statistics.median(processor),
        search_s=proof.get("seconds"),
        linear_programs=proof.get("linear_programs"),
    )


def _children_s() -> float:
    """Processor seconds of the processes that have ended."""
    spent = os.times()
    return spent.children_user + spent.children_system


def origin(repeats: int) -> dict[str, object]:
    """Machine, versions, commit and date: a number without them is a defect."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": {"system": platform.platform(), "processor": _processor(), "cores": _cores()},
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "repeats": repeats,
    }


def _print_heading(title: str) -> None:
    print(f"\n{title:<38}{'median':>9}{'least':>9}{'most':>9}{'CPU':>9}{'search':>9}{'LPs':>7}{'a LP':>9}")


def _print(timing: Timing) -> None:
    walls = "".join(f"{seconds:>7.2f} s" for seconds in (timing.median_s, timing.least_s, timing.most_s, timing.cpu_s))
    proof = ""
    if timing.search_s is not None and timing.ms_per_program is not None:
        proof = f"{timing.search_s:>7.2f} s{timing.linear_programs:>7,}{timing.ms_per_program:>6.2f} ms"
    print(f"{timing.name:<38}{walls}{proof}", flush=True)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
