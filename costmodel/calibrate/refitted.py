"""A fit written into the machine's hardware file: numbers with their origin, and how well they are known."""

import dataclasses

import numpy as np
from scipy.stats import t as student_t

from costmodel.calibrate.observations import GROUPS, Array
from costmodel.calibrate.robust import MAD_DEVIATIONS, Fit
from costmodel.calibrated import Calibrated
from costmodel.hardware import Hardware
from costmodel.offset import IQR_DEVIATIONS, SHARE, has_ceiling, moved
from costmodel.quantity import Quantity, Source
from costmodel.uncertainty import DEVIATIONS, LEVEL

KEY = "calibration"
"""The name of the source that fitted numbers have."""


def refitted(
    found: Fit, hardware: Hardware, *, covariance: Array | None, source: str, date: str = "0000-00"
) -> Hardware:
    """The machine with the fitted numbers; without a ``covariance`` (of the draws) that of the curvature is taken.

    ``source`` is the title of their origin. Capacities and numbers that were not fitted stay as they are.
    """
    known: Array = curvature(found) if covariance is None else covariance
    variances = dict(zip((one.path for one in found.constants), np.diag(known), strict=True))
    sources = {**hardware.sources, KEY: Source(title=source, date=date)}
    machine = dataclasses.replace(hardware, sources=sources, calibration=None)
    for constant, offset in zip(found.constants, found.offsets, strict=True):
        path = constant.path
        ceiling = has_ceiling(path, machine.rates[path])
        deviation = float(np.sqrt(variances[path]))

        def signed(new: Quantity, path: str = path, ceiling: bool = ceiling, deviation: float = deviation) -> Quantity:
            size = new.effective if path == SHARE else 1.0
            spread = IQR_DEVIATIONS * deviation / size if size > 0 else None
            origin = {"efficiency_source": KEY} if ceiling else {"source": KEY}
            return dataclasses.replace(new, spread=spread, **origin)  # type: ignore[arg-type]

        machine = moved(machine, path, float(offset)).changed(path, signed)
    prefill, decode, correlation = scatter(found)
    section = Calibrated(
        source=KEY,
        runs=int(found.owner.max()) + 1,
        constants=tuple(one.path for one in found.constants),
        covariance=tuple(tuple(row) for row in ((known + known.T) / 2).tolist()),
        prefill_spread=prefill,
        decode_spread=decode,
        correlation=correlation,
    )
    return dataclasses.replace(machine, calibration=section)


def curvature(found: Fit) -> Array:
    """Covariance of the offsets from the slopes at the optimum, priors included."""
    if not found.constants:
        return np.zeros((0, 0))
    return np.asarray(np.linalg.inv(found.information() + np.diag(1.0 / found.deviations**2)))


def scatter(found: Fit) -> tuple[float, float, float]:
    """Of runs around their prediction: deviations of ln(prefill seconds) and ln(decode seconds), and their correlation.

    A deviation is the larger of two: from the residuals' median size, and from the size that 95 % of them stay below,
    each over that of a normal distribution. So it says where 95 of 100 runs are where tails are heavy, and does not
    rest on the largest of a few. It is enlarged for what the fit has bent toward its own runs, and for their number.
    """
    kinds = {name: found.groups == place for place, name in enumerate(GROUPS)}

    def deviation(name: str) -> float:
        sizes = np.abs(found.residuals[kinds[name]])
        if not len(sizes):
            return 0.0
        few = student_t.ppf((1 + LEVEL) / 2, max(len(sizes) - 1, 1)) / DEVIATIONS
        size = max(np.median(sizes) * MAD_DEVIATIONS, np.quantile(sizes, LEVEL) / DEVIATIONS)
        return float(size * few * found.freedom)

    by_run = [dict(zip(found.owner[kinds[name]], found.residuals[kinds[name]], strict=True)) for name in GROUPS[:2]]
    both = sorted(set(by_run[0]) & set(by_run[1]))
    pairs = np.array([[residuals[run] for run in both] for residuals in by_run])
    correlation = 0.0
    if len(both) >= 3 and (pairs.std(axis=1) > 0).all():
        ranks = np.argsort(np.argsort(pairs, axis=1), axis=1)
        matrix: Array = np.asarray(np.corrcoef(ranks))
        correlation = float(np.clip(matrix[0, 1], -1.0, 1.0))
    return deviation("prefill"), deviation("decode"), correlation
