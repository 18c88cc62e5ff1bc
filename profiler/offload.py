"""The measurement file: on the offload directory, sized against its free space, gone on any exit."""

import contextlib
import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from costmodel import units
from costmodel.errors import InputError
from runtime import image_store, tiers
from runtime.disk import DiskError, DiskFile, DiskPool
from runtime.environment import FileSystem, file_system

LEAST_BYTES = 64 * 2**20
"""A smaller file would be measured in too few transfers."""

LONG_BYTES = 2**30
"""A file of this length does for any measurement of reads."""

FREE_SHARE = 0.25
"""The most of the free space that the measurement file takes."""

_SEED = 20


def offload_directory(given: Path | None) -> Path:
    """The directory to measure in: the given one, else the first temporary one that is on a disk."""
    if given is not None:
        _check(given)
        return given
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    usable = [path for path in candidates if path.is_dir() and os.access(path, os.W_OK)]
    if not usable:
        raise InputError("no temporary directory can be written: name one with --offload-dir")
    return next((path for path in usable if not file_system(path).in_memory), usable[0])


def _check(path: Path) -> None:
    if not path.exists():
        raise InputError(f"--offload-dir is {path}: there is no such folder")
    if not path.is_dir():
        raise InputError(f"--offload-dir is {path}: that is a file, a folder is expected")


def free_bytes(directory: Path) -> int:
    """What an ordinary user may still write there."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def file_bytes(free: int, wanted: int, directory: Path) -> int:
    """The length of the measurement file: ``wanted``, or less where the disk is nearly full."""
    most = int(free * FREE_SHARE) // LEAST_BYTES * LEAST_BYTES
    if most < LEAST_BYTES:
        raise InputError(
            f"--offload-dir is {directory}: it has {units.format_bytes(free)} free, and the measurement needs "
            f"{units.format_bytes(LEAST_BYTES / FREE_SHARE)} (its file takes at most a quarter of what is free)"
        )
    return min(wanted, most)


class Offload:
    """The open measurement file and what is known of the disk below it.

    ``read_from`` is the file that reads are timed on, of ``read_bytes``: an image, or the measurement file itself.
    """

    def __init__(
        self, *, directory: Path, file: DiskFile, nbytes: int, free: int, read_from: DiskFile, read_bytes: int
    ) -> None:
        self.directory, self.file, self.nbytes, self.free_bytes = directory, file, nbytes, free
        self.read_from, self.read_bytes = read_from, read_bytes
        self.file_system: FileSystem = file_system(directory)

    @property
    def origin(self) -> str:
        """What reads were timed on; files of results are passed on, so no folder of this machine is named."""
        if self.read_from is self.file:
            return "the measurement file"
        return f"{self.read_from.path.parent.name}/{self.read_from.path.name}"

    @property
    def method(self) -> str:
        """How the figures were kept free of the page cache."""
        if self.file.direct:
            return "direct I/O (O_DIRECT), past the page cache"
        return "buffered I/O with the pages dropped before each read (posix_fadvise) and written out after each write"


@contextmanager
def measurement_file(directory: Path, wanted: int, *, limit_s: float = math.inf) -> Iterator[Offload]:
    """A file full of random bytes whose name is removed at once: not even SIGKILL leaves it behind.

    It is ``wanted`` bytes long, or as long as could be written in ``limit_s``, but :data:`LEAST_BYTES` at least.
    """
    free = free_bytes(directory)
    nbytes = file_bytes(free, wanted, directory)
    name: str | None = None
    try:
        fd, name = tempfile.mkstemp(prefix=".tierwise-profile-", dir=directory)
        os.close(fd)
        file = DiskFile(name, writable=True)
    except OSError as error:
        raise InputError(f"--offload-dir is {directory}: no file can be written there: {error.strerror}") from None
    finally:
        if name is not None:
            Path(name).unlink(missing_ok=True)
    with file:
        try:
            file.allocate(nbytes)
            nbytes = _fill(file, nbytes, limit_s)
        except DiskError as error:
            raise InputError(f"--offload-dir is {directory}: the measurement file cannot be written: {error}") from None
        image = _image(directory, nbytes)
        with contextlib.ExitStack() as opened:
            read_from = file if image is None else opened.enter_context(DiskFile(image))
            read_bytes = nbytes if image is None else read_from.nbytes
            yield Offload(
                directory=directory, file=file, nbytes=nbytes, free=free, read_from=read_from, read_bytes=read_bytes
            )


def _image(directory: Path, least_bytes: int) -> Path | None:
    """The longest image that the runtime keeps in the directory, if it is as long as the measurement file or 1 GiB.

    Weights are read long after they were written; what was just written is read faster from many a disk and from every
    virtual one, whose host still holds it in memory (2.5 against 2.2 GB/s here, an hour later).
    """
    sizes = {path: path.stat().st_size for path in image_store.images(directory)}
    longest = max(sizes, key=lambda path: sizes[path], default=None)
    return longest if longest is not None and sizes[longest] >= min(least_bytes, LONG_BYTES) else None


def _fill(file: DiskFile, nbytes: int, limit_s: float) -> int:
    """Write random bytes, so that neither compression nor unwritten blocks flatter what follows; how many."""
    block = tiers.host_buffer(min(nbytes, LEAST_BYTES))
    random = np.random.default_rng(_SEED).bytes(2**20)
    block.copy_(torch.frombuffer(bytearray(random), dtype=torch.uint8).repeat(block.nbytes // 2**20))
    written, end = 0, time.monotonic() + limit_s
    with DiskPool() as pool:
        while written < nbytes and (written == 0 or time.monotonic() < end):
            pool.write(file, written, block).synchronize()
            written += block.nbytes
    file.flush()
    return written
