"""Copies between host memory and the first tier, beside the computation.

On CUDA each direction has a stream of its own and nothing waits but streams. On a machine whose first tier
is host memory the copies are made by threads that hold no interpreter lock, so that they overlap as well.
"""

import itertools
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import numpy as np
import torch

from runtime.pending import Arrived, OnStream, OnThreads, Pending

PART_BYTES = 4 * 2**20
"""A copy in host memory is shared between threads in parts of at least this size."""

_SAME_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Copier:
    """Copies tensors between the two memory tiers of one device.

    ``threads`` is the number of threads that copy where both tiers are host memory; on CUDA the copy
    engines do it. Use as a context manager, or call :meth:`close`.
    """

    def __init__(self, device: torch.device, *, threads: int = 1) -> None:
        self.device = device
        self._up = self._down = None
        self._threads = max(1, threads)
        self._pool: ThreadPoolExecutor | None = None
        if device.type == "cuda":
            self._up, self._down = stream_of(device), stream_of(device)
        else:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="tierwise-copy")

    def mark(self) -> Pending:
        """Everything launched so far on the current stream; a copy made ``after`` it waits for that alone."""
        if self._up is None:
            return Arrived()
        return OnStream(recorded(torch.cuda.current_stream(self.device)))

    def copy(self, target: torch.Tensor, source: torch.Tensor, *, after: Iterable[Pending] = ()) -> Pending:
        """Start copying ``source`` into ``target`` (same shape and dtype), once all of ``after`` are done.

        The caller must not touch either before it has waited. On CUDA a copy that starts from or ends in
        host memory that is not pinned blocks the caller.
        """
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(
                f"cannot copy {tuple(source.shape)} {source.dtype} into {tuple(target.shape)} {target.dtype}"
            )
        stream = self._up if target.is_cuda else self._down
        if stream is None:
            return self._on_threads(target, source, tuple(after))
        for pending in after:
            if isinstance(pending, OnStream):
                stream.wait_event(pending.event)
            else:
                pending.synchronize()
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            event = recorded(stream)
        return OnStream(event, target, source)

    def _on_threads(self, target: torch.Tensor, source: torch.Tensor, after: tuple[Pending, ...]) -> Pending:
        assert self._pool is not None
        for pending in after:
            pending.synchronize()  # computation on the CPU is synchronous: only disk reads can be pending
        into, out_of = _as_array(target), _as_array(source)
        if not (into.flags.c_contiguous and out_of.flags.c_contiguous):
            return OnThreads([self._pool.submit(np.copyto, into, out_of)])
        into, out_of = into.reshape(-1), out_of.reshape(-1)
        parts = max(1, min(self._threads, target.nbytes // PART_BYTES))
        edges = [len(into) * part // parts for part in range(parts + 1)]
        pieces = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        return OnThreads([self._pool.submit(np.copyto, into[piece], out_of[piece]) for piece in pieces])

    def close(self) -> None:
        """Finish what was started and end the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def __enter__(self) -> "Copier":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """A new stream on a CUDA device."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """An event after everything that the stream holds so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


def _as_array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """The tensor's memory as a numpy array of values of the same width (numpy knows no bfloat16)."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = tensor.view(_SAME_WIDTH[tensor.dtype.itemsize]).numpy()
    return array
