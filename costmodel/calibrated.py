"""What a calibration leaves in a hardware file: the constants it fitted, their covariance, and what the fit missed."""

import math
from dataclasses import dataclass

from costmodel import records
from costmodel.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The ``calibration`` section of a hardware file.

    ``constants`` are dotted paths of the quantities that were fitted to ``runs`` runs, and ``covariance`` is that of
    their natural logarithms (of ``engine.unhidden_share`` itself), in the same order. ``prefill_spread`` and
    ``decode_spread`` are standard deviations of ln(measured / predicted seconds) of a run that was not fitted to, and
    ``correlation`` is that of the two in one run. ``source`` is the key of ``Hardware.sources`` that the fitted
    numbers name.
    """

    __pydantic_config__ = records.STRICT

    source: str
    runs: int
    constants: tuple[str, ...]
    covariance: tuple[tuple[float, ...], ...]
    prefill_spread: float
    decode_spread: float
    correlation: float

    def __post_init__(self) -> None:
        size = len(self.constants)
        if self.runs < 1:
            raise InputError(f"runs is {self.runs}: it must be at least 1")
        if len(set(self.constants)) != size:
            raise InputError("constants names one path twice")
        if len(self.covariance) != size or any(len(row) != size for row in self.covariance):
            raise InputError(f"covariance must have {size} rows of {size} numbers, as there are constants")
        for i, row in enumerate(self.covariance):
            if not all(math.isfinite(entry) for entry in row) or row[i] < 0:
                raise InputError(f"covariance row {i} is no row of a covariance: it must be finite, its diagonal >= 0")
            if any(abs(entry - self.covariance[j][i]) > 1e-9 * (1 + abs(entry)) for j, entry in enumerate(row)):
                raise InputError(f"covariance row {i} differs from column {i}: it must be symmetric")
        for name in ("prefill_spread", "decode_spread"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}: it must be finite and at least 0")
        if not -1 <= self.correlation <= 1:
            raise InputError(f"correlation is {self.correlation}: it must lie in [-1, 1]")
