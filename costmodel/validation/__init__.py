"""Validation: policies that were predicted and then run, and what that says of the cost model."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

from costmodel import records, shared_cache, words
from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.validation.draw import Drawn, Space, draw
from costmodel.validation.statistics import Cause, Errors, Ranking, Summary, errors_of_repeats, frame, middle, summary

SCHEMA = "tierwise.validation/1"


@dataclass(frozen=True, kw_only=True)
class Validation:
    """A validation at any moment: ``drawn`` is what is to be run, ``repeats`` times each, ``runs`` what was run so far.

    Runs are made in rounds: all policies once in the order of ``drawn``, then all again. Then those are run again of
    which less than half of the runs asked for count (see :attr:`apart`), up to as many times more.
    ``request`` holds the flags that decide what is drawn and run; ``hardware`` is the machine as planned
    with, budgets included.
    """

    request: Mapping[str, Any]
    hardware: Hardware
    drawn: tuple[Drawn, ...]
    repeats: int = 1
    runs: tuple[Measurement, ...] = ()

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise InputError(f"repeats is {self.repeats}: it must be at least 1")
        if len(self.runs) > self.asked * (2 if self._rates else 1):
            policies = words.counted(len(self.drawn), "policy", "policies")
            times = f" to be run {self.repeats} times each" if self.repeats > 1 else ""
            raise InputError(f"there are {policies}{times}, but more measurements ({len(self.runs)})")
        for place, (drawn, found) in enumerate(zip(self.drawn * self.repeats, self.runs, strict=False)):
            if drawn.policy != found.policy:
                raise InputError(f"measurements[{place}] is not a run of policies[{place % len(self.drawn)}]")
        known = {drawn.policy for drawn in self.drawn}
        for place, found in enumerate(self.runs[self.asked :], self.asked):
            if found.policy not in known:
                raise InputError(f"measurements[{place}] is not a run of any of the policies")

    @property
    def asked(self) -> int:
        """How many runs were asked for, before any is made again."""
        return len(self.drawn) * self.repeats

    @property
    def several(self) -> bool:
        """Whether any policy has run more than once, so that what is reported is of middle runs."""
        return len(self.runs) > len(self.drawn)

    @property
    def planned(self) -> int:
        """How many runs there are to be in all, as far as is known."""
        return len(self.runs) + len(self.left)

    @cached_property
    def left(self) -> tuple[Drawn, ...]:
        """The policies of the runs that are still to be made, in their order."""
        regular = (self.drawn * self.repeats)[len(self.runs) :]
        return regular or tuple(drawn for _, drawn in sorted(self._again(), key=lambda pair: pair[0]))

    def _again(self) -> Iterator[tuple[int, Drawn]]:
        """Policies of which too few runs count, with how often each has run."""
        enough = math.ceil(self.repeats / 2)
        for drawn, places in zip(self.drawn, self._places, strict=False):
            counted = sum(place not in self.apart for place in places)
            if counted < enough and len(places) < 2 * self.repeats:
                yield len(places), drawn

    @property
    def progress(self) -> str:
        """``"3 of 12 runs"``."""
        return f"{len(self.runs):,} of {words.counted(self.planned, 'run')}"

    @cached_property
    def by_policy(self) -> tuple[tuple[Measurement, ...], ...]:
        """The runs that count of every policy that has run, in the order of ``drawn``.

        A run during which the cores were apart (see :mod:`costmodel.shared_cache`) counts where its policy has no
        other.
        """
        kept = [[place for place in places if place not in self.apart] or places for places in self._places]
        return tuple(tuple(self.runs[place] for place in places) for places in kept)

    @cached_property
    def _places(self) -> list[list[int]]:
        """Places of all runs of every policy that has run, in the order of ``drawn``."""
        count, policies = len(self.drawn), [drawn.policy for drawn in self.drawn]
        regular = range(min(len(self.runs), self.asked))
        found = [list(regular[place::count]) for place in range(count)]
        for place in range(len(regular), len(self.runs)):
            found[policies.index(self.runs[place].policy)].append(place)
        return [places for places in found if places]

    @property
    def _rates(self) -> list[float]:
        """What was seen of the cores beside all runs."""
        return [rate for one in self.runs for rate in one.shared_write_rates]

    @cached_property
    def apart(self) -> frozenset[int]:
        """Places of the runs for too much of which the cores shared no cache, on a machine where others did."""
        rates = self._rates
        if not rates:
            return frozenset()
        best = shared_cache.best_rate(rates)
        return frozenset(
            place for place, one in enumerate(self.runs) if shared_cache.ran_apart(one.shared_write_rates, best)
        )

    @property
    def set_aside(self) -> int:
        """How many runs do not count."""
        return len(self.runs) - sum(len(runs) for runs in self.by_policy)

    @property
    def only_apart(self) -> int:
        """How many policies have run, but never while the cores were together: what is reported of them is slower."""
        return sum(all(place in self.apart for place in places) for places in self._places)

    @cached_property
    def measurements(self) -> tuple[Measurement, ...]:
        """What is reported: the middle one of the runs that count of every policy, in the order of ``drawn``."""
        return tuple(middle(runs) for runs in self.by_policy)

    def with_run(self, found: Measurement) -> "Validation":
        """A copy with one more run."""
        return dataclasses.replace(self, runs=(*self.runs, found))

    def summary(self) -> Summary:
        """What the runs so far say; at least one is needed."""
        repeatability = errors_of_repeats(self.by_policy)
        return summary(
            self.measurements, repeatability=repeatability, set_aside=self.set_aside, only_apart=self.only_apart
        )

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "request": dict(self.request),
            "summary": self.summary().to_dict() if self.runs else None,
            "repeats": self.repeats,
            "policies": [records.to_dict(one) for one in self.drawn],
            "measurements": [one.to_dict() for one in self.runs],
            "hardware": self.hardware.to_dict(),
        }

    def save(self, path: str | PathLike[str]) -> None:
        """Write the validation file atomically."""
        records.write_json(self.to_dict(), path)

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Validation":
        """Read a validation file, finished or not; one without ``repeats`` has 1."""
        data = records.check_schema(records.read_json(path), SCHEMA, where=str(path))
        try:
            return cls(
                request=data["request"],
                hardware=Hardware.from_dict(data["hardware"], where=f"{path}: hardware"),
                drawn=tuple(
                    records.from_dict(Drawn, one, where=f"{path}: policies[{place}]")
                    for place, one in enumerate(data["policies"])
                ),
                repeats=data.get("repeats", 1),
                runs=tuple(
                    Measurement.from_dict(one, where=f"{path}: measurements[{place}]")
                    for place, one in enumerate(data["measurements"])
                ),
            )
        except (KeyError, TypeError) as error:
            raise InputError(f"{path}: this is no validation: {error}") from None


__all__ = [
    "Cause",
    "Drawn",
    "Errors",
    "Ranking",
    "Space",
    "Summary",
    "Validation",
    "draw",
    "frame",
    "summary",
]
