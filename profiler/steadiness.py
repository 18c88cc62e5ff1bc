"""Figures are taken while the cores share a cache, on a machine where that comes and goes (``costmodel.shared_cache``).

A figure taken while they are apart is taken again when they are together, as long as patience lasts.
"""

import time
from collections.abc import Callable
from typing import TypeVar

from costmodel.shared_cache import best_rate, is_apart

FIRST_LOOKS = 10
"""Looks before the first figure, which show what the rate can be."""

PAUSE_S = 0.05
ATTEMPTS = 3

T = TypeVar("T")


class Steadiness:
    """``rate`` is of :class:`runtime.shared_cache.SharedWrite`; it waits for ``patience_s`` seconds in all."""

    def __init__(
        self,
        rate: Callable[[], float | None] = lambda: None,
        *,
        patience_s: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._rate, self._patience_s, self._now, self._sleep = rate, patience_s, now, sleep
        self.rates: list[float] = []
        self.spent_s = 0.0
        """Seconds spent on waiting and on figures that were taken again."""

    def steadily(self, measure: Callable[[], T]) -> T:
        """What ``measure`` finds while the cores are together, or in the last attempt."""
        self._wait()
        for _ in range(ATTEMPTS - 1):
            began = self._now()
            found = measure()
            if self.spent_s >= self._patience_s or self._together():
                return found
            self.spent_s += self._now() - began
            self._wait()
        return measure()

    def _wait(self) -> None:
        """Return when the cores are together, or patience has ended."""
        began = self._now()
        while not self._together() and self.spent_s + self._now() - began < self._patience_s:
            self._sleep(PAUSE_S)
        if self.rates:
            self.spent_s += self._now() - began

    def _together(self) -> bool:
        """Look; the first looks of all are several."""
        for _ in range(1 if self.rates else FIRST_LOOKS):
            rate = self._rate()
            if rate is None:
                return True
            self.rates.append(rate)
        return not is_apart(self.rates[-1], best_rate(self.rates))
