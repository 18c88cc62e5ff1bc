"""Errors of runs that were not fitted to: cross-validation in folds that each hold runs of every regime."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.calibrate.constants import MachineConstant
from costmodel.calibrate.identify import identified
from costmodel.calibrate.observations import Observed
from costmodel.calibrate.refitted import refitted
from costmodel.calibrate.robust import Fit
from costmodel.estimate import PHASES
from costmodel.hardware import Hardware
from costmodel.uncertainty import DEVIATIONS, Uncertainty
from costmodel.validation import Errors

FOLDS = 5
LEAST_RUNS = 6
"""Fewer runs leave too little to fit to in a fold."""

Progress = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A run predicted by the file (``before``) and by a fit to other runs (``after``): relative errors by quantity.

    ``inside`` says whether the measured throughput lay within the interval that the fit stated; ``relative`` is half
    of that interval.
    """

    place: int
    regime: str
    before: dict[str, float]
    after: dict[str, float]
    inside: bool
    relative: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Errors of the same runs before and after, by quantity."""

    before: dict[str, Errors]
    after: dict[str, Errors]

    @classmethod
    def of(cls, rows: Sequence[HeldOut]) -> "Comparison":
        """Summarise at least one run."""
        return cls(before=errors_of([row.before for row in rows]), after=errors_of([row.after for row in rows]))


def errors_of(found: Sequence[dict[str, float]]) -> dict[str, Errors]:
    """Errors by quantity; a run without a phase has none of it."""
    named = {name: [one[name] for one in found if name in one] for name in ("throughput", *PHASES)}
    return {name: Errors.of(some) for name, some in named.items() if some}


def cross_validated(
    runs: Sequence[Observed],
    hardware: Hardware,
    constants: Sequence[MachineConstant],
    *,
    seed: int,
    start: Fit,
    progress: Progress = lambda: None,
) -> tuple[HeldOut, ...]:
    """Every run predicted by a fit to the other folds, in the runs' order.

    ``start`` is where each fit begins, which saves time and decides nothing: the optimum is the others' own.
    """
    rows: list[HeldOut] = []
    for fold in folds([run.regime for run in runs], seed=seed):
        rows += _predicted(runs, fold, hardware, constants, start)
        progress()
    return tuple(sorted(rows, key=lambda row: row.place))


def by_regime(
    runs: Sequence[Observed],
    hardware: Hardware,
    constants: Sequence[MachineConstant],
    *,
    start: Fit,
    progress: Progress = lambda: None,
) -> dict[str, tuple[HeldOut, ...]]:
    """Every regime predicted by a fit to the runs of the others alone, where those are enough."""
    found = {}
    for regime in sorted({run.regime for run in runs}):
        inside = [place for place, run in enumerate(runs) if run.regime == regime]
        if len(runs) - len(inside) >= LEAST_RUNS:
            found[regime] = tuple(_predicted(runs, inside, hardware, constants, start))
        progress()
    return found


def folds(regimes: Sequence[str], *, seed: int, count: int = FOLDS) -> list[list[int]]:
    """Places of the runs in each fold: every regime is dealt out in a random order, one fold after the other."""
    generator = np.random.default_rng(seed)
    dealt: list[list[int]] = [[] for _ in range(min(count, len(regimes)))]
    turn = 0
    for regime in sorted(set(regimes)):
        places = [place for place, one in enumerate(regimes) if one == regime]
        for place in generator.permutation(places):
            dealt[turn % len(dealt)].append(int(place))
            turn += 1
    return [sorted(fold) for fold in dealt]


def _predicted(
    runs: Sequence[Observed],
    left_out: Iterable[int],
    hardware: Hardware,
    constants: Sequence[MachineConstant],
    start: Fit,
) -> list[HeldOut]:
    out = set(left_out)
    others = [run for place, run in enumerate(runs) if place not in out]
    found, _ = identified(others, hardware, constants, start=start)
    machine = refitted(found, hardware, covariance=None, source="calibration")
    uncertainty = Uncertainty.of(machine)
    assert uncertainty is not None  # the machine carries a calibration
    return [_row(place, runs[place], hardware, uncertainty) for place in sorted(out)]


def _row(place: int, run: Observed, before: Hardware, after: Uncertainty) -> HeldOut:
    one = run.measurement
    predicted = after.predict(one.policy, one.model, one.workload)
    interval = after.interval(predicted)
    measured = one.policy.block_size * one.workload.gen_len / one.measured.latency_s
    inside = abs(np.log(measured / interval.throughput_tok_per_s)) <= DEVIATIONS * interval.deviation
    return HeldOut(
        place=place,
        regime=run.regime,
        before=errors(run, before),
        after=errors(run, after.hardware),
        inside=bool(inside),
        relative=interval.relative,
    )


def errors(run: Observed, hardware: Hardware) -> dict[str, float]:
    """Predicted / measured − 1 of throughput and of the seconds of both phases."""
    seconds = dict(zip(run.what, run.seconds(hardware), strict=True))
    found = {}
    predicted = measured = 0.0
    for (phase, resource), log in zip(run.what, run.logs, strict=True):
        if resource is None:
            found[phase] = float(seconds[phase, None] / np.exp(log) - 1)
            predicted, measured = predicted + seconds[phase, None], measured + float(np.exp(log))
    return {"throughput": float(measured / predicted - 1), **found}
