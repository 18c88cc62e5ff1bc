"""Movers: everything that carries bytes between the three tiers of one run, with one clock over all of it.

On a machine whose first tier is host memory the disk reads and writes it directly. On CUDA bytes pass
through pinned host memory (a *relay*), and a thread waits for one half of the way to start the other.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from runtime.disk import DEFAULT_CHUNK_BYTES, DEFAULT_THREADS, DiskError, DiskFile, DiskPool
from runtime.pending import Pending
from runtime.tiers import side_by_side
from runtime.timeline import Timeline
from runtime.transfer import Copier

RELAY_THREADS = 2
"""Threads each way that join the halves of a way through host memory. A store waits for the computation, which is
launched ahead of time: loads have threads of their own, or they would wait behind it."""


class Relayed(Pending):
    """Work whose second half is started by a thread when the first has ended."""

    def __init__(self, second: Future[Pending]) -> None:
        self._second = second

    def done(self) -> bool:
        return self._second.done() and (self._second.exception() is not None or self._second.result().done())

    def wait(self) -> None:
        self._second.result().wait()

    def synchronize(self) -> None:
        self._second.result().synchronize()


class Movers:
    """Threads and streams of one run. :meth:`settle` waits for what must not go on beside a computation."""

    def __init__(
        self,
        device: torch.device,
        *,
        timeline: Timeline,
        overlap: bool = True,
        disk_threads: int = DEFAULT_THREADS,
        chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    ) -> None:
        self.device, self.overlap, self.timeline = device, overlap, timeline
        self.disk = DiskPool(threads=disk_threads, chunk_bytes=chunk_bytes, observer=timeline.add)
        self.copier = Copier(device, observer=timeline.add)
        self._loads = ThreadPoolExecutor(RELAY_THREADS, thread_name_prefix="tierwise-load")
        self._stores = ThreadPoolExecutor(RELAY_THREADS, thread_name_prefix="tierwise-store")
        self._files: list[DiskFile] = []
        self._unsettled: list[Pending] = []

    def open(self, path: str | os.PathLike[str], *, writable: bool = False) -> DiskFile:
        """Open a file that is closed with this object."""
        file = DiskFile(path, writable=writable)
        self._files.append(file)
        return file

    def nameless_file(self, directory: Path, nbytes: int) -> DiskFile:
        """A file of the offload directory whose name is gone at once: however the process ends, nothing stays.

        No two processes can meet in it either. A full disk is a :class:`~runtime.disk.DiskError`, before
        anything runs.
        """
        try:
            handle, name = tempfile.mkstemp(prefix=".tierwise-", dir=directory)
        except OSError as error:
            raise DiskError(f"{directory}: no file can be made there: {error.strerror}") from None
        os.close(handle)
        try:
            file = self.open(name, writable=True)
        finally:
            Path(name).unlink(missing_ok=True)
        file.allocate(nbytes)
        return file

    def nameless_parts(self, directory: Path, sizes: Iterable[int]) -> tuple[DiskFile | None, list[int]]:
        """A nameless file for parts of these sizes (``None`` for no bytes at all), and where each begins in it."""
        offsets, total = side_by_side(sizes)
        return (self.nameless_file(directory, total) if total else None), offsets

    def discard(self, file: DiskFile) -> None:
        """Close a file before the others, which gives a nameless one's space back."""
        self._files.remove(file)
        file.close()

    def up(self, target: Tensor, source: Tensor, *, name: str, after: Iterable[Pending] = ()) -> Pending:
        """Copy host memory to the first tier."""
        return self._begun(self.copier.copy(target, source, after=(*after, self.mark()), link="cpu_to_gpu", name=name))

    def down(self, target: Tensor, source: Tensor, *, name: str) -> Pending:
        """Copy what the first tier holds when everything launched so far is done to host memory."""
        return self._begun(self.copier.copy(target, source, after=(self.mark(),), link="gpu_to_cpu", name=name))

    def load(
        self,
        file: DiskFile,
        offset: int,
        target: Tensor,
        *,
        name: str,
        relay: Tensor | None = None,
        after: Iterable[Pending] = (),
    ) -> Pending:
        """Read a file into the target; one on a CUDA device is reached through ``relay``, of the same size.

        ``after`` must be done before the disk is read (a write of the same bytes, the relay's last use).
        """
        first = [pending for pending in after if not pending.done()]
        if target.device.type == "cpu":
            for pending in first:
                pending.synchronize()
            return self._begun(self.disk.read(file, offset, target, name=name))
        assert relay is not None
        free = self.mark()

        def carry() -> Pending:
            for pending in first:
                pending.synchronize()
            self.disk.read(file, offset, relay, name=name).synchronize()
            return self.copier.copy(target, relay, after=(free,), link="cpu_to_gpu", name=name)

        return self._begun(Relayed(self._loads.submit(carry)))

    def store(self, file: DiskFile, offset: int, source: Tensor, *, name: str, relay: Tensor | None = None) -> Pending:
        """Write to a file; a source on a CUDA device passes through ``relay``, which must be free."""
        if source.device.type == "cpu":
            return self._begun(self.disk.write(file, offset, source, name=name))
        assert relay is not None
        here = self.copier.copy(relay, source, after=(self.mark(),), link="gpu_to_cpu", name=name)

        def carry() -> Pending:
            here.synchronize()
            return self.disk.write(file, offset, relay, name=name)

        return self._begun(Relayed(self._stores.submit(carry)))

    def computing(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Measures what is computed inside."""
        return self.copier.computing(name)

    def report(self) -> None:
        """Bring the timeline up to date with what a CUDA device has done."""
        self.copier.report()

    def mark(self) -> Pending:
        """Everything computed so far."""
        return self.copier.mark()

    def settle(self, *, awaited: bool) -> None:
        """Wait for what was begun since the last call: without overlap, and for what the next computation awaits.

        ``awaited`` says that the computation does, and nothing comes before it. On a machine whose first tier is host
        memory nothing more is begun before such a load is there: a disk that also reads 16 MiB of weights takes 4 to 8
        ms for a page of hidden states, and 0.2 ms alone. On CUDA the computation itself waits, and the host goes on.

        Without overlap the pieces of one step are moved side by side all the same. Whoever waits takes a share of them:
        beside threads of the last computation, which spin for milliseconds in case there is more of it, a thread of the
        disk may wake up late.
        """
        unsettled, self._unsettled = self._unsettled, []
        if self.overlap and not (awaited and self.device.type == "cpu"):
            return
        for pending in unsettled:
            pending.help()
        for pending in unsettled:
            pending.synchronize()

    def _begun(self, pending: Pending) -> Pending:
        self._unsettled.append(pending)
        return pending

    def close(self) -> None:
        """Finish what was started, end the threads, close the files; each of them even where one before it fails."""
        with contextlib.ExitStack() as steps:  # the last one is the first to be done
            steps.callback(self._close_files)
            steps.callback(self.disk.close, cancel=True)
            steps.callback(self.copier.close)
            steps.callback(self._loads.shutdown)
            steps.callback(self._stores.shutdown)  # loads may wait for them

    def _close_files(self) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        self._files.clear()

    def __enter__(self) -> "Movers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
