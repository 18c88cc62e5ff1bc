"""One profile: open the tiers, measure in rounds, give back every figure and what was found around them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from costmodel import units, words
from profiler import compute, engine, layers, links
from profiler.capacity import Capacity, capacity
from profiler.effort import Effort
from profiler.hidden_loads import HiddenLoads
from profiler.offload import Offload, measurement_file, offload_directory
from profiler.overlap import Overlap
from profiler.pairs import pairs
from profiler.steadiness import Steadiness
from profiler.timing import Probe, Results, Timer, run_rounds
from runtime import compiled_kernels, environment, tiers
from runtime.shared_cache import SharedWrite

PATIENCE_SHARE = 0.5
"""The share of the time that may be added to it by waiting for a steady machine."""

FILL_SHARE = 0.06
"""The share of the time in which the measurement file is written; a slow disk gets a shorter one."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to profile; ``None`` leaves a choice to the machine."""

    effort: Effort
    device: str = "auto"
    offload_dir: Path | None = None
    gpu_memory_bytes: float | None = None
    cpu_memory_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that was found."""

    results: Results
    device: torch.device
    dtype: torch.dtype
    capacity: Capacity
    offload: dict[str, Any]
    disk_settings: dict[str, dict[str, int]]
    environment: dict[str, Any]
    notes: list[str]
    seconds: float
    effort: Effort


def profile(request: Request, *, progress: Callable[[str], None], timer: Timer | None = None) -> Profile:
    """Measure this machine."""
    compiled_kernels.limit()  # as in a run
    device = tiers.select_device(request.device)
    steadiness = Steadiness(SharedWrite().rate, patience_s=PATIENCE_SHARE * request.effort.budget_s)
    if timer is None:
        timer = Timer(
            now=lambda: time.perf_counter() - steadiness.spent_s,
            synchronize=lambda: tiers.synchronize(device),
            steadiness=steadiness,
        )
    began = timer.now()
    load = environment.load_per_core()
    effort, dtype = request.effort, compute.compute_dtype(device)
    progress("the measurement file")
    directory = offload_directory(request.offload_dir)
    with measurement_file(directory, effort.file_bytes, limit_s=FILL_SHARE * effort.budget_s) as offload:
        room = capacity(
            device,
            disk_free_bytes=offload.free_bytes,
            gpu_memory_bytes=request.gpu_memory_bytes,
            cpu_memory_bytes=request.cpu_memory_bytes,
        )
        effort = effort.beyond(environment.cache_bytes()).within(room.host.available_bytes)
        if device.type == "cuda":
            effort = effort.within(torch.cuda.mem_get_info(device)[0])
        notes = _notes(load, offload)
        reads, writes = (
            links.DiskTransfers(link, offload, effort, lambda: _disk_buffer(offload, effort, device))
            for link in ("disk_read", "disk_write")
        )
        probes = _probes(device, dtype, effort, reads, writes, offload)
        left_s = max(1.0, effort.budget_s - (timer.now() - began))
        results = run_rounds(probes, timer=timer, budget_s=left_s, rounds=effort.rounds, progress=progress)
        return Profile(
            results=results,
            device=device,
            dtype=dtype,
            capacity=room,
            offload={
                "method": offload.method,
                "file_bytes": offload.nbytes,
                "free_bytes": offload.free_bytes,
                "direct": offload.file.direct,
                "reads_of": offload.origin,
            },
            disk_settings={"disk_read": reads.settings(), "disk_write": writes.settings()},
            environment=environment.describe(device, directory),
            notes=notes + _unsteady(steadiness),
            seconds=timer.now() - began + steadiness.spent_s,
            effort=effort,
        )


def _unsteady(steadiness: Steadiness) -> list[str]:
    """What a reader must know where the cores were apart at times."""
    if not steadiness.spent_s and not steadiness.kept_apart:
        return []
    kept = f", and {words.counted(steadiness.kept_apart, 'figure')} taken all the same" if steadiness.kept_apart else ""
    return [
        "the cores shared no cache at times, as the host of a virtual machine moves them: "
        f"{units.format_seconds(steadiness.spent_s)} were spent on waiting until they do{kept}; a run that meets the "
        "other state is slower"
    ]


def _notes(load: float, offload: Offload) -> list[str]:
    notes = []
    if load > 0.5:
        notes.append(
            f"this machine was busy over the last minute (load {load:.1f} a core): beside other programs figures are "
            "lower and wider than those of an idle machine"
        )
    if offload.file_system.in_memory:
        notes.append(
            f"{offload.directory} is on {offload.file_system.kind}, which lives in memory: its figures are not a "
            "disk's; name a directory on a disk with --offload-dir"
        )
    elif not offload.file.direct:
        notes.append(f"{offload.file_system.kind} takes no direct I/O: {offload.method}")
    return notes


def _disk_buffer(offload: Offload, effort: Effort, device: torch.device) -> torch.Tensor:
    nbytes = min(effort.disk_bytes[-1], offload.nbytes)
    return links.filled(tiers.host_buffer(nbytes, pinned=device.type == "cuda"))


def _probes(
    device: torch.device,
    dtype: torch.dtype,
    effort: Effort,
    reads: links.DiskTransfers,
    writes: links.DiskTransfers,
    offload: Offload,
) -> Sequence[Probe]:
    cuda = device.type == "cuda"
    rows = compute.rows_up_to(effort.most_rows_gpu if cuda else effort.most_rows_cpu, between=effort.in_detail)
    probes: list[Probe] = [
        links.MemoryCopies(device, effort),
        reads,
        writes,
        compute.Products(device, effort, dtype, rows, weight=22.0),
        compute.MemoryBound(device, effort),
        layers.PrefillAttention(device, effort, weight=7.0),
        layers.DecodeAttention(device, effort, weight=7.0),
        layers.Quantization(device, effort, weight=11.0),
        layers.CarriedAttention(device, effort, weight=3.0),
        layers.WholeLayer(device, effort, weight=2.0),
        engine.EngineLayers(device, effort, offload.directory, weight=9.0),
    ]
    if cuda:
        host = torch.device("cpu")  # which attends to a cache in the type that the GPU computes in
        probes += [
            layers.DecodeAttention(host, effort, weight=5.0, dtype=dtype),
            layers.Quantization(host, effort, weight=3.0, dtype=dtype),
        ]
    if effort.in_detail:
        others = [torch.bfloat16, torch.float32] if cuda else [torch.float32]
        probes += [compute.Products(device, effort, other, [1, 16, 256], weight=5.0) for other in others]
    probes += [
        HiddenLoads(
            device,
            effort,
            offload.directory,
            lambda: {"disk_threads": reads.threads, "chunk_bytes": reads.chunk_bytes},
            weight=14.0,
        ),
        Overlap(lambda: pairs(device, effort, offload, reads.settings()), weight=10.0),
    ]
    return probes
