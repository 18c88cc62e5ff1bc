"""Giving freed memory back to the operating system."""

import ctypes


def trim_heap() -> None:
    """Return what the C library's allocator keeps of freed memory: up to 64 MiB at its heap's top, and holes below."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return  # another C library: nothing to ask
