"""Hugging Face accelerate's ``disk_offload`` against ours, both in one memory cgroup's limit, each at its best batch.

``python -m benchmarks.against_accelerate [--hardware FILE] [--accelerate DIR] [--cases a b c d] [--json FILE]``

prints machine, versions, commit and date; for each case every batch size tried with accelerate, and ours with what the
search promised; and at the end a table of ratios and shares beside their targets. Returns 0 where all are met.

Needs root (or a delegated cgroup), about 32 GB in ``--folder`` for both sides' weights (kept for the next time; dummy
weights in bf16, of the same shapes) and accelerate: ``pip install --constraint constraints.txt -e '.[bench]'``, or, to
leave an environment as it is, ``pip install --no-deps --target DIR accelerate==1.15.0 psutil`` and
``--accelerate DIR``.

**What makes it fair.** Every run is a process in a fresh cgroup whose limit counts page cache; the weight files are
evicted before each, so that what a run caches is charged to it, and torch's libraries are read outside, so that neither
side pays for them. Seconds are those of generation, after loading and a warm-up. Prompts are random tokens of equal
length, and nothing ends early. On either side a run during which the cores of a virtual machine shared no cache is
set aside and made again, twice at most. Accelerate's batch doubles until it is killed for memory or slows twice in a
row; then sizes between the last good one and the killed one are tried. Ours runs the policy that the search finds on
the measured profile, without compression, in the limit less what the process itself needs (``--overhead``).
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.both_sides import Bench
from benchmarks.memory_cgroup import end_on_sigterm
from benchmarks.trials import Case, Outcome, Trial, best_batch, table, to_dict
from costmodel import records, units
from costmodel.errors import InputError, TierwiseError
from costmodel.hardware import Hardware
from profiler.offload import offload_directory
from runtime import environment

SCHEMA = "tierwise.against-accelerate/2"

GiB = 2**30
OPT_SMALL: dict[str, Any] = {"model": "opt-1.3b", "limit_bytes": 3 * GiB}
CASES = (
    Case(key="a", **OPT_SMALL, prompt_len=512, gen_len=32, batches=(4, 8, 16, 32), target=2.0),
    Case(key="b", **OPT_SMALL, prompt_len=32, gen_len=64, batches=(16, 32, 64, 128), target=2.5),
    Case(
        key="c",
        model="opt-6.7b",
        limit_bytes=4 * GiB,
        prompt_len=32,
        gen_len=16,
        batches=(4, 8, 16, 32, 64),
        target=2.2,
    ),
    Case(key="d", **OPT_SMALL, prompt_len=32, gen_len=64, batches=(16,), target=6.0),
)


def compare(bench: Bench, case: Case, args: argparse.Namespace, save: Callable[[Outcome], None]) -> Outcome:
    """Run a case; every finished trial is printed and handed to ``save``."""
    outcome = Outcome(case=case)
    print(f"\n{case}", flush=True)
    if args.side != "ours":
        for attention in args.attention:

            def run(batch: int, attention: str = attention) -> Trial:
                nonlocal outcome
                trial = bench.accelerate(case, batch, attention)
                outcome = dataclasses.replace(outcome, accelerate=(*outcome.accelerate, trial))
                print(f"  accelerate, {attention}, batch {batch:>4}: {trial}{_memory(trial)}", flush=True)
                save(outcome)
                return trial

            best_batch(run, case.batches if case.fixed_batch else args.batches or case.batches, args.refine)
    if args.side != "accelerate":
        promise = bench.promise(case)
        print(f"  tierwise, the search promises {promise.throughput_tok_per_s:.2f} token/s", end="")
        print(f" (no policy exceeds {promise.bound_tok_per_s:.2f})", flush=True)
        outcome = dataclasses.replace(outcome, promise=promise, ours=(trial := bench.ours(case, promise)))
        print(f"  tierwise, batch {trial.batch:>4}: {trial}{_memory(trial)}", flush=True)
        save(outcome)
    return outcome


def _memory(trial: Trial) -> str:
    peak = "" if trial.peak_bytes is None else f"; cgroup peak {units.format_bytes(trial.peak_bytes)}"
    resident = trial.details.get("peak_rss_bytes")
    return peak + ("" if resident is None else f", resident {units.format_bytes(resident)}")


def origin(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Machine, versions, commit, date and repeats."""
    file_system = environment.file_system(bench.folder)
    return {
        "date": environment.today(),
        "commit": environment.commit(),
        "cpu": environment.cpu_name(),
        "cores": environment.usable_cores(),
        "load_per_core": environment.load_per_core(),
        "disk": f"{file_system.device} ({file_system.kind})",
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "accelerate": "not run" if args.side == "ours" else accelerate_version(bench),
        "repeats": bench.repeats,
        "overhead_bytes": bench.overhead_bytes,
        "max_latency": bench.max_latency,
        "hardware": "measured now" if args.hardware is None else Hardware.from_file(args.hardware).name,
    }


