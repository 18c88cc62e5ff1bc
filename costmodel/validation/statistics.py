"""How far predictions are from measurements: errors by quantity and regime, their causes, and the ranking.

An error is relative, predicted / measured − 1. The regime of a run is its measured bottleneck. Of a policy that ran
more than once, the middle run stands for it, whole, so that its phases, busy seconds and peaks belong together.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from costmodel.errors import InputError
from costmodel.estimate import PHASES, Estimate
from costmodel.formulations.base import RESOURCES, Resource
from costmodel.measurement import Measurement
from costmodel.policy import TIERS

if TYPE_CHECKING:
    import pandas as pd

COMPARED: tuple[Resource, ...] = tuple(resource for resource in RESOURCES if resource != "cpu_compute")
"""Resources whose predicted and measured busy seconds can be compared: see :func:`compared_s`."""

QUANTITIES = ("throughput", "prefill", "decode", *(f"peak {tier}" for tier in TIERS))

WAITING = "waiting"
"""The part of a phase that its bottleneck does not explain: what was not hidden behind it."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of one quantity over some runs.

    ``median`` and ``p90`` (linear between the runs) are of their sizes, ``worst`` is the largest one with its
    sign, ``bias`` the median with signs.
    """

    runs: int
    median: float
    p90: float
    worst: float
    bias: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> "Errors":
        """Summarise at least one error."""
        import numpy as np

        if not errors:
            raise InputError("there are no errors to summarise: at least one run is needed")
        sizes = np.abs(errors)
        return cls(
            runs=len(errors),
            median=float(np.median(sizes)),
            p90=float(np.quantile(sizes, 0.9)),
            worst=float(errors[int(np.argmax(sizes))]),
            bias=float(np.median(errors)),
        )


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One resource in one phase (or ``waiting``), over all runs.

    ``resource`` is one of :data:`COMPARED`, ``predicted_s`` and ``measured_s`` are its busy seconds. ``ratio`` is the
    median of measured / predicted over the ``runs`` in which it was at work. ``gap_s`` are the seconds by which the
    runs took longer than predicted on its account: over all causes they sum to the whole difference between measured
    and predicted time.
    """

    phase: str
    resource: str
    runs: int
    predicted_s: float
    measured_s: float
    ratio: float | None
    gap_s: float


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Whether the model orders policies as the machine does, by throughput.

    ``tau`` is Kendall's (1: the same order, 0: none), ``regret`` the share of the best measured throughput that is lost
    by running the policy predicted best. ``best_predicted`` and ``best_measured`` are places in the list of runs.
    """

    tau: float
    p_value: float
    regret: float
    best_predicted: int
    best_measured: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What measurements say of the cost model, and ``repeatability`` of the machine (``None`` without a second run).

    ``over_budget`` runs took more memory than they were given. ``set_aside`` more were made, which do not count: the
    cores shared no cache meanwhile; ``only_apart`` policies have no other.
    """

    runs: int
    errors: dict[str, Errors]
    regimes: dict[str, dict[str, Errors]]
    causes: tuple[Cause, ...]
    ranking: Ranking | None
    over_budget: int
    repeatability: Errors | None
    set_aside: int = 0
    only_apart: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return dataclasses.asdict(self)


def summary(
    measurements: Sequence[Measurement],
    *,
    repeatability: Errors | None = None,
    set_aside: int = 0,
    only_apart: int = 0,
) -> Summary:
    """Summarise at least one run, one a policy; ``repeatability`` is of :func:`errors_of_repeats`."""
    regimes: dict[str, list[Measurement]] = {}
    for one in measurements:
        regimes.setdefault(regime(one.measured), []).append(one)
    return Summary(
        runs=len(measurements),
        errors=_errors(measurements),
        regimes={name: _errors(regimes[name]) for name in RESOURCES if name in regimes},
        causes=causes(measurements),
        ranking=ranking(measurements),
        over_budget=sum(bool(one.measured.violations) for one in measurements),
        repeatability=repeatability,
        set_aside=set_aside,
        only_apart=only_apart,
    )


