"""What a run takes of the machine's memory, as the operating system and the allocator count it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch

from runtime.memory_release import trim_heap

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Bytes of this process that are in memory: now, at the most, and the part that is files' (programs, libraries)."""

    resident: int
    peak: int
    files: int


class MemoryWatch:
    """Peak bytes above what the process held when the watch began.

    On CUDA the first tier is counted by torch's allocator and host memory by the kernel. Elsewhere both
    tiers are host memory, which the kernel counts as one. Pages of programs and libraries are left out: the
    kernel takes them back when it needs the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        trim_heap()  # what a conversion freed would be taken again, and not be seen
        _reset_peak()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = process_memory()
        self.baseline_bytes = before.resident - before.files

    def peak_bytes(self) -> dict[str, int]:
        """Peaks by tier since the watch began; without a GPU ``"gpu"`` is the host memory of both tiers."""
        now = process_memory()
        host = max(now.peak - now.files, now.resident - now.files) - self.baseline_bytes
        if self._device.type == "cuda":
            return {"gpu": torch.cuda.max_memory_allocated(self._device), "cpu": host}
        return {"gpu": host}


def process_memory() -> ProcessMemory:
    """This process's memory; zeros where the system does not tell."""
    try:
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return ProcessMemory(resident=0, peak=0, files=0)
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM", "RssFile"))}
    return ProcessMemory(
        resident=kib.get("VmRSS", 0) * 1024, peak=kib.get("VmHWM", 0) * 1024, files=kib.get("RssFile", 0) * 1024
    )


def _reset_peak() -> None:
    """Let the kernel's peak start from now; without the right to, it is the whole process's."""
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text(_RESET_PEAK, encoding="ascii")
