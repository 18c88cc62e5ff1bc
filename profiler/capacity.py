"""What each tier may hold: what is free, or the budgets that were given."""

from dataclasses import dataclass

import torch

from costmodel import units
from costmodel.errors import InputError
from costmodel.units import GiB
from runtime import tiers
from runtime.host_memory import HostMemory, host_memory
from runtime.machine import HOST_SHARE, within

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
    host = host_memory()
    if host.available_bytes < LEAST_MEMORY_BYTES:
        raise InputError(
            f"only {units.format_bytes(host.available_bytes)} of host memory can be had ({host.limited_by}): "
            f"profiling needs {units.format_bytes(LEAST_MEMORY_BYTES)}"
        )
    share = HOST_SHARE * host.available_bytes
    default = f"{HOST_SHARE:.0%} of the {units.format_bytes(host.available_bytes)} that were available"
    gpu, cpu = gpu_memory_bytes, cpu_memory_bytes
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
        within("--gpu-memory", gpu, free, "free on the GPU")
        within("--cpu-memory", cpu, host.available_bytes, f"available in host memory ({host.limited_by})")
        gpu_bytes, gpu_origin = (free, "free on the GPU") if gpu is None else (gpu, "given as --gpu-memory")
        cpu_bytes, cpu_origin = (share, default) if cpu is None else (cpu, "given as --cpu-memory")
    else:
        second = 0.0 if cpu is None else cpu
        total = second + (0.0 if gpu is None else gpu)
        within("--gpu-memory plus --cpu-memory", total, host.available_bytes, f"available ({host.limited_by})")
        gpu_bytes, gpu_origin = (max(share - second, 0.0), default) if gpu is None else (gpu, "given as --gpu-memory")
        if gpu_bytes <= 0:
            raise InputError(
                f"--cpu-memory is {units.format_bytes(second)}: nothing is left for the first tier: it gets {default}"
            )
        cpu_bytes, cpu_origin = second, "not given: none" if cpu is None else "given as --cpu-memory"
    return Capacity(
        gpu_bytes=gpu_bytes,
        gpu_origin=gpu_origin,
        cpu_bytes=cpu_bytes,
        cpu_origin=cpu_origin,
        disk_bytes=float(disk_free_bytes),
        pinnable_bytes=pinnable(min(cpu_bytes, PIN_AT_MOST_BYTES)) if device.type == "cuda" else None,
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
