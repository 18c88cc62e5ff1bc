"""Figures are taken while the cores share a cache, on a machine where that comes and goes (``costmodel.shared_cache``).

A figure taken while they are apart is taken again when they are together, as long as patience lasts.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TypeVar

from costmodel.shared_cache import is_apart

LOOKS = 10
"""Looks before the first figure; of so many in a row the middle one is what the rate can be."""

PAUSE_S = 0.05
ATTEMPTS = 3

T = TypeVar("T")


class Steadiness:
    """``rate`` is of :class:`runtime.shared_cache.SharedWrite`; it waits for ``patience_s`` seconds in all.

    A machine that is apart when the profile begins is measured as it is until it has been seen together.
    """

    def __init__(
        self,
        rate: Callable[[], float | None] = lambda: None,
        *,
        patience_s: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._patience_s, self._now, self._sleep = rate, patience_s, now, sleep
        self._looks: deque[float] = deque(maxlen=LOOKS)
        self._best = 0.0
        self.spent_s = 0.0
        """Seconds spent on waiting and on figures that were taken again."""
        self.kept_apart = 0
        """Figures that were taken while the cores were apart, because patience had ended or every attempt was."""

    def steadily(self, measure: Callable[[], T]) -> T:
        """What ``measure`` finds while the cores are together, or in the last attempt."""
        self._wait()
        for attempt in range(ATTEMPTS):
            began = self._now()
            found = measure()
            if self._together():
                return found
            if attempt == ATTEMPTS - 1 or self.spent_s >= self._patience_s:
                break
            self.spent_s += self._now() - began
            self._wait()
        self.kept_apart += 1
        return found

    def _wait(self) -> None:
        """Return when the cores are together, or patience has ended."""
        began, waited = self._now(), False
        while not self._together() and self.spent_s + self._now() - began < self._patience_s:
            self._sleep(PAUSE_S)
            waited = True
        if waited:
            self.spent_s += self._now() - began

    def _together(self) -> bool:
        """Look; the first looks of all are several."""
        for _ in range(1 if self._looks else LOOKS):
            rate = self._rate()
            if rate is None:
                return True
            self._looks.append(rate)
        # Looks while they are apart must not lower what is expected of cores that are together.
        self._best = max(self._best, statistics.median(self._looks))
        return not is_apart(self._looks[-1], self._best)