def accelerate_version(bench: Bench) -> str:
    """The version that the children import; where there is none, how to install it."""
    code = "import importlib.util as u; print(u.find_spec('accelerate') and __import__('accelerate').__version__)"
    found = bench.checked_output([sys.executable, "-c", code]).strip()
    if found == "None":
        raise InputError(
            "accelerate is not installed: pip install --constraint constraints.txt -e '.[bench]', or pip install "
            "--no-deps --target DIR accelerate==1.15.0 psutil and --accelerate DIR"
        )
    return found


def warm_libraries() -> None:
    """Read torch's libraries here, so that their pages are charged to no run."""
    for file in sorted(Path(torch.__file__).parent.joinpath("lib").glob("*.so*")):
        with file.open("rb") as stream:
            while stream.read(16 * 2**20):
                pass


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases, print the table, write the JSON."""
    args = _parser().parse_args(argv)
    if args.repeats < 1 or args.refine < 0:
        _parser().error("--repeats must be at least 1 and --refine at least 0")
    end_on_sigterm()
    try:
        return _main(args)
    except TierwiseError as error:
        print(f"against_accelerate: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against_accelerate", description=__doc__.partition("\n")[0]
    )
    keys = [case.key for case in CASES]
    parser.add_argument("--cases", nargs="+", choices=keys, default=keys, help="(default: all)")
    parser.add_argument("--side", choices=("both", "accelerate", "ours"), default="both", help="run one side only")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each batch size (default: %(default)s)")
    parser.add_argument(
        "--attention",
        nargs="+",
        choices=("eager", "sdpa"),
        default=["eager"],
        help="accelerate's attention; with both, the better one counts (default: eager)",
    )
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="accelerate's first batch sizes")
    parser.add_argument(
        "--refine", type=int, default=1, metavar="N", help="halvings towards a killed size (default: %(default)s)"
    )
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="of one run (default: 1800)")
    parser.add_argument(
        "--hardware", type=Path, metavar="FILE", help="a profile of this machine (default: measure now)"
    )
    parser.add_argument(
        "--max-latency", default="10min", metavar="TIME", help="the longest block of ours (default: %(default)s)"
    )
    parser.add_argument(
        "--overhead",
        default="512MiB",
        metavar="SIZE",
        help="what our process needs beside its budget: interpreter, torch, threads (default: %(default)s)",
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="both sides' weights (default: on a temporary disk)")
    parser.add_argument("--accelerate", type=Path, metavar="DIR", help="where pip --target put accelerate")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything and its origin, trial by trial")
    return parser


def _main(args: argparse.Namespace) -> int:
    if args.folder is None:
        args.folder = offload_directory(None) / "tierwise-against-accelerate"
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    told = origin(bench, args)
    print(", ".join(f"{name} {value}" for name, value in told.items()), flush=True)
    warm_libraries()
    outcomes: list[Outcome] = []

    def save(*unfinished: Outcome) -> None:
        if args.json is not None:
            cases = [to_dict(outcome) for outcome in (*outcomes, *unfinished)]
            records.write_json({"schema": SCHEMA, "origin": told, "cases": cases}, args.json)

    for case in CASES:
        if case.key in args.cases:
            outcomes.append(compare(bench, case, args, save))
            save()
    print()
    for line in table(outcomes):
        print(line)
    return 0 if args.side != "both" or all(outcome.met for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
