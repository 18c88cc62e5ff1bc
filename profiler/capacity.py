"""What each tier may hold: what is free, or the budgets that were given."""

from dataclasses import dataclass

import torch

from costmodel import units
from costmodel.errors import InputError
from costmodel.units import GiB
from runtime import tiers
from runtime.budgets import budgets, share_words
from runtime.host_memory import HostMemory

LEAST_MEMORY_BYTES = 2**30
"""Host memory that profiling needs."""

PIN_AT_MOST_BYTES = 8 * GiB
"""Pinning is tried up to here: it takes about 0.3 s a GiB."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Bytes that each tier may hold, and how each was set."""

    gpu_bytes: float
    gpu_origin: str
    cpu_bytes: float
    cpu_origin: str
    disk_bytes: float
    pinnable_bytes: float | None
    host: HostMemory


def capacity(
    device: torch.device, *, disk_free_bytes: int, gpu_memory_bytes: float | None, cpu_memory_bytes: float | None
) -> Capacity:
    """The tiers' sizes: budgets where given, else what is free."""
    names = ("--gpu-memory", "--cpu-memory")
    room = budgets(device, gpu_memory=gpu_memory_bytes, cpu_memory=cpu_memory_bytes, names=names)
    host = room.host
    if host.available_bytes < LEAST_MEMORY_BYTES:
        raise InputError(
            f"only {units.format_bytes(host.available_bytes)} of host memory can be had ({host.limited_by}): "
            f"profiling needs {units.format_bytes(LEAST_MEMORY_BYTES)}"
        )
    on_gpu, share = device.type == "cuda", share_words(host)
    defaults = ("free on the GPU", share) if on_gpu else (share, "not given: none")
    given = zip(names, (gpu_memory_bytes, cpu_memory_bytes), defaults, strict=True)
    gpu_origin, cpu_origin = (default if value is None else f"given as {name}" for name, value, default in given)
    return Capacity(
        gpu_bytes=room.gpu_bytes,
        gpu_origin=gpu_origin,
        cpu_bytes=room.cpu_bytes,
        cpu_origin=cpu_origin,
        disk_bytes=float(disk_free_bytes),
        pinnable_bytes=pinnable(min(room.cpu_bytes, PIN_AT_MOST_BYTES)) if on_gpu else None,
        host=host,
    )


def pinnable(most: float) -> float:
    """Host memory that CUDA lets itself pin, tried in steps up to ``most``; all of it is given back."""
    step = int(min(most, GiB))
    held: list[torch.Tensor] = []
    while step > 0 and (len(held) + 1) * step <= most:
        try:
            held.append(tiers.host_buffer(step, pinned=True))
        except InputError:
            break
    return float(len(held) * step)
