"""Measurements of one machine → its hardware file with fitted constants, and what that does to held-out errors."""

import dataclasses
import datetime
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from costmodel import words
from costmodel.calibrate import bootstrap
from costmodel.calibrate.constants import MachineConstant, named, stated
from costmodel.calibrate.held_out import (
    FOLDS,
    LEAST_RUNS,
    Comparison,
    HeldOut,
    by_regime,
    cross_validated,
    errors,
    errors_of,
)
from costmodel.calibrate.identify import Unidentified, identified, unidentified
from costmodel.calibrate.observations import Array, Observed, observed
from costmodel.calibrate.refitted import refitted
from costmodel.calibrate.robust import Fit, fit
from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.offset import moved
from costmodel.uncertainty import LEVEL
from costmodel.validation import Errors

SCHEMA = "tierwise.recalibration/1"

_FIT_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class FittedConstant:
    """A fitted number: effective value before and after, and the interval of ``LEVEL`` of the draws around it."""

    constant: MachineConstant
    before: float
    after: float
    low: float
    high: float
    at_bound: bool

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        numbers = {name: getattr(self, name) for name in ("before", "after", "low", "high", "at_bound")}
        return {"name": self.constant.name, "path": self.constant.path, **numbers}


@dataclass(frozen=True, kw_only=True)
class Recalibration:
    """The refitted machine and what is known of it.

    ``kept`` are constants that the runs do not identify: they stay as the file had them. ``rows`` are all runs, each
    predicted by a fit to other folds; ``regimes`` those of a regime predicted by the runs of the others alone.
    """

    hardware: Hardware
    constants: tuple[FittedConstant, ...]
    kept: tuple[Unidentified, ...]
    rows: tuple[HeldOut, ...]
    regimes: dict[str, tuple[HeldOut, ...]]
    in_sample: dict[str, Errors]
    draws: int

    @property
    def held_out(self) -> Comparison:
        """Errors of all runs, none of them fitted to."""
        return Comparison.of(self.rows)

    @property
    def coverage(self) -> float:
        """The share of held-out runs inside the interval stated for them; ``LEVEL`` is what was stated."""
        return sum(row.inside for row in self.rows) / len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "runs": len(self.rows),
            "constants": [one.to_dict() for one in self.constants],
            "kept": [
                {"name": one.constant.name, "path": one.constant.path, "why": one.why, "run": one.constant.run}
                for one in self.kept
            ],
            "held_out": dataclasses.asdict(self.held_out),
            "in_sample": {name: dataclasses.asdict(one) for name, one in self.in_sample.items()},
            "regimes": {name: dataclasses.asdict(Comparison.of(rows)) for name, rows in self.regimes.items()},
            "coverage": {"stated": LEVEL, "held_out": self.coverage},
            "draws": self.draws,
            "rows": [dataclasses.asdict(row) for row in self.rows],
            "hardware": self.hardware.to_dict(),
        }


def recalibrate(
    hardware: Hardware,
    measurements: Sequence[Measurement],
    *,
    constants: Sequence[str] | None = None,
    files: Sequence[str] = (),
    seed: int = 0,
    draws: int = bootstrap.DRAWS,
    progress: Callable[[int, int], None] | None = None,
) -> Recalibration:
    """Fit the machine's constants to runs of it.

    ``constants`` are names to fit, each of which the runs must identify; ``None`` fits those that they do. Raises
    :class:`InputError` with less than ``LEAST_RUNS`` runs, and where no constant, or not one that was asked for, is
    identified: naming it and the run that would. ``progress`` is called with the steps done and their number.
    """
    if len(measurements) < LEAST_RUNS:
        raise InputError(
            f"{words.counted(len(measurements), 'run')} given: at least {LEAST_RUNS} are needed, so that some can "
            "be held out (tierwise validate --runs 24 makes them)"
        )
    plain = dataclasses.replace(hardware, measured=None)  # a profile's details, which nothing here reads
    runs = [one for one in (observed(measurement, plain) for measurement in measurements) if one.what]
    asked = stated(plain) if constants is None else named(plain, constants)
    steps = _Steps(progress, 1 + FOLDS + len({run.regime for run in runs}), draws)
    found, kept = _fitted(runs, plain, asked, by_name=constants is not None)
    steps.fitted()
    rows = cross_validated(runs, plain, asked, seed=seed, start=found, progress=steps.fitted)
    regimes = by_regime(runs, plain, asked, start=found, progress=steps.fitted)
    made = bootstrap.draws(found, seed=seed, count=draws, progress=steps.drawn)
    title = f"Calibrated to {words.counted(len(runs), 'run')} of this machine"
    title += f" in {', '.join(files)}" if files else ""
    covariance = np.atleast_2d(np.cov(made, rowvar=False))
    machine = refitted(found, hardware, covariance=covariance, source=title, date=_date(measurements))
    return Recalibration(
        hardware=machine,
        constants=_constants(found, hardware, machine, made),
        kept=kept,
        rows=rows,
        regimes=regimes,
        in_sample=errors_of([errors(run, found.machine) for run in runs]),
        draws=len(made),
    )


def _fitted(
    runs: Sequence[Observed], hardware: Hardware, asked: Sequence[MachineConstant], *, by_name: bool
) -> tuple[Fit, tuple[Unidentified, ...]]:
    """The fit of what the runs identify; what was asked for by name must be among it."""
    if by_name:
        found = fit(runs, hardware, asked)
        left_out = tuple(unidentified(found))
        if left_out:
            raise InputError(f"the runs do not identify {'; nor '.join(one.sentence() for one in left_out)}")
        return found, ()
    found, left_out = identified(runs, hardware, asked)
    if not found.constants:
        worst = left_out[-1].sentence() if left_out else "its file states none"
        raise InputError(f"the runs identify no constant of this machine; the nearest is {worst}")
    return found, left_out


def _constants(found: Fit, before: Hardware, after: Hardware, made: Array) -> tuple[FittedConstant, ...]:
    """Values in the units of the file; the interval holds the middle ``LEVEL`` of the draws."""
    tail = (1 - LEVEL) / 2
    rows = []
    for place, (one, bound) in enumerate(zip(found.constants, found.at_bound(), strict=True)):
        ends = np.quantile(made[:, place], (tail, 1 - tail))
        low, high = (moved(before, one.path, float(end)).rates[one.path].effective for end in ends)
        rows.append(
            FittedConstant(
                constant=one,
                before=before.rates[one.path].effective,
                after=after.rates[one.path].effective,
                low=low,
                high=high,
                at_bound=bound,
            )
        )
    return tuple(rows)


def _date(measurements: Sequence[Measurement]) -> str:
    """The day of the latest run; today where none says."""
    days = [str(one.origin.get("date", ""))[:10] for one in measurements]
    known = [day for day in days if re.fullmatch(r"\d{4}-\d{2}-\d{2}", day)]
    return max(known, default=datetime.datetime.now(datetime.UTC).date().isoformat())


class _Steps:
    """Counts steps for a progress bar, where there is one: a fit counts as many as ``_FIT_STEPS`` draws."""

    def __init__(self, progress: Callable[[int, int], None] | None, fits: int, draws: int) -> None:
        self._progress, self._count, self._done = progress, fits * _FIT_STEPS + draws, 0

    def fitted(self) -> None:
        """One more fit is done."""
        self._add(_FIT_STEPS)

    def drawn(self) -> None:
        """One more draw is done."""
        self._add(1)

    def _add(self, steps: int) -> None:
        self._done += steps
        if self._progress is not None:
            self._progress(self._done, self._count)
