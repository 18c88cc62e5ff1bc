"""Measure this machine: its links, processors, overlap and capacities, as a hardware file."""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from costmodel import records, units
from costmodel.commands import outcome, parsing, signals
from costmodel.errors import InputError
from costmodel.model import ModelSpec

EPILOG = """\
examples:
  %(prog)s --out my-machine.json
      measure this machine in under 90 s, the disk below a temporary directory
  %(prog)s --quick --out my-machine.json --offload-dir /mnt/nvme
      in 20 s, and the disk that will hold what does not fit the memory
  %(prog)s --out my-machine.json --gpu-memory 12GiB --cpu-memory 4GiB
      with budgets for the two memory tiers
  python -m costmodel.search --hardware my-machine.json --model opt-6.7b
      then plan for it

exit codes: 0 done, 2 bad input, 5 the disk failed, 130 interrupted
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise profile") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        description=(
            "Measure what this machine really does: every number that planning needs, by timing the\n"
            "functions that the runtime executes. The result is a hardware file for --hardware."
        ),
        epilog=EPILOG,
    )
    parser.usage = "%(prog)s --out FILE [flags]"
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="take 20 s: fewer sizes, fewer repeats, wider spreads")
    effort.add_argument("--thorough", action="store_true", help="take about 6 minutes: more of everything")
    size = parsing.quantity("bytes")
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--offload-dir",
        metavar="DIR",
        type=Path,
        help="the directory whose disk is the third tier; a file of up to 1 GiB (quick: 256 MiB, thorough: 4 GiB), at "
        "most a quarter of what is free, is written there and removed (default: a temporary directory on a disk)",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="the first tier (default: cuda where there is one)",
    )
    group.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        type=size,
        help="the first tier's budget, such as 12GiB (default: what is free; without a GPU, 80%% of what is available)",
    )
    group.add_argument(
        "--cpu-memory",
        metavar="SIZE",
        type=parsing.quantity("bytes", or_zero=True),
        help="the second tier's budget (default: 80%% of the host memory available; without a GPU, none)",
    )
    group.add_argument(
        "--model",
        metavar="NAME|PATH",
        help="time layers as wide as this model's: a name of the catalogue, a config.json or its folder (default: "
        "OPT-6.7B's width, quick: OPT-1.3B's)",
    )
    group.add_argument("--name", metavar="NAME", help="what to call this machine (default: the file's name)")
    output = parser.add_argument_group("output", "Files are written whole or not at all.")
    output.add_argument(
        "--out", metavar="FILE|-", type=parsing.json_file, required=True, help="the hardware file; - is standard output"
    )
    output.add_argument(
        "--plot", metavar="FILE", type=parsing.figure_file, help="draw rooflines and curves: .png, .pdf or .svg"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    if isinstance(args.out, Path) and args.plot is not None and args.out.resolve() == args.plot.resolve():
        raise InputError(f"--plot is {args.plot}: that file is written by --out; name another one")
    for flag, path in (("--out", args.out), ("--plot", args.plot)):
        if isinstance(path, Path):
            _check_writable(flag, path)
    return _measure(args)


def _check_writable(flag: str, path: Path) -> None:
    """Fail before the measurement rather than after it."""
    if not os.access(path if path.exists() and not path.is_file() else path.parent, os.W_OK):
        raise InputError(f"{flag} is {path}: no file can be written in {str(path.parent)!r}")


def _measure(args: argparse.Namespace) -> int:
    try:
        with signals.at_once():
            from profiler import hardware, report, session
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("profiling needs torch: pip install 'tierwise[runtime]'") from None
    from profiler.effort import EFFORTS

    effort = EFFORTS["quick" if args.quick else "thorough" if args.thorough else "default"]
    if args.model is not None:
        effort = effort.shaped(ModelSpec.load(args.model))
    request = session.Request(
        effort=effort,
        device=args.device,
        offload_dir=args.offload_dir,
        gpu_memory_bytes=args.gpu_memory,
        cpu_memory_bytes=args.cpu_memory,
    )
    with _progress(effort.budget_s) as told:
        found = session.profile(request, progress=told)
    name = args.name or (args.out.stem if isinstance(args.out, Path) else "this-machine")
    machine = hardware.hardware(found, name=name)
    written: list[str] = []
    if isinstance(args.out, Path):
        records.write_json(machine.to_dict(), args.out)
        written.append(str(args.out))
    if args.plot is not None:
        from costmodel.figures.machine import profile_figure
        from costmodel.figures.style import render

        content = render(profile_figure(machine), parsing.figure_format(args.plot))
        records.write_bytes(content, args.plot)
        written.append(str(args.plot))
    if args.out == parsing.STANDARD_OUTPUT:
        outcome.say(json.dumps(machine.to_dict(), indent=2, allow_nan=False) + "\n")
    else:
        report.show(found, machine, written)
    return 0


@contextmanager
def _progress(budget_s: float) -> Iterator[Callable[[str], None]]:
    """A bar with the time left on standard error, where that is a terminal."""
    console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        yield lambda title: None
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(), TextColumn("{task.fields[left]}"))
    start, stop = time.monotonic(), threading.Event()
    with Progress(*columns, console=console, transient=True) as bar:
        job = bar.add_task("starting", total=budget_s, left="")

        def tick() -> None:
            while not stop.wait(0.25):
                passed = time.monotonic() - start
                left = max(0.0, budget_s - passed)
                bar.update(job, completed=min(passed, budget_s), left=f"{units.format_seconds(round(left))} left")

        ticker = threading.Thread(target=tick, daemon=True)
        ticker.start()
        try:
            yield lambda title: bar.update(job, description=title)
        finally:
            stop.set()
            ticker.join()