def frame(measurements: Sequence[Measurement]) -> "pd.DataFrame":
    """One row a run: the policy, predicted and measured, errors, and the regime; units in the column names."""
    import pandas as pd

    from costmodel.tables import policy_frame

    table = policy_frame([(one.policy, one.measured) for one in measurements])
    table.insert(0, "regime", [regime(one.measured) for one in measurements])
    for name in ("throughput_tok_per_s", "prefill_s", "decode_s", "latency_s"):
        table[f"predicted_{name}"] = [getattr(one.predicted, name) for one in measurements]
    errors = pd.DataFrame([errors_of(one) for one in measurements], columns=list(QUANTITIES))
    errors.columns = pd.Index([f"{name.replace(' ', '_')}_error" for name in QUANTITIES])
    return pd.concat([table, errors], axis=1)


def regime(measured: Estimate) -> str:
    """The resource that was busy for longest over both phases."""
    return max(RESOURCES, key=lambda name: sum(measured.busy_s[phase][name] for phase in PHASES))


# ------------------------------------------------------------------ repeats


def middle(runs: Sequence[Measurement]) -> Measurement:
    """The run of median measured latency; of an even number the faster of the two in the middle."""
    return _middle_and_others(runs)[0]


def errors_of_repeats(by_policy: Sequence[Sequence[Measurement]]) -> Errors | None:
    """Throughput of all other runs relative to that of their policy's middle run, minus 1; ``None`` without any."""
    errors = [
        _relative(one.measured.throughput_tok_per_s, typical.measured.throughput_tok_per_s)
        for typical, others in map(_middle_and_others, by_policy)
        for one in others
    ]
    return Errors.of(errors) if errors else None


