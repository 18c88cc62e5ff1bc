"""What a run takes of the machine's memory, by the kernel's count, against what was predicted and allowed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from costmodel.units import GiB
from costmodel.validation import Validation
from runtime.compiled_kernels import KEPT

ROOT = Path(__file__).resolve().parent.parent
HARDWARE = ROOT / "costmodel" / "catalog" / "hardware" / "cpu-laptop.json"

MiB = 2**20

CONSTANT_BYTES = 0.4 * GiB
"""What the process takes beside the budgets: interpreter, torch and its libraries (docs/runtime.md)."""


ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}
"""Other tests run beside these: threads that wait for one another spin where they should make room."""


def measured(folder: Path, *flags: str) -> tuple[dict, int]:
    """The Measurement of a bench in a process of its own, and that process's own peak."""
    program = (
        "import sys; from runtime.bench import main; code = main(sys.argv[1:]);"
        "status = open('/proc/self/status').read();"
        "print(status.split('VmHWM:')[1].split()[0], file=sys.stderr);"
        "sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "--offload-dir", str(folder), "--json", str(folder / "m.json")]
    done = subprocess.run(
        [*command, "--hardware", str(HARDWARE), "--device", "cpu", "--dtype", "bfloat16", *flags],
        capture_output=True,
        text=True,
        check=False,
        env=ONE_THREAD,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    # The peak is reset when a run begins: the kernel's mark is that of the run.
    return json.loads((folder / "m.json").read_text()), int(done.stderr.split()[-1]) * 1024


SHAPE = (
    "--prompt-len",
    "48",
    "--gen-len",
    "8",
    "--gpu-batch-size",
    "24",
    "--num-gpu-batches",
    "2",
    "--num-prompts",
    "96",
)
"""Two blocks: the second finds the kernels of the first one's decode in memory when its prefill is widest."""


@pytest.mark.parametrize(
    "flags",
    [
        ("--percent", "100", "0", "100", "0", "100", "0"),
        ("--percent", "30", "20", "40", "20", "100", "0", "--cpu-memory", "400MiB"),
        ("--percent", "60", "0", "50", "0", "50", "0", "--compress-weights", "on"),
        ("--percent", "50", "0", "30", "0", "100", "0", "--compress-cache", "on"),
    ],
    ids=["resident", "three tiers", "4-bit weights", "4-bit cache"],
)
def test_the_peak_is_the_predicted_one(flags: tuple[str, ...], tmp_path: Path) -> None:
    """OPT-350M, so that 5 % are more than the rounding of pages and heaps; and within the budgets and the constant."""
    found, peak = measured(tmp_path, "--model", "dummy:opt-350m", "--gpu-memory", "1500MiB", *SHAPE, *flags)
    predicted, own = found["predicted"]["peak_bytes"], found["measured"]["peak_bytes"]
    both = predicted["gpu"] + predicted["cpu"]
    assert own["gpu"] + own["cpu"] == pytest.approx(both, rel=0.05)
    assert peak <= both + CONSTANT_BYTES
    placed = found["resident_bytes"]
    for kind in ("weights", "cache"):
        total = sum(placed[tier][kind] for tier in placed)
        for tier in placed:
            share = found["policy"][kind][tier]
            assert placed[tier][kind] == pytest.approx(share * total, rel=0.02, abs=0.002 * total)


def test_every_token_needs_no_new_kernels(tmp_path: Path) -> None:
    """Products over a cache that grows by a token a step: one more compiled shape each would take 0.3 MiB to keep.

    All three tiers attend, 4-bit rooms and carried records, for 47 steps.
    """
    flags = ("--percent", "100", "0", "40", "30", "100", "0", "--cpu-memory", "200MiB", "--compress-weights", "on")
    shape = ("--prompt-len", "16", "--gen-len", "48", "--gpu-batch-size", "4", "--num-gpu-batches", "1")
    more = ("--compress-cache", "on", "--cpu-attention", "on")
    found, _ = measured(tmp_path, "--model", "dummy:opt-125m", "--gpu-memory", "500MiB", *shape, *flags, *more)
    peaks = (found[side]["peak_bytes"] for side in ("predicted", "measured"))
    predicted, own = (peak["gpu"] + peak["cpu"] for peak in peaks)
    assert own == pytest.approx(predicted, rel=0.05)


def test_a_budget_far_below_the_model_is_kept(tmp_path: Path) -> None:
    """The search plans within the budget, and the run stays within what was planned."""
    budget = 420 * MiB
    found, peak = measured(
        tmp_path,
        "--model",
        "dummy:opt-350m",
        "--gpu-memory",
        f"{budget}B",
        "--prompt-len",
        "32",
        "--gen-len",
        "8",
        "--num-prompts",
        "16",
    )
    assert found["policy"]["weights"]["disk"] > 0.2
    assert found["predicted"]["peak_bytes"]["gpu"] <= budget
    assert peak <= budget + CONSTANT_BYTES


def test_small_runs_take_what_was_planned(tmp_path: Path) -> None:
    """OPT-125M in 180 MiB: kernels and heap are a share of the peak there, whatever the policy.

    The first run of each type of weights converts the model in the process that runs it.
    """
    command = [sys.executable, "-m", "runtime.validate", "--hardware", str(HARDWARE), "--model", "dummy:opt-125m"]
    command += ["--gpu-memory", "180MiB", "--cpu-memory", "40MiB", "--prompt-len", "32", "--gen-len", "8"]
    command += ["--runs", "8", "--seed", "5", "--max-seconds", "3s", "--device", "cpu", "--dtype", "bfloat16"]
    command += ["--offload-dir", str(tmp_path), "--out", str(tmp_path / "v.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    runs = Validation.from_file(tmp_path / "v.json").measurements
    assert {one.policy.compress_weights for one in runs} == {True, False}
    errors = [one.predicted.peak_bytes["gpu"] / one.measured.peak_bytes["gpu"] - 1 for one in runs]
    assert max(map(abs, errors)) <= 0.05, errors


def test_a_shape_of_products_takes_little() -> None:
    """One of two caches would keep something of every shape for nothing: 0.3 MiB of 0.6."""
    program = """
import torch
from runtime import compiled_kernels
from runtime.memory_release import trim_heap
from runtime.memory_watch import process_memory

compiled_kernels.limit()
x, w = torch.ones((64, 768), dtype=torch.bfloat16), torch.ones((768, 768), dtype=torch.bfloat16)

def held():
    trim_heap()
    now = process_memory()
    return now.resident - now.files

def multiply(rows):
    for count in rows:
        torch.mm(x[:count], w)

multiply(range(1, 11))
before = held()
multiply(range(11, 51))
print((held() - before) / 40)
"""
    environment = {name: text for name, text in os.environ.items() if name not in KEPT}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 0.4 * MiB
