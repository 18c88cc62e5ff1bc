"""The profiler's disk, copy and matmul rates beside fio and plain torch loops.

``python -m benchmarks.profiler_against_others``

Both sides take turns, so that a machine whose speed drifts serves both alike; printed are the medians, and the
median of the ratios of neighbouring turns, which should lie within 15 % of 1. fio (Debian: ``apt-get install
fio``) reads and writes with libaio, 8 requests of 4 MiB in flight; without fio those lines are left out.

The runtime's buffers lie in huge pages, which lets the kernel cut direct I/O into fewer requests. fio takes huge
pages only from a reserved pool: run as root, this benchmark reserves 64 of them while it runs; without them, fio is
slower and the line says "small pages".
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from costmodel import units, words
from profiler.compute import Products, compute_dtype, random_weights
from profiler.effort import EFFORTS, MiB
from profiler.hardware import line
from profiler.links import DiskTransfers, MemoryCopies, filled
from profiler.offload import measurement_file, offload_directory
from profiler.timing import Results, Timer
from runtime import environment, tiers

ROWS = 256
FILE_BYTES = 1024 * MiB
TOLERANCE = 0.15


@contextmanager
def huge_pages(count: int) -> Iterator[bool]:
    """Whether that many huge pages could be reserved; as many as before are left behind."""
    setting = Path("/proc/sys/vm/nr_hugepages")
    try:
        before = int(setting.read_text())
        setting.write_text(str(max(before, count)))
    except OSError:
        yield False
        return
    try:
        yield int(setting.read_text()) >= count
    finally:
        setting.write_text(str(before))


def fio(file: Path, mode: str, seconds: float, *, huge: bool) -> float:
    """Bytes/s of sequential direct I/O."""
    command = ["fio", "--name=x", f"--filename={file}", f"--size={FILE_BYTES}", f"--rw={mode}", "--bs=4m", "--direct=1"]
    command += ["--ioengine=libaio", "--iodepth=8", "--time_based", f"--runtime={seconds:.1f}s", "--output-format=json"]
    command += ["--invalidate=1", "--fallocate=none"]
    if huge:
        command += ["--mem=mmaphuge", "--hugepage-size=2m"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[mode]["bw_bytes"])


def torch_copy(seconds: float) -> float:
    """Bytes/s of one thread's ``Tensor.copy_`` per core, over memory that no cache holds."""
    source, target = filled(tiers.host_buffer(256 * MiB)), filled(tiers.host_buffer(256 * MiB))
    return source.nbytes / _seconds(lambda: target.copy_(source), seconds)


def torch_matmul(hidden: int, ffn: int, dtype: torch.dtype, seconds: float) -> float:
    """FLOP/s of ``x @ w.T`` over the three shapes of a layer."""
    cpu = torch.device("cpu")
    weights = [random_weights(*shape, dtype, cpu) for shape in ((hidden, hidden), (ffn, hidden), (hidden, ffn))]
    states = {width: random_weights(ROWS, width, dtype, cpu) for width in (hidden, ffn)}
    flops = sum(2.0 * w.numel() * ROWS for w in weights)
    return flops / _seconds(lambda: [states[w.shape[1]] @ w.t() for w in weights], seconds)


def _seconds(body: Callable[[], object], budget_s: float) -> float:
    """Median seconds of a call: a plain loop, nothing of the profiler's."""
    body()
    taken, end = [], time.perf_counter() + budget_s
    while time.perf_counter() < end or len(taken) < 3:
        start = time.perf_counter()
        body()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> int:
    """Take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=0.8, help="of each side in each turn")
    parser.add_argument("--offload-dir", type=Path, default=None)
    args = parser.parse_args()
    device, effort, timer = torch.device("cpu"), EFFORTS["default"], Timer()
    dtype = compute_dtype(device)
    directory = offload_directory(args.offload_dir)
    print(
        f"{environment.cpu_name()}, {words.counted(environment.usable_cores(), 'core')}, "
        f"load {environment.load_per_core():.1f} a core; "
        f"torch {torch.__version__}; {directory} on {environment.file_system(directory).kind}; "
        f"commit {environment.commit()}, {environment.today()}; {args.turns} turns of {args.seconds:g} s"
    )
    pairs: dict[str, list[tuple[float, float]]] = {}
    with (
        measurement_file(directory, FILE_BYTES) as offload,
        tempfile.TemporaryDirectory(dir=directory) as folder,
        huge_pages(64) as huge,
    ):
        file = Path(folder, "fio")
        if shutil.which("fio"):
            fio(file, "write", 1.0, huge=huge)
        buffer = filled(tiers.host_buffer(effort.disk_bytes[-1]))
        for turn in range(args.turns):
            print(f"turn {turn + 1} of {args.turns}", file=sys.stderr)
            for name, mode in (("disk_read", "read"), ("disk_write", "write")):
                if not shutil.which("fio"):
                    continue
                results = Results()
                results.add(DiskTransfers(name, offload, effort, lambda: buffer).run(timer, args.seconds, Results()))
                ours = line(results.select(name, method="direct" if offload.file.direct else "buffered")).bytes_per_s
                pairs.setdefault(f"{name} against fio" + ("" if huge else ", small pages"), []).append(
                    (ours, fio(file, mode, args.seconds, huge=huge))
                )
            results = Results()
            results.add(MemoryCopies(device, effort, environment.usable_cores()).run(timer, args.seconds, Results()))
            ours = line(results.select("cpu_to_gpu", memory="host")).bytes_per_s
            pairs.setdefault("memory copy against Tensor.copy_", []).append((ours, torch_copy(args.seconds)))
            products = Products(device, effort, dtype, [ROWS], weight=1.0)
            results.add(products.run(timer, args.seconds, Results()))
            plain = torch_matmul(effort.hidden_size, effort.ffn_size, dtype, args.seconds)
            pairs.setdefault(f"matmul, {ROWS} rows, against x @ w.T", []).append(
                (results.select("matmul")[0].median, plain)
            )
    print(f"{'':<36}{'profiler':>16}{'other':>16}{'ratio':>8}   within {TOLERANCE:.0%}")
    within = True
    for name, found in pairs.items():
        ours, other = (statistics.median(side) for side in zip(*found, strict=True))
        ratio = statistics.median(a / b for a, b in found)
        good = abs(ratio - 1) <= TOLERANCE
        within &= good
        dimension: units.Dimension = "FLOP/s" if "matmul" in name else "bytes/s"
        shown = (units.format_rate(value, dimension) for value in (ours, other))
        print(f"{name:<36}" + "".join(f"{text:>16}" for text in shown) + f"{ratio:>8.2f}   {'yes' if good else 'NO'}")
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
