"""A lock between processes that ends with its holder, however that ends: the kernel's, on a file beside the data."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from runtime.disk import DiskError


class FileLock:
    """Held from entering the context to leaving it; the lock file exists only meanwhile.

    ``waiting`` is called once if another process (or thread) holds the lock. Raises
    :class:`~runtime.disk.DiskError` where the file system has no locks or the file cannot be made.
    """

    def __init__(self, path: Path, *, waiting: Callable[[], None] | None = None) -> None:
        self.path, self._waiting = path, waiting
        self._fd = -1

    def try_enter(self) -> bool:
        """Take the lock if nobody holds it; whoever gets ``True`` calls :meth:`release`."""
        while True:
            fd = self._open()
            if not self._lock(fd, wait=False):
                return False
            if self._keep(fd):
                return True

    def __enter__(self) -> "FileLock":
        if self.try_enter():
            return self
        if self._waiting is not None:
            self._waiting()
        while True:
            fd = self._open()
            self._lock(fd, wait=True)
            if self._keep(fd):
                return self

    def _open(self) -> int:
        try:
            return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be made: {error.strerror}") from None

    def _lock(self, fd: int, *, wait: bool) -> bool:
        """Whether the open file is locked now; it is closed if not."""
        locked = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            locked = True
        except BlockingIOError:
            pass
        except OSError as error:
            raise DiskError(f"{self.path}: cannot be locked: {error.strerror}") from None
        finally:
            if not locked:
                os.close(fd)
        return locked

    def _keep(self, fd: int) -> bool:
        """Whether the file that was locked is still the one of this name: its last holder removes it."""
        try:
            there = self.path.stat()
        except FileNotFoundError:
            os.close(fd)
            return False
        locked = os.fstat(fd)
        if (locked.st_dev, locked.st_ino) != (there.st_dev, there.st_ino):
            os.close(fd)
            return False
        self._fd = fd
        return True

    def release(self) -> None:
        """Let go of the lock."""
        self.path.unlink(missing_ok=True)  # while it is still ours, so that nobody locks a file that is about to go
        os.close(self._fd)
        self._fd = -1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
