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
length, and nothing ends early. Accelerate's batch doubles until it is killed for memory or slows twice in a row; then
sizes between the last good one and the killed one are tried. Ours runs the policy that the search finds on the measured
profile, without compression, in the limit less what the process itself needs (``--overhead``).
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory_cgroup import LimitedRun, end_on_sigterm, run_limited
from benchmarks.page_cache import evict
from benchmarks.trials import Case, Outcome, Promise, Trial, best_batch, table, to_dict
from costmodel import records, units
from costmodel.errors import InputError, TierwiseError
from profiler.offload import offload_directory
from runtime import environment

SCHEMA = "tierwise.against-accelerate/1"
ROOT = Path(__file__).resolve().parent.parent

STAYED_BYTES = 16 * 2**20
"""More than this left in the page cache before a run would be memory outside of its limit."""

FAILED_LINES = 3
"""The last lines of a failed child's standard error that are shown."""


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


class Bench:
    """The settings that all runs share, and what has been measured already."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.folder: Path = args.folder
        self.repeats: int = args.repeats
        self.timeout_s: float = args.timeout
        self.overhead_bytes = int(units.parse(args.overhead, "bytes"))
        self.max_latency: str = args.max_latency
        self.hardware: Path | None = args.hardware
        self.environment = dict(os.environ)
        if args.accelerate is not None:
            paths = (str(args.accelerate.resolve()), os.environ.get("PYTHONPATH", ""))
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self.trials: dict[tuple[object, ...], Trial] = {}

    def accelerate(self, case: Case, batch: int, attention: str) -> Trial:
        """Accelerate at one batch size; cases that differ in nothing else share the run."""
        key = (case.model, case.limit_bytes, case.prompt_len, case.gen_len, batch, attention)
        if key not in self.trials:
            weights = self.folder / "accelerate" / case.model
            command = [sys.executable, "-m", "benchmarks.accelerate_offload", "--model", case.model]
            command += ["--folder", str(weights)]
            if not any(case.model == known[0] for known in self.trials):
                self.checked_output([*command, "--prepare"])
            command += [f"--batch={batch}", f"--prompt-len={case.prompt_len}", f"--gen-len={case.gen_len}"]
            command += [f"--attention={attention}"]
            trial = self._trial(command, case, weights, batch, lambda said: float(said["tok_per_s"]))
            self.trials[key] = dataclasses.replace(trial, attention=attention)
        return self.trials[key]

    def promise(self, case: Case) -> Promise:
        """The search's answer for the measured profile and the memory that the limit leaves."""
        command = [sys.executable, "-m", "costmodel.search", "--hardware", str(self._profile()), "--json", "-"]
        command += [*self._work(case), "--model", case.model]
        command += ["--compress-weights", "off", "--compress-cache", "off", "--save-policy", str(self._policy(case))]
        if case.fixed_batch is None:
            command += ["--max-latency", self.max_latency]
        else:
            command += [f"--gpu-batch-size={case.fixed_batch}", "--num-gpu-batches=1"]
        found = json.loads(self.checked_output(command))
        return Promise(
            throughput_tok_per_s=found["estimate"]["throughput_tok_per_s"],
            bound_tok_per_s=found["search"]["bound_tok_per_s"],
            policy=found["policy"],
        )

    def ours(self, case: Case, promise: Promise) -> Trial:
        """The promised policy, run by ``runtime.bench`` in the same limit; it prints a Measurement as JSON."""
        weights = self.folder / "tierwise"
        weights.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "runtime.bench", "--model", f"dummy:{case.model}", "--device", "cpu"]
        command += ["--dtype", "bfloat16"]
        command += [*self._work(case), "--policy", str(self._policy(case)), "--hardware", str(self._profile())]
        command += ["--offload-dir", str(weights), "--json", "-"]
        batch = promise.policy["gpu_batch_size"] * promise.policy["num_gpu_batches"]
        return self._trial(command, case, weights, batch, _throughput)

    def _policy(self, case: Case) -> Path:
        """Where the search leaves its policy for the runtime."""
        return self.folder / f"policy-{case.key}.json"

    def _work(self, case: Case) -> list[str]:
        """The flags that search and runtime share."""
        budget = case.limit_bytes - self.overhead_bytes
        memory = ["--gpu-memory", f"{budget}B", "--cpu-memory", "0GiB", "--usable-fraction", "1"]
        return [*memory, "--prompt-len", str(case.prompt_len), "--gen-len", str(case.gen_len)]

    def _trial(
        self, command: list[str], case: Case, weights: Path, batch: int, rate: Callable[[dict[str, Any]], float]
    ) -> Trial:
        """Run a command ``repeats`` times, cold and within the limit, until one fails."""
        rates: list[float] = []
        details: dict[str, Any] = {}
        for _ in range(self.repeats):
            stayed = evict(weights)
            if stayed > STAYED_BYTES:
                raise TierwiseError(
                    f"{weights}: {units.format_bytes(stayed)} stay in the page cache: another process uses these files"
                )
            run = run_limited(command, case.limit_bytes, timeout_s=self.timeout_s, env=self.environment, cwd=ROOT)
            if run.returncode != 0 or run.oom_killed:
                break
            details = _last_json(run)
            rates.append(rate(details))
        return Trial(
            batch=batch,
            tok_per_s=tuple(rates),
            ended=_ended(run),
            oom_killed=run.oom_killed,
            peak_bytes=run.peak_bytes,
            details=details,
        )

    def _profile(self) -> Path:
        """The given hardware file, or one that is measured now."""
        if self.hardware is None:
            print("measuring this machine …", file=sys.stderr)
            self.hardware = self.folder / "hardware.json"
            command = [sys.executable, "-m", "profiler", "--device", "cpu", "--out", str(self.hardware)]
            self.checked_output([*command, "--offload-dir", str(self.folder)])
        return self.hardware

    def checked_output(self, command: Sequence[str]) -> str:
        """Standard output of a command that runs without a limit; its last words where it fails."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TierwiseError(_tail(done.stderr) or f"{' '.join(command)}: exit code {done.returncode}")
        return done.stdout


def _throughput(said: dict[str, Any]) -> float:
    """Token/s of a Measurement."""
    return float(said["measured"]["throughput_tok_per_s"])


def _last_json(run: LimitedRun) -> dict[str, Any]:
    """The JSON document that ends a child's standard output, on one line or many."""
    start = run.stdout.find("{")
    try:
        found: dict[str, Any] = json.loads(run.stdout[start:]) if start >= 0 else {}
    except ValueError:
        found = {}
    if not found:
        raise TierwiseError(f"the child printed no JSON: {run.stdout[-200:]!r} {_tail(run.stderr)}")
    return found


def _ended(run: LimitedRun) -> str:
    failed = run.returncode > 0 and not run.oom_killed
    return f"{run.ended}: {_tail(run.stderr)}" if failed else run.ended


def _tail(text: str) -> str:
    return " / ".join(line.strip() for line in text.strip().splitlines()[-FAILED_LINES:])


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
        "hardware": "measured now" if args.hardware is None else str(args.hardware),
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
