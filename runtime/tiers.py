"""Memory of the first two tiers: buffers on the device, and aligned (on CUDA: pinned) buffers in host memory.

On a machine without a GPU the first tier is host memory as well (``torch.device("cpu")``): the same calls
serve both, and copies between the two tiers are real copies.
"""

import contextlib
import errno
import mmap
from collections.abc import Iterable
from typing import Any

import torch

from costmodel import units
from costmodel.errors import InputError

ALIGNMENT = 4096
"""Addresses, offsets and lengths that are multiples of this suit direct I/O on every common disk."""

DEVICES = ("auto", "cuda", "cpu")

HUGE_PAGE_BYTES = 2 * 2**20


def select_device(name: str = "auto") -> torch.device:
    """The first tier's device: ``"cuda"``, ``"cpu"``, or whichever of them this machine has first."""
    if name not in DEVICES:
        raise InputError(f"device is {name!r}: one of {', '.join(DEVICES)} is expected")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError(f"device is 'cuda': torch {torch.__version__} sees no CUDA device here (use 'cpu')")
    return torch.device("cuda", torch.cuda.current_device())


def round_up(nbytes: int, multiple: int = ALIGNMENT) -> int:
    """The least multiple that holds ``nbytes``."""
    return -(-nbytes // multiple) * multiple


def side_by_side(sizes: Iterable[int], multiple: int = ALIGNMENT) -> tuple[list[int], int]:
    """Where parts of these sizes begin in one buffer or file, each at a multiple, and the bytes of all."""
    offsets, total = [], 0
    for size in sizes:
        offsets.append(total)
        total += round_up(size, multiple)
    return offsets, total


class _Map(mmap.mmap):
    """Anonymous memory that is unpinned before it is unmapped, once the last tensor over it is gone."""

    pinned_at: int | None = None

    def __del__(self) -> None:
        if self.pinned_at is not None:
            cudart().cudaHostUnregister(self.pinned_at)


def cudart() -> Any:
    """The CUDA runtime's bindings, which torch does not type."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return runtime


def host_buffer(nbytes: int, *, pinned: bool = False) -> torch.Tensor:
    """``nbytes`` of host memory as a flat uint8 tensor, page-aligned and zeroed.

    ``pinned`` registers the memory with CUDA, so that copies run asynchronously at the link's full rate.
    Unlike torch's pinned allocator it takes exactly the bytes asked for, not the next power of two, and
    gives them back when the last tensor over them is gone. Memory that cannot be had is an
    :class:`~costmodel.errors.InputError`.
    """
    if nbytes < 0:
        raise InputError(f"nbytes is {nbytes}: it must be at least 0")
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    try:
        mapped = _Map(-1, round_up(nbytes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, ValueError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.errno != errno.ENOMEM else "there is not enough"
        raise InputError(f"{units.format_bytes(nbytes)} of host memory cannot be allocated: {reason}") from None
    if nbytes >= HUGE_PAGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: small ones do
            # They halve the requests that direct I/O is cut into (measured: reads 1.5 to 2.4 GB/s on a virtual disk).
            mapped.madvise(mmap.MADV_HUGEPAGE)
    buffer = torch.frombuffer(mapped, dtype=torch.uint8)
    if pinned:
        code = int(cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0))
        if code != 0:
            _forget_error()
            raise InputError(f"{units.format_bytes(nbytes)} of host memory cannot be pinned: CUDA error {code}")
        mapped.pinned_at = buffer.data_ptr()
    return buffer[:nbytes]


def _forget_error() -> None:
    """Take a refusal out of CUDA's memory, where the next kernel's check would find it and take it for its own."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device="cuda")


def device_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` of the first tier as a flat uint8 tensor, contents undefined.

    Memory that cannot be had is an :class:`~costmodel.errors.InputError`.
    """
    if device.type == "cpu":
        return host_buffer(nbytes)
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        free, total = (units.format_bytes(size) for size in torch.cuda.mem_get_info(device))
        raise InputError(
            f"{units.format_bytes(nbytes)} of GPU memory cannot be allocated: {free} of {total} are free"
        ) from None


def view(buffer: torch.Tensor, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """The first bytes of a flat uint8 buffer as a tensor of ``shape``; nothing is copied."""
    values = 1
    for extent in shape:
        values *= extent
    nbytes = values * dtype.itemsize
    if nbytes > buffer.nbytes:
        raise InputError(f"shape {tuple(shape)} of {dtype} takes {nbytes} bytes: the buffer has {buffer.nbytes}")
    return buffer[:nbytes].view(dtype).view(*shape)


def synchronize(device: torch.device) -> None:
    """Wait for everything launched on the device; on the CPU nothing is ever pending."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
