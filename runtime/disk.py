"""The third tier: direct I/O between files and host memory, several pieces in flight.

Data goes past the page cache (``O_DIRECT``) where the file system takes it, and otherwise through it with the
pages dropped behind (``posix_fadvise``), so that what the policy keeps on disk does not take host memory.
Any offset and length will do: the unaligned ends of a transfer take the buffered way.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch

from costmodel import units
from costmodel.errors import TierwiseError
from costmodel.formulations.base import Resource
from runtime.pending import OnThreads
from runtime.tiers import ALIGNMENT

IN_FLIGHT_BYTES = 16 * 2**20
"""The most that is asked of the disk at a time. It serves all of that side by side: with 128 MiB (8 threads, 16 MiB
each) a layer's load shares the disk with the one that begins after it, both arrive late together, and nothing is left
to read while the first of them is computed. A step of OPT-1.3B with 45 % of its weights on disk took 0.76 to 0.80 s so,
and 0.60 to 0.72 with 32 MiB or less in flight (two AMD EPYC cores; the disk alone needs 0.48)."""

DEFAULT_CHUNK_BYTES = 4 * 2**20
DEFAULT_THREADS = IN_FLIGHT_BYTES // DEFAULT_CHUNK_BYTES

Observer = Callable[[Resource, str, float, float, int], None]
"""Told of every piece that was moved: the link, what it was for, start and stop (s), bytes."""

_NOT_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class DiskError(TierwiseError):
    """The disk failed, is full, or holds less than it should: names the file, the place and the reason."""

    exit_code = 5


@dataclass(frozen=True)
class Piece:
    """Bytes ``start`` to ``stop`` of a transfer, which one call moves."""

    start: int
    stop: int
    direct: bool


def pieces(offset: int, nbytes: int, address: int, *, chunk_bytes: int, direct: bool) -> Iterator[Piece]:
    """Cut a transfer at multiples of ``chunk_bytes`` of the file; its unaligned ends are not direct.

    ``address`` is where it starts in memory. Direct I/O needs offset and address equally misaligned.
    """
    direct = direct and (address - offset) % ALIGNMENT == 0
    head = min(-offset % ALIGNMENT, nbytes) if direct else 0
    tail = max(head, nbytes - (offset + nbytes) % ALIGNMENT) if direct else nbytes
    if head:
        yield Piece(0, head, direct=False)
    start = head
    while start < tail:
        stop = min(tail, start + chunk_bytes - (offset + start) % chunk_bytes)
        yield Piece(start, stop, direct)
        start = stop
    if tail < nbytes:
        yield Piece(tail, nbytes, direct=False)


class DiskFile:
    """One open file of the offload directory.

    ``direct`` says whether its data bypasses the page cache; it turns ``False`` where the file system
    refuses. ``writable`` creates the file where it is missing. Use as a context manager, or call
    :meth:`close`.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = False, direct: bool = True) -> None:
        self.path = Path(path)
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        self._direct_fd: int | None = None
        try:
            self._fd = os.open(self.path, flags | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be opened: {error.strerror}") from None
        try:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: transfers are whole already
            if direct and hasattr(os, "O_DIRECT"):
                self._direct_fd = os.open(self.path, (flags & ~os.O_CREAT) | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                os.close(self._fd)
                raise DiskError(f"{self.path}: cannot be opened: {error.strerror}") from None
        self.direct = self._direct_fd is not None

    @property
    def nbytes(self) -> int:
        """The file's present length."""
        return os.fstat(self._fd).st_size

    def allocate(self, nbytes: int) -> None:
        """Make the file at least this long, its blocks taken now; a full disk is a :class:`DiskError`."""
        try:
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            if error.errno not in _NOT_DIRECT:
                raise self.failed(f"reserving {units.format_bytes(nbytes)}", error) from None
            if nbytes > self.nbytes:
                os.ftruncate(self._fd, nbytes)

    def flush(self) -> None:
        """Return once what was written is on the disk."""
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            raise self.failed("flushing", error) from None

    def drop_cache(self) -> None:
        """Write out and forget the file's pages, so that the next read comes from the disk."""
        self.flush()
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def read(self, into: memoryview, offset: int, *, direct: bool) -> None:
        """Fill ``into`` from ``offset`` on; returns when it is full."""
        self._move(os.preadv, "reading", into, offset, direct)
        if not direct or not self.direct:
            os.posix_fadvise(self._fd, offset, len(into), os.POSIX_FADV_DONTNEED)

    def write(self, out_of: memoryview, offset: int, *, direct: bool) -> None:
        """Write all of ``out_of`` at ``offset``."""
        self._move(os.pwritev, "writing", out_of, offset, direct)

    def _move(self, call: object, doing: str, buffer: memoryview, offset: int, direct: bool) -> None:
        moved = 0
        while moved < len(buffer):
            # After a short transfer the rest may be misaligned: it goes the buffered way.
            use_direct = direct and self.direct and moved % ALIGNMENT == 0
            fd = self._direct_fd if use_direct and self._direct_fd is not None else self._fd
            try:
                count: int = call(fd, [buffer[moved:]], offset + moved)  # type: ignore[operator]
            except OSError as error:
                if use_direct and error.errno in _NOT_DIRECT:
                    self.direct = False  # the file system opens with O_DIRECT but does not serve it
                    continue
                place = f"{doing} {units.format_bytes(len(buffer))} at byte {offset}"
                raise self.failed(place, error) from None
            if count == 0:
                raise DiskError(
                    f"{self.path}: {doing} {units.format_bytes(len(buffer))} at byte {offset} ended after "
                    f"{moved} bytes: the file has only {self.nbytes} bytes"
                )
            moved += count

    def failed(self, doing: str, error: OSError) -> DiskError:
        """The error that names this file."""
        return DiskError(f"{self.path}: {doing} failed: {error.strerror or error}")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        for fd in (self._direct_fd, self._fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._direct_fd, self._fd = None, -1

    def __enter__(self) -> "DiskFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class DiskPool:
    """Threads that read and write files; ``threads`` pieces of ``chunk_bytes`` are in flight at a time.

    ``observer`` is told of every piece, by the thread that moved it. Leaving the context after an error
    drops what has not begun, and waits for what has.
    """

    def __init__(
        self,
        *,
        threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
        observer: Observer | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError(f"threads is {threads}: it must be at least 1")
        if chunk_bytes < ALIGNMENT or chunk_bytes % ALIGNMENT:
            raise ValueError(f"chunk_bytes is {chunk_bytes}: it must be a multiple of {ALIGNMENT}")
        self.threads, self.chunk_bytes, self._observer = threads, chunk_bytes, observer
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tierwise-disk")

    def read(
        self, file: DiskFile, offset: int, into: torch.Tensor, *, direct: bool = True, name: str = "read"
    ) -> OnThreads:
        """Start filling a contiguous host tensor from ``offset`` on; ``direct=False``: through the page cache."""
        return self._start("disk_read", file, offset, into, direct, name)

    def write(
        self, file: DiskFile, offset: int, out_of: torch.Tensor, *, direct: bool = True, name: str = "write"
    ) -> OnThreads:
        """Start writing a contiguous host tensor at ``offset``; ``direct=False``: into the page cache."""
        return self._start("disk_write", file, offset, out_of, direct, name)

    def read_pages(
        self, file: DiskFile, places: Sequence[tuple[int, int]], into: torch.Tensor, *, name: str = "read"
    ) -> OnThreads:
        """Start reading many small (offset, bytes) one behind the other into a contiguous host tensor.

        Every thread takes a share of them: to hand each over by itself takes three times as long as reading a page.
        """
        buffer, address = _memory(into), into.data_ptr()
        shares: list[list[tuple[int, memoryview, bool]]] = [[] for _ in range(min(self.threads, len(places)))]
        start = 0
        for number, (offset, nbytes) in enumerate(places):
            share = shares[number * len(shares) // len(places)]
            for piece in pieces(offset, nbytes, address + start, chunk_bytes=self.chunk_bytes, direct=file.direct):
                share.append((offset + piece.start, buffer[start + piece.start : start + piece.stop], piece.direct))
            start += nbytes

        def moved(share: list[tuple[int, memoryview, bool]]) -> None:
            began = time.perf_counter()
            for offset, part, direct in share:
                file.read(part, offset, direct=direct)
            self._observe("disk_read", name, began, sum(len(part) for _, part, _ in share))

        return OnThreads(self._pool, [partial(moved, share) for share in shares])

    def _observe(self, link: Resource, name: str, began: float, nbytes: int) -> None:
        if self._observer is not None:
            self._observer(link, name, began, time.perf_counter(), nbytes)

    def _start(
        self, link: Resource, file: DiskFile, offset: int, tensor: torch.Tensor, direct: bool, name: str
    ) -> OnThreads:
        buffer, move = _memory(tensor), file.read if link == "disk_read" else file.write
        cut = pieces(
            offset, tensor.nbytes, tensor.data_ptr(), chunk_bytes=self.chunk_bytes, direct=direct and file.direct
        )

        def moved(piece: Piece) -> None:
            began = time.perf_counter()
            move(buffer[piece.start : piece.stop], offset + piece.start, direct=piece.direct)
            self._observe(link, name, began, piece.stop - piece.start)

        return OnThreads(self._pool, [partial(moved, piece) for piece in cut])

    def close(self, *, cancel: bool = False) -> None:
        """End the threads when what was started is done; ``cancel`` drops what has not begun."""
        self._pool.shutdown(wait=True, cancel_futures=cancel)

    def __enter__(self) -> "DiskPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=error is not None)


def _memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor, shared."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError("disk transfers need a contiguous tensor in host memory")
    if tensor.nbytes == 0:
        return memoryview(b"")
    return tensor.view(-1).view(torch.uint8).numpy().data
