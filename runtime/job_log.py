"""The results of a job on disk: appended and flushed block by block, whole after any end of the process.

Beside ``out.jsonl`` stands ``out.jsonl.manifest.json``, which says what the results were made with. A job that is
resumed checks it, drops a torn end, and knows by number and digest which lines of the input are answered.
"""

import errno
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from costmodel import records
from costmodel.errors import InputError
from runtime.disk import DiskError
from runtime.job_source import Line
from runtime.requests import line_of

SCHEMA = "tierwise.batch/1"

ORIGIN = "origin"
"""The part of a manifest that may differ when the job is resumed: when, from which file and by which version."""

logger = logging.getLogger(__name__)

_ANSWER_ID = re.compile(r"batch_req_(\d{8,})_([0-9a-f]{32})")


def manifest_path(output: Path) -> Path:
    """``out.jsonl.manifest.json`` for ``out.jsonl``."""
    return output.with_name(f"{output.name}.manifest.json")


class JobLog:
    """The output file of one job, locked against other processes while it is open.

    ``answered`` maps the numbers of lines to the digests they were answered for. Use :func:`open_log`.
    """

    def __init__(self, path: Path, fd: int, *, resume: bool) -> None:
        self.path = path
        self._fd = fd
        self.answered: dict[int, str] = {}
        self.errors = 0
        self.resumed = resume
        self._size = self._recover() if resume else 0
        if os.fstat(fd).st_size > self._size:
            os.ftruncate(fd, self._size)
            os.fsync(fd)

    def manifest(self) -> dict[str, Any] | None:
        """What the results so far were made with; ``None`` where nothing is known because there are none."""
        path = manifest_path(self.path)
        if not self.resumed:
            return None
        if not path.exists():
            if self.answered:
                raise InputError(f"{path} is missing: it says what {self.path} was made with, which --resume must know")
            return None
        return records.check_schema(records.read_json(path), SCHEMA, where=str(path))

    def begin(self, manifest: Mapping[str, Any]) -> None:
        """Write the manifest of a new job, or check that a resumed one is the same but for its origin."""
        before = self.manifest()
        if before is None:
            records.write_json({"schema": SCHEMA, **manifest}, manifest_path(self.path))
            _flush_folder(self.path.parent)
            return
        if set(before) != {*manifest}:
            raise InputError(f"{manifest_path(self.path)} is damaged: --resume cannot tell what it was made with")
        self.check(manifest)

    def check(self, manifest: Mapping[str, Any]) -> None:
        """Raise :class:`InputError` where a resumed job was made with something else; parts of a manifest will do."""
        before = self.manifest()
        if before is None:
            return
        now = {name: value for name, value in json.loads(json.dumps(manifest)).items() if name != ORIGIN}
        for name, was, is_now in differences({name: before.get(name) for name in now}, now):
            raise InputError(
                f"{self.path} cannot be resumed: {name} was {was} and is {is_now} now (give the same again, "
                "or write to another file)"
            )

    def is_answered(self, line: Line) -> bool:
        """Whether the output already answers this line; another content under its number is an error."""
        digest = self.answered.get(line.number)
        if digest is None:
            return False
        if digest != line.digest:
            raise InputError(
                f"{self.path} cannot be resumed: line {line.number + 1} of the input is not the one that was answered"
            )
        return True

    def append(self, lines: Sequence[tuple[Line, Mapping[str, Any]]]) -> None:
        """Add answers; returns once they are on the disk. After a failure none of them is there."""
        for line, _ in lines:
            if line.number in self.answered:
                raise ValueError(f"line {line.number} is answered twice")
        content = b"".join(line_of(record) for _, record in lines)
        try:
            self._write(content)
            os.fsync(self._fd)
        except BaseException as error:
            self._restore()
            if isinstance(error, OSError):
                raise DiskError(
                    f"{self.path}: writing results failed: {error.strerror or error}; the {len(self.answered)} "
                    "results before are safe, and --resume goes on after them"
                ) from None
            raise
        self._size += len(content)
        self.answered.update((line.number, line.digest) for line, _ in lines)
        self.errors += sum(record["error"] is not None for _, record in lines)

    def _write(self, content: bytes) -> None:
        left = memoryview(content)
        while left:
            written = os.write(self._fd, left)
            if written == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            left = left[written:]

    def _restore(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError as error:  # a torn line stays, which --resume drops
            logger.debug("%s: %s", self.path, error)

    def _recover(self) -> int:
        """Read what is answered; the length of the file up to its last whole record."""
        size = bad_from = 0
        bad_line: int | None = None
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            for count, content in enumerate(file, start=1):
                found = _answer(content)
                if found is None:
                    bad_line = count if bad_line is None else bad_line
                elif bad_line is not None:
                    raise InputError(
                        f"{self.path} cannot be resumed: line {bad_line} is no record of this job, though good ones "
                        "follow: delete that line first"
                    )
                else:
                    self._note(count, *found)
                    bad_from += len(content)
                size += len(content)
        if size > bad_from:
            logger.warning("%s: %d bytes of an unfinished record are dropped", self.path, size - bad_from)
        return bad_from

    def _note(self, count: int, number: int, digest: str, failed: bool) -> None:
        if number in self.answered:
            raise InputError(f"{self.path} cannot be resumed: line {count} answers a request that an earlier one did")
        self.answered[number] = digest
        self.errors += failed


def _answer(content: bytes) -> tuple[int, str, bool] | None:
    """Number and digest of the answered line, and whether with an error; ``None`` for a torn or foreign record."""
    if not content.endswith(b"\n"):
        return None
    try:
        record = json.loads(content)
        match = _ANSWER_ID.fullmatch(record["id"])
        failed = record["error"] is not None
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return None if match is None else (int(match[1]), match[2], failed)


@contextmanager
def open_log(path: Path, *, resume: bool) -> Iterator[JobLog]:
    """Open, lock and (with ``resume``) recover an output file.

    Results that are already there are an :class:`InputError` without ``resume``. A new job that ends without
    any leaves no file.
    """
    fd = _locked(path)
    new = not (resume and manifest_path(path).exists())
    try:
        if os.fstat(fd).st_size > 0 and not resume:
            raise InputError(
                f"{path} has results already: go on with them by --resume, or write to another file (nothing is lost)"
            )
        try:
            log = JobLog(path, fd, resume=resume)
        except OSError as error:
            raise DiskError(f"{path}: reading results failed: {error.strerror or error}") from None
        yield log
    finally:
        if new and os.fstat(fd).st_size == 0 and not path.is_symlink():
            # Under the lock, and the file last: whoever makes another one of that name has it to itself.
            manifest_path(path).unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        os.close(fd)


def _locked(path: Path) -> int:
    """An open and locked file of that name."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: cannot be written: results go to a plain file, so that they can be resumed")
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            there = path.stat()
        except BlockingIOError:
            os.close(fd)
            raise InputError(f"{path} is being written by another process: wait for it, or name another file") from None
        except FileNotFoundError:  # its last holder has just removed it
            os.close(fd)
            continue
        except OSError as error:
            os.close(fd)
            raise DiskError(f"{path}: cannot be locked: {error.strerror or error}") from None
        held = os.fstat(fd)
        if (held.st_dev, held.st_ino) == (there.st_dev, there.st_ino):
            return fd
        os.close(fd)


def _flush_folder(folder: Path) -> None:
    """Return once the names of new files are on the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def differences(before: object, now: object, name: str = "") -> Iterator[tuple[str, str, str]]:
    """Where two JSON values differ: the dotted name, and both values as text."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            yield from differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
    elif before != now:
        yield name, _told(before), _told(now)


def _told(value: object) -> str:
    text = "not given" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
