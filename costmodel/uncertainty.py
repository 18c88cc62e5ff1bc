"""How far a prediction may be from a run, as far as the hardware file says: ± x % beside a throughput.

First order: the variance of ln(seconds) is gᵀ Σ g + s². g are the slopes of ln(seconds) to the machine's numbers,
taken as secants over one standard deviation each side (at most a factor of e). Σ is their covariance: that of the
calibration where the file has one, else the spreads of the measured numbers, as if they were independent. s is the
scatter of runs around a calibrated prediction, and 0 where the file was never calibrated: then the interval says what
the rates leave open, not what the formulas miss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing

from costmodel.calibrated import Calibrated
from costmodel.estimate import PHASES, block_seconds, case_of
from costmodel.formulations import get
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.offset import SHARE, deviation, moved
from costmodel.policy import Policy
from costmodel.quantity import Quantity
from costmodel.workload import Workload

LEVEL = 0.95
DEVIATIONS = 1.959964
"""Half of the interval that holds ``LEVEL`` of a normal distribution, in standard deviations."""

Array = np.typing.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """Where 95 of 100 runs are expected. ``deviation`` is the standard deviation of ln(throughput)."""

    throughput_tok_per_s: float
    deviation: float

    @property
    def relative(self) -> float:
        """Half of the interval as a share of the prediction, to first order."""
        return DEVIATIONS * self.deviation

    @property
    def low(self) -> float:
        """The lower end, token/s."""
        return self.throughput_tok_per_s * math.exp(-self.relative)

    @property
    def high(self) -> float:
        """The upper end, token/s."""
        return self.throughput_tok_per_s * math.exp(self.relative)

    def to_dict(self) -> dict[str, float]:
        """The documented JSON form."""
        return {"low_tok_per_s": self.low, "high_tok_per_s": self.high, "relative": self.relative}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of a block's (prefill, decode), and their slopes (numbers, 2) in seconds an offset."""

    seconds: Array
    slopes: Array
    throughput_tok_per_s: float

    @property
    def shares(self) -> Array:
        """Share of each phase in the block's seconds."""
        return np.asarray(self.seconds / self.seconds.sum())

    @property
    def throughput_slopes(self) -> Array:
        """d ln(throughput) / d offset."""
        return np.asarray(-self.slopes.sum(axis=1) / self.seconds.sum())


