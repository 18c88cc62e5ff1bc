"""Measures whether the cores share a cache, beside whatever runs: what that says is in ``costmodel.shared_cache``."""

import contextlib
import os
import threading
import time
from types import TracebackType

import numpy as np

BYTES = 2**20
"""Small enough to lie in any cache, and to be written in a millisecond where the cores are far apart."""

TRIES = 3
"""A write that is interrupted looks slow; cores that are apart are slow every time."""

PERIOD_S = 0.5
"""Between two looks of a :class:`Watch`. A look takes 0.6 to 2 ms of a core."""


class SharedWrite:
    """Times one core that overwrites what another has just read."""

    def __init__(self) -> None:
        self._buffer = np.zeros(BYTES // 8, dtype=np.int64)

    def rate(self) -> float | None:
        """Bytes/s, the best of a few tries; ``None`` with one core, or where threads cannot be told where to run."""
        if not hasattr(os, "sched_getaffinity"):
            return None
        cores = os.sched_getaffinity(0)
        writer, reader, best_s = min(cores), max(cores), float("inf")
        if writer == reader:
            return None
        try:
            for _ in range(TRIES):
                os.sched_setaffinity(0, {reader})
                self._buffer.sum()
                os.sched_setaffinity(0, {writer})
                began = time.perf_counter()
                self._buffer.fill(1)
                best_s = min(best_s, time.perf_counter() - began)
        except OSError:  # a core was taken away meanwhile
            return None
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, cores)
        return BYTES / best_s


class Watch:
    """Takes the rate twice a second, in a thread of its own; use as a context manager."""

    def __init__(self) -> None:
        self._write, self._stop = SharedWrite(), threading.Event()
        self._seen: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._look, name="tierwise-shared-cache", daemon=True)

    def between(self, start: float, stop: float) -> list[float]:
        """The rates taken between two readings of ``time.monotonic``, which all processes share; older ones go."""
        seen, self._seen = self._seen, []
        return [rate for when, rate in seen if start <= when <= stop]

    def _look(self) -> None:
        while not self._stop.wait(PERIOD_S):
            when, rate = time.monotonic(), self._write.rate()
            if rate is None:
                return
            self._seen.append((when, rate))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
