"""Copies between host memory and the first tier, beside the computation.

On CUDA each direction has a stream of its own and nothing waits but streams. On a machine whose first tier is host
memory the processor that computes is the one that copies: it does so at once, with all its cores. Threads that copy
beside the computation take the cores from it in turns of milliseconds, and both are slower than one after the other.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator
from types import TracebackType

import torch

from costmodel.formulations.base import Resource
from runtime.disk import Observer
from runtime.pending import Arrived, OnStream, Pending


class Copier:
    """Copies tensors between the two memory tiers of one device.

    ``observer`` is told of every copy; on CUDA when :meth:`report` is called. Use as a context manager, or call
    :meth:`close`.
    """

    def __init__(self, device: torch.device, *, observer: Observer | None = None) -> None:
        self.device, self._observer = device, observer
        self._timed: list[tuple[Resource, str, torch.cuda.Event, torch.cuda.Event, int]] = []
        self._zero: tuple[float, torch.cuda.Event] | None = None
        self._up = self._down = None
        if device.type == "cuda":
            self._up, self._down = stream_of(device), stream_of(device)
            if observer is not None:  # events know no clock: tie one to ours now, so that the loop need not stop for it
                torch.cuda.synchronize(device)
                self._zero = (time.perf_counter(), recorded(torch.cuda.current_stream(device), timed=True))
                self._zero[1].synchronize()

    def mark(self) -> Pending:
        """Everything launched so far on the current stream; a copy made ``after`` it waits for that alone."""
        if self._up is None:
            return Arrived()
        return OnStream(recorded(torch.cuda.current_stream(self.device)))

    def copy(
        self,
        target: torch.Tensor,
        source: torch.Tensor,
        *,
        after: Iterable[Pending] = (),
        link: Resource = "cpu_to_gpu",
        name: str = "copy",
    ) -> Pending:
        """Start copying ``source`` into ``target`` (same shape and dtype), once all of ``after`` are done.

        ``link`` and ``name`` are what the observer is told; where both tiers are host memory only the
        caller knows which way a copy goes.

        The caller must not touch either before it has waited. On CUDA a copy that starts from or ends in
        host memory that is not pinned blocks the caller.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"cannot copy {tuple(source.shape)} {source.dtype} into {tuple(target.shape)} {target.dtype}"
            )
        stream = self._up if target.is_cuda else self._down
        if stream is None:
            return self._at_once(target, source, after, link, name)
        for pending in after:
            if isinstance(pending, OnStream):
                stream.wait_event(pending.event)
            else:
                pending.synchronize()
        timed = self._observer is not None
        with torch.cuda.stream(stream):
            start = recorded(stream, timed=timed) if timed else None
            target.copy_(source, non_blocking=True)
            event = recorded(stream, timed=timed)
        # Whoever drops the device's tensor may do so before it was copied: its memory must not be given out until then.
        (target if target.is_cuda else source).record_stream(stream)
        if start is not None:
            self._timed.append(("cpu_to_gpu" if target.is_cuda else "gpu_to_cpu", name, start, event, target.nbytes))
        return OnStream(event, target, source)

    @contextlib.contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """Tell the observer how long the first tier's processor works on what is launched inside."""
        if self._observer is None:
            yield
            return
        if self._up is None:
            began = time.perf_counter()
            yield
            self._observer("gpu_compute", name, began, time.perf_counter(), 0)
            return
        stream = torch.cuda.current_stream(self.device)
        start = recorded(stream, timed=True)
        yield
        self._timed.append(("gpu_compute", name, start, recorded(stream, timed=True), 0))

    def report(self) -> None:
        """Tell the observer of the copies that a CUDA device has made; call it now and then, after waiting."""
        if self._observer is None or self._zero is None:
            return
        base, zero = self._zero
        done = [entry for entry in self._timed if entry[3].query()]  # type: ignore[no-untyped-call]
        for entry in done:
            self._timed.remove(entry)  # other threads append meanwhile
        for link, name, start, stop, nbytes in done:
            first, last = (base + zero.elapsed_time(event) / 1e3 for event in (start, stop))
            self._observer(link, name, first, last, nbytes)

    def _at_once(
        self, target: torch.Tensor, source: torch.Tensor, after: Iterable[Pending], link: Resource, name: str
    ) -> Pending:
        for pending in after:
            pending.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        if self._observer is not None:
            self._observer(link, name, began, time.perf_counter(), target.nbytes)
        return Arrived()

    def close(self) -> None:
        """Finish what was started."""
        for stream in (self._up, self._down):
            if stream is not None:  # host memory is unmapped by its owner soon after
                stream.synchronize()

    def __enter__(self) -> "Copier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """A new stream on a CUDA device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorded(stream: torch.cuda.Stream, *, timed: bool = False) -> torch.cuda.Event:
    """An event after everything that the stream holds so far."""
    event = torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
