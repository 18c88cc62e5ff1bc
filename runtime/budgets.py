"""Budgets: what the two memory tiers may hold, given or what is free."""

from dataclasses import dataclass

import torch

from costmodel import units
from costmodel.errors import InputError
from runtime.host_memory import HostMemory, host_memory

HOST_SHARE = 0.8
"""The share of the host memory that is available which tiers get unless a budget is given."""


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes of the two memory tiers, and the host memory as it was found."""

    gpu_bytes: float
    cpu_bytes: float
    host: HostMemory


def budgets(
    device: torch.device,
    *,
    gpu_memory: float | None,
    cpu_memory: float | None,
    names: tuple[str, str] = ("gpu_memory", "cpu_memory"),
) -> Budgets:
    """The tiers' bytes; ``None`` is what is free on the GPU, and a share of host memory.

    Without a GPU both tiers are host memory: the second has none unless it is given, the first what the second leaves
    of the share. Raises :class:`InputError`, in which the budgets are called by ``names``, where there is less.
    """
    host = host_memory()
    share, where = HOST_SHARE * host.available_bytes, f"available ({host.limited_by})"
    if device.type == "cuda":
        free = float(torch.cuda.mem_get_info(device)[0])
        _within(names[0], gpu_memory, free, "free on the GPU")
        _within(names[1], cpu_memory, host.available_bytes, where)
        gpu_bytes, cpu_bytes = free if gpu_memory is None else gpu_memory, share if cpu_memory is None else cpu_memory
        return Budgets(gpu_bytes=gpu_bytes, cpu_bytes=cpu_bytes, host=host)
    given = [(name, value) for name, value in zip(names, (gpu_memory, cpu_memory), strict=True) if value]
    _within(" plus ".join(name for name, _ in given), sum(value for _, value in given), host.available_bytes, where)
    second = 0.0 if cpu_memory is None else cpu_memory
    first = share - second if gpu_memory is None else gpu_memory
    if first <= 0:
        raise InputError(
            f"{names[1]} is {units.format_bytes(second)}: nothing is left for the first tier: it gets "
            f"{share_words(host)}"
        )
    return Budgets(gpu_bytes=first, cpu_bytes=second, host=host)


def share_words(host: HostMemory) -> str:
    """What a tier gets of host memory where no budget is given: ``"80% of the 10 GiB that were available"``."""
    return f"{HOST_SHARE:.0%} of the {units.format_bytes(host.available_bytes)} that were available"


def _within(what: str, given: float | None, most: float, where: str) -> None:
    """Raise :class:`InputError` where a budget is more than there is; both in bytes."""
    if given is not None and given > most:
        raise InputError(f"{what} is {units.format_bytes(given)}: only {units.format_bytes(most)} are {where}")
