"""The folder of images: each appears whole, by a rename, or not at all.

    MODELS/NAME-DTYPE[-4bit]-KEY/image.bin      the units of runtime.layout.ImageLayout
                                 manifest.json  what the image is of
    MODELS/hashes.json                          what weight files hold (runtime.content)
    MODELS/.FOLDER.partial and .FOLDER.lock     an image that is being made

Its maker holds the lock, which ends with the process: of two processes one waits for the other, and what a
killed one left is told from work in progress, and removed.
"""

import logging
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from costmodel import records, units
from costmodel.errors import InputError
from runtime.content import Progress
from runtime.conversion import ImageWriter
from runtime.disk import DiskError, DiskFile
from runtime.file_lock import FileLock
from runtime.image_source import ImageSource

logger = logging.getLogger(__name__)

SCHEMA = "tierwise.image/1"

MODELS, IMAGE_NAME = "models", "image.bin"
"""In the offload directory the folder of images; in an image's own folder its file."""

SPARE_BYTES = 2**20
"""What must be free beyond the image: for the manifest and the file system's own bookkeeping."""


def images(directory: Path) -> list[Path]:
    """The files of all whole images of an offload directory."""
    return [path for path in directory.glob(f"{MODELS}/*/{IMAGE_NAME}") if not path.parent.name.startswith(".")]


def stored(source: ImageSource, models: Path, progress: Progress | None = None) -> Path:
    """The image file of a source, which is made unless it is there.

    Raises :class:`~runtime.disk.DiskError` where it does not fit the disk; nothing is left then, nor
    after any other error or an interrupt.
    """
    folder = models / source.folder_name
    if not _is_whole(folder, source):

        def waiting() -> None:
            logger.info("%s: another process is making it; waiting", folder)
            if progress is not None:
                progress("waiting", 0, source.layout.nbytes)

        with FileLock(_lock_path(folder), waiting=waiting):
            if not _is_whole(folder, source):
                _make(folder, source, progress)
    return folder / IMAGE_NAME


def manifest(source: ImageSource) -> dict[str, Any]:
    """What an image is of, as its ``manifest.json`` has it; the date is that of its making."""
    return {
        "schema": SCHEMA,
        "model": source.name,
        "key": source.key,
        "dtype": source.dtype,
        "compressed": source.layout.compressed,
        "nbytes": source.layout.nbytes,
        "source": source.origin,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "content": source.identity,
        "config": source.config,
    }


def _is_whole(folder: Path, source: ImageSource) -> bool:
    """Whether an image of this source is there, with the manifest and the length that it should have."""
    try:
        found = records.check_schema(records.read_json(folder / "manifest.json"), SCHEMA, where=str(folder))
        nbytes = (folder / IMAGE_NAME).stat().st_size
    except (InputError, OSError):
        return False
    return found.get("key") == source.key and nbytes == found.get("nbytes") == source.layout.nbytes


def _make(folder: Path, source: ImageSource, progress: Progress | None) -> None:
    """Write the image under a temporary name, then rename it; to be called with its lock held."""
    _sweep(folder.parent)
    partial = _partial_path(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed: its lock is ours
        shutil.rmtree(folder, ignore_errors=True)  # there, but not whole
        _check_space(folder.parent, source)
        partial.mkdir()
        _write(partial / IMAGE_NAME, source, progress)
        records.write_json(manifest(source), partial / "manifest.json")
        _flush_folder(partial)
        partial.rename(folder)
        _flush_folder(folder.parent)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be made: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s: made from %s", folder, source.origin)


def _write(path: Path, source: ImageSource, progress: Progress | None) -> None:
    total_bytes, done_bytes = source.layout.nbytes, 0

    def written(nbytes: int) -> None:
        nonlocal done_bytes
        done_bytes += nbytes
        if progress is not None:
            progress("converting", done_bytes, total_bytes)

    with DiskFile(path, writable=True) as file:
        file.allocate(total_bytes)  # zeros, which the gaps between tensors stay
        with ImageWriter(file, written=written) as writer:
            source.write(writer)
            writer.finish()
    if progress is not None and done_bytes < total_bytes:
        progress("converting", total_bytes, total_bytes)


def _check_space(models: Path, source: ImageSource) -> None:
    needed, free = source.layout.nbytes + SPARE_BYTES, shutil.disk_usage(models).free
    if free < needed:
        raise DiskError(
            f"{models}: the image of {source.name} takes {units.format_bytes(needed)}, but only "
            f"{units.format_bytes(free)} are free: make room or choose another offload directory"
        )


def _sweep(models: Path) -> None:
    """Remove what killed processes left: locks that nobody holds, and the temporary folders that belong to them."""
    for lock_path in models.glob(".*.lock"):
        lock = FileLock(lock_path)
        if lock.try_enter():
            try:
                shutil.rmtree(lock_path.with_suffix(".partial"), ignore_errors=True)
            finally:
                lock.release()


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _partial_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.partial")


def _flush_folder(folder: Path) -> None:
    """Make the names in a folder durable, as ``fsync`` does the bytes of a file."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
