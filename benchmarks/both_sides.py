"""Runs of both sides of the comparison with accelerate: each cold, in a process and a memory cgroup of its own."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.memory_cgroup import LimitedRun, run_limited
from benchmarks.page_cache import evict
from benchmarks.trials import Case, Promise, Run, Trial
from costmodel import units
from costmodel.errors import TierwiseError
from runtime.shared_cache import Watch

ROOT = Path(__file__).resolve().parent.parent

STAYED_BYTES = 16 * 2**20
"""More than this left in the page cache before a run would be memory outside of its limit."""

SPARE_RUNS = 2
"""How many more runs a trial may take where the cores of a virtual machine come apart meanwhile."""

FAILED_LINES = 3
"""The last lines of a failed child's standard error that are shown."""


Said = tuple[float, float]
"""Token/s, and the seconds of generation, after which a child ends at once."""


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
        self.looks: list[float] = []

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
            trial = self._trial(command, case, weights, batch, _of_accelerate)
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
        return self._trial(command, case, weights, batch, _of_ours)

    def _policy(self, case: Case) -> Path:
        """Where the search leaves its policy for the runtime."""
        return self.folder / f"policy-{case.key}.json"

    def _work(self, case: Case) -> list[str]:
        """The flags that search and runtime share."""
        budget = case.limit_bytes - self.overhead_bytes
        memory = ["--gpu-memory", f"{budget}B", "--cpu-memory", "0GiB", "--usable-fraction", "1"]
        return [*memory, "--prompt-len", str(case.prompt_len), "--gen-len", str(case.gen_len)]

    def _trial(
        self, command: list[str], case: Case, weights: Path, batch: int, said_of: Callable[[dict[str, Any]], Said]
    ) -> Trial:
        """Run a command cold and within the limit until ``repeats`` runs count, or one fails, or too many did not."""
        runs: list[Run] = []
        apart: list[Run] = []
        details: dict[str, Any] = {}
        while len(runs) < self.repeats and len(runs) + len(apart) < self.repeats + SPARE_RUNS:
            stayed = evict(weights)
            if stayed > STAYED_BYTES:
                raise TierwiseError(
                    f"{weights}: {units.format_bytes(stayed)} stay in the page cache: another process uses these files"
                )
            with Watch() as watch:
                ended = run_limited(command, case.limit_bytes, timeout_s=self.timeout_s, env=self.environment, cwd=ROOT)
                now = time.monotonic()
            if ended.returncode != 0 or ended.oom_killed:
                break
            document = _last_json(ended)
            rate, seconds = said_of(document)
            run = Run(tok_per_s=rate, looks=tuple(map(round, watch.between(now - seconds, now))))
            self.looks += run.looks
            is_apart = run.is_apart(self.looks)
            (apart if is_apart else runs).append(run)
            if not is_apart or not runs:
                details = document
        return Trial(
            batch=batch,
            runs=tuple(runs or apart),
            ended=_ended(ended),
            oom_killed=ended.oom_killed,
            peak_bytes=ended.peak_bytes,
            details=details,
            set_aside=tuple(apart if runs else ()),
            only_apart=bool(apart) and not runs,
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


def _of_accelerate(said: dict[str, Any]) -> Said:
    return float(said["tok_per_s"]), float(said["seconds"])


def _of_ours(said: dict[str, Any]) -> Said:
    """Of a Measurement."""
    return float(said["measured"]["throughput_tok_per_s"]), float(said["measured"]["job_s"])


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
