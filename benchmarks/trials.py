"""A comparison of two engines at their best batch sizes: its cases, their trials, the search, the table.

Nothing here runs anything: :mod:`benchmarks.against_accelerate` does.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from costmodel import records, units
from costmodel.shared_cache import best_rate, ran_apart

SHARE_TARGET = 0.85
"""The least share of the promised throughput that ours must reach."""

MOST_BATCH = 1024
"""Doubling stops here."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One comparison. ``batches`` are accelerate's first sizes; one size alone fixes the batch of both sides."""

    key: str
    model: str
    limit_bytes: int
    prompt_len: int
    gen_len: int
    batches: tuple[int, ...]
    target: float

    @property
    def fixed_batch(self) -> int | None:
        """The batch both sides must take, where the case says so."""
        return self.batches[0] if len(self.batches) == 1 else None

    def __str__(self) -> str:
        at = "" if self.fixed_batch is None else f", batch {self.fixed_batch} each"
        limit = units.format_bytes(self.limit_bytes)
        return f"({self.key}) {self.model} in {limit}, {self.prompt_len} + {self.gen_len} tokens{at}"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that ended well: its token/s, and the shared writes seen beside it (B/s, ``costmodel.shared_cache``)."""

    tok_per_s: float
    looks: tuple[float, ...]

    def is_apart(self, looks: Sequence[float]) -> bool:
        """Whether the cores shared no cache meanwhile, by the best of all ``looks`` so far."""
        return bool(looks) and ran_apart(self.looks, best_rate(looks))


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One batch size on one side: its runs, and how the last one ended.

    ``set_aside`` are runs during which the cores shared no cache; where all were so (``only_apart``) all of them count.
    ``details`` is what the child said of its last run that counts; ``peak_bytes`` is the cgroup's, page cache included.
    """

    batch: int
    runs: tuple[Run, ...]
    ended: str
    oom_killed: bool
    peak_bytes: int | None
    attention: str | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    set_aside: tuple[Run, ...] = ()
    only_apart: bool = False

    @property
    def tok_per_s(self) -> tuple[float, ...]:
        """The rates of the runs that count."""
        return tuple(run.tok_per_s for run in self.runs)

    @property
    def median(self) -> float:
        """Token/s; 0 where a run failed."""
        return statistics.median(self.tok_per_s) if self.ran else 0.0

    @property
    def ran(self) -> bool:
        """Whether every run ended well."""
        return self.ended == "exit code 0" and bool(self.tok_per_s)

    def __str__(self) -> str:
        if not self.ran:
            return self.ended
        spread = (max(self.tok_per_s) - min(self.tok_per_s)) / self.median
        rate = f"{self.median:.2f} token/s" + (f" ±{spread / 2:.0%}" if len(self.tok_per_s) > 1 else "")
        aside = ", ".join(f"{one.tok_per_s:.2f}" for one in self.set_aside)
        if self.only_apart:
            return f"{rate} (the cores shared no cache, each time)"
        return f"{rate} (set aside, the cores shared no cache: {aside})" if aside else rate


@dataclass(frozen=True, kw_only=True)
class Promise:
    """What the search says: its policy's throughput and the bound that no policy exceeds."""

    throughput_tok_per_s: float
    bound_tok_per_s: float
    policy: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Both sides of a case, as far as they were run."""

    case: Case
    accelerate: tuple[Trial, ...] = ()
    promise: Promise | None = None
    ours: Trial | None = None

    @property
    def best(self) -> Trial | None:
        """Accelerate's fastest batch; ``None`` where none ran."""
        return max((trial for trial in self.accelerate if trial.ran), key=lambda trial: trial.median, default=None)

    @property
    def ratio(self) -> float | None:
        """Ours over accelerate's best."""
        return None if self.ours is None or self.best is None else self.ours.median / self.best.median

    @property
    def share(self) -> float | None:
        """Ours over what the search promised."""
        return (
            None if self.ours is None or self.promise is None else self.ours.median / self.promise.throughput_tok_per_s
        )

    @property
    def met(self) -> bool:
        """Whether ratio and share reach their targets."""
        return (self.ratio or 0.0) >= self.case.target and (self.share or 0.0) >= SHARE_TARGET


def sizes_to_try(first: Sequence[int]) -> Iterator[int]:
    """The given batch sizes, then doubles of the last one; a single size stays alone."""
    yield from first
    if len(first) > 1:
        yield from itertools.takewhile(lambda size: size <= MOST_BATCH, (first[-1] << n for n in itertools.count(1)))


def best_batch(run: Callable[[int], Trial], first: Sequence[int], refine: int) -> list[Trial]:
    """Batch sizes up to a failure or two slowdowns in a row, then ``refine`` halvings towards the size that failed."""
    trials: list[Trial] = []
    for size in sizes_to_try(first):
        trials.append(run(size))
        if not trials[-1].ran:
            break
        last = [trial.median for trial in trials[-3:]]
        if len(last) == 3 and last[0] > last[1] > last[2]:
            return trials
    if len(trials) < 2 or not trials[-1].oom_killed:
        return trials
    good, killed = trials[-2].batch, trials[-1].batch
    for _ in range(refine):
        middle = (good + killed) // 2
        if middle in (good, killed):
            break
        trials.append(run(middle))
        good, killed = (middle, killed) if trials[-1].ran else (good, middle)
    return trials


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Ratios and shares beside their targets."""
    lines = [
        f"{'case':<58}{'accelerate':>12}{'batch':>7}{'ours':>9}{'batch':>7}{'ratio':>7}{'target':>8}"
        f"{'promise':>9}{'bound':>9}{'share':>7}{'target':>8}"
    ]
    for outcome in outcomes:
        best, ours, promise = outcome.best, outcome.ours, outcome.promise
        cells = [
            ("none ran" if outcome.accelerate else "–", 12) if best is None else (f"{best.median:.2f}", 12),
            (_or_dash(None if best is None else best.batch, "d"), 7),
            ("–" if ours is None else f"{ours.median:.2f}" if ours.ran else "failed", 9),
            (_or_dash(None if ours is None else ours.batch, "d"), 7),
            (_or_dash(outcome.ratio, ".2f"), 7),
            (f"{outcome.case.target:.1f}", 8),
            (_or_dash(None if promise is None else promise.throughput_tok_per_s, ".2f"), 9),
            (_or_dash(None if promise is None else promise.bound_tok_per_s, ".2f"), 9),
            (_or_dash(outcome.share, ".0%"), 7),
            (f"{SHARE_TARGET:.0%}", 8),
        ]
        verdict = "met" if outcome.met else "MISSED"
        complete = outcome.ratio is not None and outcome.share is not None
        lines.append(
            f"{outcome.case!s:<58}" + "".join(f"{text:>{width}}" for text, width in cells) + f"  {verdict}" * complete
        )
    return lines


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def to_dict(outcome: Outcome) -> dict[str, Any]:
    """The outcome as JSON-ready data, with what follows from it."""
    derived = {"ratio": outcome.ratio, "share": outcome.share, "best_batch": outcome.best and outcome.best.batch}
    return records.to_dict(outcome) | {key: value for key, value in derived.items() if value is not None}
