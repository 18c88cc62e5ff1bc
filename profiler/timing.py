"""Timing with warm-up, repeats until the spread is small, and the time budget that all figures share.

Figures are taken in *rounds* over the whole list: samples of one figure lie seconds apart, so a machine that
drifts (neighbours, clocks, burst credits) shows it in the spread instead of hiding it between two runs.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from profiler.steadiness import Steadiness

LEAST_REPEATS = 3
"""A figure of fewer samples says nothing of its spread."""

WIDE_SPREAD = 0.15
"""A figure whose relative interquartile range stays above this is marked."""

SETTLED_SPREAD = 0.03
"""Repeats end early once the relative interquartile range is below this."""

OVERRUN = 1.5
"""A probe that takes so many times its share has costs that a smaller share would not lower."""

ENOUGH_REPEATS = 5
SHORTEST_SAMPLE_S = 2e-3
"""Shorter bodies are repeated inside one sample, so that reading the clock costs nothing."""


def _nothing() -> None:
    return


@dataclass(frozen=True, kw_only=True)
class Timer:
    """A clock, how to wait for the device, and when what is timed counts; tests hand in false ones.

    ``now`` leaves out what was spent on waiting for a steady machine: budgets are of what is measured.
    """

    now: Callable[[], float] = time.perf_counter
    synchronize: Callable[[], None] = _nothing
    steadiness: Steadiness = field(default_factory=Steadiness)

    def once(self, body: Callable[[], None], repeats: int = 1) -> float:
        """Seconds of one call of ``body``, the mean over ``repeats`` calls."""
        self.synchronize()
        start = self.now()
        for _ in range(repeats):
            body()
        self.synchronize()
        return (self.now() - start) / repeats

    def samples(
        self,
        body: Callable[[], None],
        *,
        budget_s: float,
        before: Callable[[], None] | None = None,
        expected_s: float = 0.0,
    ) -> tuple[float, ...]:
        """Seconds of ``body``, at least once after a warm-up, until they settle or the budget is used up.

        ``before`` runs ahead of every sample and is not timed. Where the warm-up alone takes the whole
        budget, it is the sample; so it is where ``expected_s``, what a call took in another round, leaves
        no time for a second one.
        """
        return self.steadiness.steadily(
            lambda: self._samples(body, budget_s=budget_s, before=before, expected_s=expected_s)
        )

    def _samples(
        self, body: Callable[[], None], *, budget_s: float, before: Callable[[], None] | None, expected_s: float
    ) -> tuple[float, ...]:
        began = self.now()
        if before is not None:
            before()
        warm_up_s = self.once(body)
        if self.now() - began >= budget_s or 2 * expected_s > budget_s:
            return (warm_up_s,)
        repeats = 1 if before is not None else max(1, round(SHORTEST_SAMPLE_S / max(warm_up_s, 1e-9)))
        taken: list[float] = []
        again = False
        while True:
            if before is not None:
                before()
            taken.append(self.once(body, repeats))
            if not again and before is None and taken[0] * repeats < SHORTEST_SAMPLE_S / 2:
                # The warm-up paid for what a first call does (loading a kernel): the body is shorter than that.
                again, repeats, taken = True, max(1, round(SHORTEST_SAMPLE_S / max(taken[0], 1e-9))), []
                continue
            if self.now() - began >= budget_s:
                return tuple(taken)
            if len(taken) >= ENOUGH_REPEATS and spread_of(taken) <= SETTLED_SPREAD:
                return tuple(taken)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile, by linear interpolation; a single value is both."""
    if len(values) < 2:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def spread_of(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    first, third = quartiles(values)
    middle = statistics.median(values)
    return (third - first) / abs(middle) if middle else 0.0


Place = Mapping[str, str | int]
"""Where on its curves a figure lies: ``{"method": "direct", "bytes": 4194304}``."""

FixedPlace = tuple[tuple[str, str | int], ...]
"""The same, to look figures up by."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one round found for one figure: seconds for ``work`` units, or plain values where ``work`` is None."""

    name: str
    at: FixedPlace
    unit: str
    work: float | None
    samples: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure over all rounds."""

    name: str
    at: FixedPlace
    unit: str
    work: float | None
    samples: tuple[float, ...]

    @property
    def values(self) -> tuple[float, ...]:
        """The samples in ``unit``: work per second, or as they are."""
        if self.work is None:
            return self.samples
        return tuple(self.work / max(seconds, 1e-12) for seconds in self.samples)

    @property
    def seconds(self) -> float:
        """Median seconds of one call."""
        return statistics.median(self.samples)

    @property
    def median(self) -> float:
        """Median value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Relative interquartile range of the values."""
        return spread_of(self.values)

    @property
    def stated_spread(self) -> float | None:
        """The spread, unless there are too few samples to tell."""
        return self.spread if len(self.samples) >= LEAST_REPEATS else None

    @property
    def wide(self) -> bool:
        """Whether the spread stayed wide, or there is nothing to tell it from."""
        return self.stated_spread is None or self.stated_spread > WIDE_SPREAD

    def get(self, key: str) -> str | int:
        """One coordinate of its place."""
        return dict(self.at)[key]

    def number(self, key: str) -> int:
        """One numeric coordinate of its place."""
        return int(self.get(key))


@dataclass
class Results:
    """Every figure, pooled over the rounds."""

    figures: dict[tuple[str, FixedPlace], Figure] = field(default_factory=dict)

    def add(self, readings: Iterable[Reading]) -> None:
        """Pool what one round found."""
        for reading in readings:
            if not reading.samples:
                continue
            key = (reading.name, reading.at)
            old = self.figures.get(key)
            self.figures[key] = Figure(
                name=reading.name,
                at=reading.at,
                unit=reading.unit,
                work=reading.work,
                samples=reading.samples if old is None else old.samples + reading.samples,
            )

    def select(self, name: str, **at: str | int) -> list[Figure]:
        """The figures of a name whose place agrees with ``at``, in order of their place."""
        found = [
            figure for figure in self.figures.values() if figure.name == name and at.items() <= dict(figure.at).items()
        ]
        return sorted(found, key=lambda figure: [(type(v).__name__, v) for _, v in figure.at])

    def wide(self) -> list[Figure]:
        """Those whose spread stayed wide."""
        return [figure for figure in self.figures.values() if figure.wide]


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to time: ``body`` does ``work`` units of ``unit`` (per second)."""

    name: str
    at: Place
    unit: str
    work: float
    body: Callable[[], None]
    before: Callable[[], None] | None = None


def time_tasks(
    tasks: Iterable[Task], count: int, *, timer: Timer, budget_s: float, previous: "Results"
) -> list[Reading]:
    """Time ``count`` tasks in turn, sharing what is left of the budget evenly.

    Each task is made when its turn comes, so that one at a time holds memory. Tasks of a name come in order of
    rising cost: one whose time, known or extrapolated from the one before it, exceeds what is left of the budget
    is left out, unless it is the first of its name and was never measured.
    """
    end = timer.now() + budget_s
    readings: list[Reading] = []
    rate: dict[str, float] = {}
    for index, task in enumerate(tasks):
        left_s = max(0.0, end - timer.now())
        known = previous.select(task.name, **task.at)
        expected_s = known[0].seconds if known else task.work / rate[task.name] if task.name in rate else 0.0
        if expected_s > left_s:
            continue
        share_s = left_s / max(1, count - index)
        seen_s = known[0].seconds if known else 0.0
        samples = timer.samples(task.body, budget_s=share_s, before=task.before, expected_s=seen_s)
        rate[task.name] = task.work / max(statistics.median(samples), 1e-12)
        readings.append(
            Reading(name=task.name, at=tuple(task.at.items()), unit=task.unit, work=task.work, samples=samples)
        )
    return readings


class Probe(Protocol):
    """A group of figures measured together; ``weight`` is its share of each round."""

    title: str
    weight: float

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Measure for about ``budget_s`` seconds."""
        ...


def run_rounds(
    probes: Sequence[Probe],
    *,
    timer: Timer,
    budget_s: float,
    rounds: int,
    progress: Callable[[str], None],
) -> Results:
    """Run every probe in every round; what one leaves or overruns is shared among those that follow.

    After the first round a probe that is known to take longer than what is left is skipped. ``progress`` is
    told what is being measured, before each probe.
    """
    end = timer.now() + budget_s
    results = Results()
    total = sum(probe.weight for probe in probes) * rounds
    least_s = dict.fromkeys(range(len(probes)), 0.0)
    for index in range(rounds):
        for place, probe in enumerate(probes):
            began = timer.now()
            left_s = max(0.0, end - began)
            share_s = left_s * probe.weight / total
            total -= probe.weight
            if index > 0 and left_s <= least_s[place]:
                continue
            progress(probe.title)
            results.add(probe.run(timer, share_s, results))
            if timer.now() - began > OVERRUN * share_s:
                least_s[place] = timer.now() - began
    return results