def _middle_and_others(runs: Sequence[Measurement]) -> tuple[Measurement, list[Measurement]]:
    others = sorted(runs, key=lambda one: one.measured.latency_s)
    typical = others.pop((len(others) - 1) // 2)
    return typical, others


# ------------------------------------------------------------------ errors


def errors_of(one: Measurement) -> dict[str, float]:
    """The error of every quantity that the run has: a phase without work or an unused tier has none."""
    pairs = {name: (value_of(one.predicted, name), value_of(one.measured, name)) for name in QUANTITIES}
    # A decode of no steps is measured as microseconds of bookkeeping; what was never predicted cannot be wrong.
    return {name: _relative(*pair) for name, pair in pairs.items() if pair[0] > 0}


def value_of(cost: Estimate, quantity: str) -> float:
    """One of :data:`QUANTITIES` (token/s, seconds or bytes)."""
    if quantity.startswith("peak "):
        return cost.peak_bytes[quantity.removeprefix("peak ")]
    return cost.throughput_tok_per_s if quantity == "throughput" else _seconds(cost, quantity)


def _relative(predicted: float, measured: float) -> float:
    """Relative to what was measured; where that is nothing, all of the prediction was too much."""
    return predicted / measured - 1 if measured > 0 else 1.0


def _errors(measurements: Sequence[Measurement]) -> dict[str, Errors]:
    found = [errors_of(one) for one in measurements]
    by_quantity = {name: [errors[name] for errors in found if name in errors] for name in QUANTITIES}
    return {name: Errors.of(errors) for name, errors in by_quantity.items() if errors}


# ------------------------------------------------------------------ causes


def compared_s(busy_s: Mapping[str, float]) -> dict[str, float]:
    """Busy seconds of a phase by :data:`COMPARED`: attention on the CPU is counted with ``gpu_compute``.

    It is predicted apart, but a batch waits for it, and a run times what is computed for a batch as one stretch.
    """
    return {name: busy_s[name] + (busy_s["cpu_compute"] if name == "gpu_compute" else 0.0) for name in COMPARED}


def gaps(one: Measurement, phase: str) -> dict[str, float]:
    """Seconds by which a phase took longer than predicted, by cause; they sum to the difference exactly.

    With overlap, work that hides behind the bottleneck costs nothing: the difference is the bottleneck's own
    (measured − predicted busy seconds) plus what was not hidden behind it (``waiting``). Without overlap every
    resource's difference counts.
    """
    predicted, measured = one.predicted, one.measured
    before, after = compared_s(predicted.busy_s[phase]), compared_s(measured.busy_s[phase])
    found: dict[str, float] = {
        name: after[name] - before[name] for name in _counted(one, phase) if after[name] or before[name]
    }
    whole = _seconds(measured, phase) - _seconds(predicted, phase)
    return {**found, WAITING: whole - sum(found.values())}


def _counted(one: Measurement, phase: str) -> tuple[Resource, ...]:
    """The resources whose own differences lengthen a phase: with overlap, the busiest one."""
    after = compared_s(one.measured.busy_s[phase])
    return (max(COMPARED, key=lambda name: after[name]),) if one.policy.overlap else COMPARED


def causes(measurements: Sequence[Measurement]) -> tuple[Cause, ...]:
    """Every resource of every phase that was at work, and what was not hidden; the largest gap first."""
    found = []
    for phase in PHASES:
        split = [gaps(one, phase) for one in measurements]
        for resource in (*COMPARED, WAITING):
            gap_s = sum(one.get(resource, 0.0) for one in split)
            cause = _cause(measurements, phase, resource, gap_s)
            if cause is not None:
                found.append(cause)
    return tuple(sorted(found, key=lambda cause: -abs(cause.gap_s)))


def _cause(measurements: Sequence[Measurement], phase: str, resource: str, gap_s: float) -> Cause | None:
    pairs = [
        (busy_s(one, one.predicted, phase, resource), busy_s(one, one.measured, phase, resource))
        for one in measurements
    ]
    worked = [(before, after) for before, after in pairs if before or after]
    if not worked:
        return None
    ratios = [after / before for before, after in worked if before > 0 and resource != WAITING]
    return Cause(
        phase=phase,
        resource=resource,
        runs=len(worked),
        predicted_s=math.fsum(before for before, _ in worked),
        measured_s=math.fsum(after for _, after in worked),
        ratio=median(ratios) if ratios else None,
        gap_s=gap_s,
    )


def busy_s(one: Measurement, cost: Estimate, phase: str, resource: str) -> float:
    """Busy seconds of one of :data:`COMPARED`, or what the same ones as in :func:`gaps` leave unexplained."""
    compared = compared_s(cost.busy_s[phase])
    if resource != WAITING:
        return compared[resource]
    return _seconds(cost, phase) - sum(compared[name] for name in _counted(one, phase))


def _seconds(cost: Estimate, phase: str) -> float:
    return cost.prefill_s if phase == "prefill" else cost.decode_s


# ------------------------------------------------------------------ ranking


def ranking(measurements: Sequence[Measurement]) -> Ranking | None:
    """Order by predicted against order by measured throughput; ``None`` for less than two runs."""
    if len(measurements) < 2:
        return None
    from scipy.stats import kendalltau

    predicted = [one.predicted.throughput_tok_per_s for one in measurements]
    measured = [one.measured.throughput_tok_per_s for one in measurements]
    found: Any = kendalltau(predicted, measured)
    followed, best = predicted.index(max(predicted)), measured.index(max(measured))
    tau, p_value = float(found.statistic), float(found.pvalue)
    return Ranking(
        tau=0.0 if math.isnan(tau) else tau,  # all predictions equal: no order at all
        p_value=1.0 if math.isnan(p_value) else p_value,
        regret=1 - measured[followed] / measured[best],
        best_predicted=followed,
        best_measured=best,
    )
