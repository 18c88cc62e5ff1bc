"""What of a file lies in memory: dropping it, so that the next reader pays for it, and counting it."""

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np


def evict(*places: Path) -> int:
    """Write files (or all files in folders) out and drop them from the page cache; the bytes that stayed in memory.

    Bytes stay where another process maps them.
    """
    stayed = 0
    for place in places:
        for file in [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # dirty pages are not dropped
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                stayed += resident_bytes(descriptor)
            finally:
                os.close(descriptor)
    return stayed


def resident_bytes(descriptor: int) -> int:
    """Bytes of an open file in the page cache, as mincore(2) tells: a mapping that is never read changes nothing."""
    nbytes = os.fstat(descriptor).st_size
    if nbytes == 0:
        return 0
    resident = np.zeros(-(-nbytes // mmap.PAGESIZE), dtype=np.uint8)
    with mmap.mmap(descriptor, nbytes, prot=mmap.PROT_READ) as mapping:
        content = np.frombuffer(mapping, dtype=np.uint8)
        start, answer = (ctypes.c_void_p(array.ctypes.data) for array in (content, resident))
        failed = ctypes.CDLL(None, use_errno=True).mincore(start, ctypes.c_size_t(nbytes), answer)
        del content  # or the mapping could not be closed
    if failed:
        raise OSError(ctypes.get_errno(), "mincore")
    return int((resident & 1).sum()) * mmap.PAGESIZE