@dataclass(frozen=True, kw_only=True)
class Uncertainty:
    """What a hardware file leaves open: the covariance of the offsets of its uncertain numbers, and its scatter."""

    hardware: Hardware
    paths: tuple[str, ...]
    covariance: Array
    calibrated: Calibrated | None

    @classmethod
    def of(cls, hardware: Hardware, formulation: str = "roofline") -> "Uncertainty | None":
        """What this machine's file says, or ``None`` where it states neither spreads nor a calibration.

        Only of the roofline formulation: how far another is off is no matter of the rates.
        """
        if formulation != "roofline":
            return None
        kept = _still_fitted(hardware)
        fitted = {} if kept is None else dict.fromkeys(kept.constants)
        spreads = {path: deviation(path, one) for path, one in hardware.rates.items() if path not in fitted}
        measured = {path: found for path, found in spreads.items() if found > 0}
        if kept is None and not measured:
            return None
        paths = (*fitted, *measured)
        covariance = np.diag(np.array([0.0] * len(fitted) + [found**2 for found in measured.values()]))
        if kept is not None:
            covariance[: len(fitted), : len(fitted)] = np.array(kept.covariance).reshape(len(fitted), len(fitted))
        return cls(hardware=hardware, paths=paths, covariance=covariance, calibrated=kept)

    @property
    def basis(self) -> str:
        """``"calibration"`` or ``"spreads"``: what the intervals rest on."""
        return "spreads" if self.calibrated is None else "calibration"

    def predict(self, policy: Policy, model: ModelSpec, workload: Workload) -> Prediction:
        """Seconds of a policy and how they move with every uncertain number."""

        def seconds(machine: Hardware) -> Array:
            return np.array(block_seconds(get("roofline"), case_of(policy, machine, model, workload), policy))

        rates, slopes = self.hardware.rates, []
        for path, variance in zip(self.paths, np.diag(self.covariance), strict=True):
            step = min(math.sqrt(variance), 1.0)
            low, high = (moved(self.hardware, path, sign * step) for sign in (-1.0, 1.0))
            span = _offset(path, high.rates[path], rates[path]) - _offset(path, low.rates[path], rates[path])
            slopes.append((seconds(high) - seconds(low)) / span if span > 0 else np.zeros(len(PHASES)))
        here = seconds(self.hardware)
        tokens = policy.block_size * workload.gen_len
        return Prediction(
            seconds=here,
            slopes=np.array(slopes).reshape(len(self.paths), len(PHASES)),
            throughput_tok_per_s=tokens / float(here.sum()),
        )

    def interval(self, one: Prediction) -> Interval:
        """The interval of a policy's throughput."""
        variance = self._variance(one.throughput_slopes) + self._scatter(one)
        return Interval(throughput_tok_per_s=one.throughput_tok_per_s, deviation=math.sqrt(variance))

    def phase_deviations(self, one: Prediction) -> tuple[float, float]:
        """Standard deviations of ln(prefill seconds) and ln(decode seconds)."""
        spreads = (0.0, 0.0) if self.calibrated is None else self._spreads(self.calibrated)
        found = []
        for place, spread in enumerate(spreads):
            seconds = float(one.seconds[place])
            found.append(
                math.hypot(math.sqrt(self._variance(one.slopes[:, place] / seconds)), spread) if seconds else 0.0
            )
        return found[0], found[1]

    def apart(self, one: Prediction, other: Prediction) -> bool:
        """Whether ``LEVEL`` of the difference between two policies' throughputs has one sign.

        The same numbers enter both predictions, so that what they share cancels; the scatter of two runs does not.
        """
        variance = self._variance(one.throughput_slopes - other.throughput_slopes)
        variance += self._scatter(one) + self._scatter(other)
        ratio = math.log(one.throughput_tok_per_s / other.throughput_tok_per_s)
        return abs(ratio) > DEVIATIONS * math.sqrt(variance)

    def _variance(self, slopes: Array) -> float:
        return max(0.0, float(slopes @ self.covariance @ slopes))

    def _scatter(self, one: Prediction) -> float:
        """Variance of ln(throughput) of a run around its prediction."""
        if self.calibrated is None:
            return 0.0
        first, second = one.shares * np.array(self._spreads(self.calibrated))
        return float(first**2 + second**2 + 2 * self.calibrated.correlation * first * second)

    @staticmethod
    def _spreads(calibrated: Calibrated) -> tuple[float, float]:
        return calibrated.prefill_spread, calibrated.decode_spread


def intervals(
    policies: Sequence[Policy], *, hardware: Hardware, model: ModelSpec, workload: Workload, formulation: str
) -> "Intervals | None":
    """The intervals of some policies, and which cannot be told from the first; ``None`` where the file has none."""
    found = Uncertainty.of(hardware, formulation)
    if found is None or not policies:
        return None
    predictions = [found.predict(policy, model, workload) for policy in policies]
    return Intervals(
        basis=found.basis,
        each=tuple(found.interval(one) for one in predictions),
        apart=tuple(found.apart(predictions[0], one) for one in predictions[1:]),
    )


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Intervals of several policies; ``apart`` says of each after the first whether it differs from the first."""

    basis: str
    each: tuple[Interval, ...]
    apart: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form: of the first policy, and of the others in their order."""
        others = [{**one.to_dict(), "told_apart": apart} for one, apart in zip(self.each[1:], self.apart, strict=True)]
        return {"level": LEVEL, "basis": self.basis, **self.each[0].to_dict(), "alternatives": others}


def _still_fitted(hardware: Hardware) -> Calibrated | None:
    """The calibration without the constants that somebody has replaced since."""
    found = hardware.calibration
    if found is None:
        return None
    rates = hardware.rates
    kept = [
        place
        for place, path in enumerate(found.constants)
        if found.source in (rates[path].source, rates[path].efficiency_source)
    ]
    return Calibrated(
        source=found.source,
        runs=found.runs,
        constants=tuple(found.constants[place] for place in kept),
        covariance=tuple(tuple(found.covariance[i][j] for j in kept) for i in kept),
        prefill_spread=found.prefill_spread,
        decode_spread=found.decode_spread,
        correlation=found.correlation,
    )


def _offset(path: str, there: Quantity, here: Quantity) -> float:
    """The offset between two values of a number."""
    if path == SHARE:
        return there.effective - here.effective
    return math.log(there.effective / here.effective)
