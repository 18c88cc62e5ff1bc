"""What files hold, as SHA-256: computed once, and remembered for as long as a file stays as it is.

SHA-256 is the fastest of the standard library's on a processor that has instructions for it (1.7 GB/s against
BLAKE2b's 0.6 on one core of an AMD EPYC).
"""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from costmodel import records
from costmodel.errors import InputError
from runtime.disk import DiskFile, DiskPool
from runtime.file_lock import FileLock
from runtime.tiers import host_buffer

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes of it are done, and how many there are."""

Mark = list[int]
"""By which a file is recognised: length, time of last change of its content and of its inode, inode."""

SCHEMA = "tierwise.hashes/1"

CHUNK_BYTES = 32 * 2**20

SETTLED_NS = 2 * 10**9
"""A file that changed less than this ago might change again within one tick of its clock: it is not remembered."""


def hashes(paths: Sequence[Path], *, memory: Path, progress: Progress | None = None) -> dict[Path, str]:
    """The SHA-256 of every file; ``memory`` is the JSON file in which they are remembered.

    Raises :class:`~costmodel.errors.InputError` if a file changes while it is read.
    """
    known = _read(memory)
    marks = {path: mark(path) for path in paths}
    found = {path: known[os.path.realpath(path)][-1] for path in paths if _is_known(path, marks[path], known)}
    new = [path for path in paths if path not in found]
    total_bytes, done_bytes = sum(marks[path][0] for path in new), 0

    def report(nbytes: int) -> None:
        nonlocal done_bytes
        done_bytes += nbytes
        if progress is not None:
            progress("hashing", done_bytes, total_bytes)

    with DiskPool() as pool:
        for path in new:
            found[path] = _digest(path, pool, report)
            check_unchanged(path, marks[path])
    _remember({path: [*marks[path], found[path]] for path in new}, memory)
    return found


def mark(path: Path) -> Mark:
    """What tells whether a file has changed."""
    try:
        there = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    return [there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino]


def check_unchanged(path: Path, before: Mark) -> None:
    """Raise :class:`~costmodel.errors.InputError` if a file is no longer the one that was marked."""
    if mark(path) != before:
        raise InputError(f"{path}: changed while it was read: wait until it is complete, and start again")


def _digest(path: Path, pool: DiskPool, report: Callable[[int], None]) -> str:
    """Hash one part while the next one is being read, past the page cache."""
    digest = hashlib.sha256()
    with DiskFile(path) as file:
        nbytes = file.nbytes
        buffers = [host_buffer(min(CHUNK_BYTES, nbytes)) for _ in range(2)]
        starts = range(0, nbytes, CHUNK_BYTES)
        parts = [buffers[i % 2][: min(CHUNK_BYTES, nbytes - start)] for i, start in enumerate(starts)]
        reads = (pool.read(file, start, part) for start, part in zip(starts, parts, strict=True))
        pending = next(reads, None)
        for part in parts:
            assert pending is not None
            pending.wait()
            pending = next(reads, None)
            digest.update(part.numpy().data)
            report(part.nbytes)
    return digest.hexdigest()


def _read(memory: Path) -> dict[str, list[Any]]:
    """What is remembered: nothing if the file is missing or damaged, since all of it can be computed again."""
    try:
        files = records.check_schema(records.read_json(memory), SCHEMA, where=str(memory)).get("files")
    except InputError:
        return {}
    return files if isinstance(files, dict) else {}


def _is_known(path: Path, now: Mark, known: dict[str, list[Any]]) -> bool:
    entry = known.get(os.path.realpath(path))
    return isinstance(entry, list) and entry[:-1] == now and isinstance(entry[-1], str)


def _remember(entries: dict[Path, list[Any]], memory: Path) -> None:
    now_ns = time.time_ns()
    settled = {
        os.path.realpath(path): entry for path, entry in entries.items() if now_ns - max(entry[1:3]) > SETTLED_NS
    }
    if settled:
        with FileLock(memory.with_name(f".{memory.name}.lock")):  # others may have added theirs meanwhile
            records.write_json({"schema": SCHEMA, "files": _read(memory) | settled}, memory)
