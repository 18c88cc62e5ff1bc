"""How much work slows while other work runs beside it: compute beside each link, links beside each other.

Each kind of work is repeated without pause for a slice of time: alone, then beside the other. The slowdown is
the rate alone over the rate beside it. On a CPU-only machine all of it shares cores and memory bandwidth.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from profiler.timing import Reading, Results, Timer

LEAST_CALLS = 2
"""A slice lasts until each side has been called this often, however slow the calls are."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """One kind of work; ``call`` returns when one unit of it is done."""

    name: str
    call: Callable[[], None]


class Overlap:
    """Every pair of ``pairs``, measured alone and together in each round."""

    title = "overlap of compute and links"

    def __init__(
        self, open_pairs: Callable[[], AbstractContextManager[Sequence[tuple[Work, Work]]]], weight: float
    ) -> None:
        self._open_pairs, self.weight = open_pairs, weight

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Two slowdowns a pair: of the first work beside the second, and of the second beside the first."""
        end = timer.now() + budget_s
        readings: list[Reading] = []
        with self._open_pairs() as pairs:
            for work in {work.name: work for pair in pairs for work in pair}.values():
                work.call()  # warm-up
            for index, (one, other) in enumerate(pairs):
                share_s = max(0.0, end - timer.now()) / (len(pairs) - index)
                slowdowns = timer.steadiness.steadily(partial(beside, one, other, timer=timer, slice_s=share_s / 3))
                for work, partner, slowdown in ((one, other, slowdowns[0]), (other, one, slowdowns[1])):
                    at = (("work", work.name), ("beside", partner.name))
                    readings.append(Reading(name="slowdown", at=at, unit="times", work=None, samples=(slowdown,)))
        return readings


def beside(one: Work, other: Work, *, timer: Timer, slice_s: float) -> tuple[float, float]:
    """Slowdowns of both: each alone for a slice, then both for a slice."""
    one_alone_s = _alone(one, timer, slice_s)
    other_alone_s = _alone(other, timer, slice_s)
    one_s, other_s = _together(one, other, timer, slice_s)
    return one_s / one_alone_s, other_s / other_alone_s


def _alone(work: Work, timer: Timer, slice_s: float) -> float:
    """Seconds of a call without company."""
    calls, start = 0, timer.now()
    while calls < LEAST_CALLS or timer.now() - start < slice_s:
        work.call()
        calls += 1
    return (timer.now() - start) / calls


def _together(one: Work, other: Work, timer: Timer, slice_s: float) -> tuple[float, float]:
    """Seconds of a call of each while both run; the other work runs on a thread of its own.

    Either side goes on until the other has had its slice, so that every counted call had company, and an error of
    the thread is raised here.
    """
    enough, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []
    found: list[float] = []

    def background() -> None:
        calls, start = 0, timer.now()
        try:
            while not stop.is_set():
                other.call()
                calls += 1
                if calls >= LEAST_CALLS:
                    enough.set()
            found.append((timer.now() - start) / max(calls, 1))
        except BaseException as error:  # raised again in the caller
            failures.append(error)
        finally:
            enough.set()

    thread = threading.Thread(target=background, name="tierwise-overlap", daemon=True)
    thread.start()
    try:
        calls, start = 0, timer.now()
        while calls < LEAST_CALLS or timer.now() - start < slice_s or not enough.is_set():
            one.call()
            calls += 1
        one_s = (timer.now() - start) / calls
    finally:
        stop.set()
        thread.join()
    if failures:
        raise failures[0]
    return one_s, found[0]
