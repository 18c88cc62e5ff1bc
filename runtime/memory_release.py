"""Giving freed memory back to the operating system, so that what one run held is not taken for the next one's."""

import ctypes
import gc

import torch


def release() -> None:
    """Return what is freed but kept: by Python, by the C library's allocator and by torch's on CUDA."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim_heap()


def trim_heap() -> None:
    """Return what the C library's allocator keeps of freed memory: up to 64 MiB at its heap's top, and holes below."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library: nothing to ask
