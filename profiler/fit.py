"""Curves to constants: latency + bytes / bandwidth, and what stands in the way of overlap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import optimize

Vector = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Line:
    """seconds = latency_s + bytes / bytes_per_s; ``error`` is the largest relative miss of a point."""

    latency_s: float
    bytes_per_s: float
    error: float


def fit_line(nbytes: Sequence[float], seconds: Sequence[float]) -> Line:
    """The line that misses the points least, in relative terms, outliers discounted.

    Both constants are kept from being negative. One size, or sizes all equal, give a line without latency.
    """
    if len(nbytes) != len(seconds) or not nbytes:
        raise ValueError(f"{len(nbytes)} sizes and {len(seconds)} times: as many of both are needed, and one at least")
    if min(nbytes) <= 0 or min(seconds) <= 0:
        raise ValueError("sizes and times must be greater than 0")
    sizes, times = np.asarray(nbytes, dtype=float), np.asarray(seconds, dtype=float)
    if np.ptp(sizes) == 0:
        slope, latency = float(np.median(times / sizes)), 0.0
    else:
        # Weighted by 1/seconds, the residuals are relative: small transfers fix the latency, large ones the rate.
        start, _ = optimize.nnls(np.column_stack([1.0 / times, sizes / times]), np.ones_like(times))
        floor = [float(times.min()) * 1e-6, float((times / sizes).min()) * 1e-3]

        def misses_of(logs: Vector) -> Vector:
            missed: Vector = np.log((np.exp(logs[0]) + np.exp(logs[1]) * sizes) / times)
            return missed

        found = optimize.least_squares(
            misses_of,
            [math.log(max(value, least)) for value, least in zip(start, floor, strict=True)],
            loss="soft_l1",
            f_scale=0.05,
        )
        latency, slope = math.exp(found.x[0]), math.exp(found.x[1])
        if latency <= floor[0] * 10:
            latency = 0.0
    misses = np.abs((latency + slope * sizes) / times - 1.0)
    return Line(latency_s=latency, bytes_per_s=1.0 / slope, error=float(misses.max()))


def unhidden_share(both_s: float, one_s: float, other_s: float) -> float:
    """The share of the shorter of two works that shows when they run side by side: both = longer + share × shorter.

    That is the form in which ``costmodel`` uses the share. In [0, 1]: beyond 1, taking turns would be faster.
    """
    if min(both_s, one_s, other_s) <= 0:
        raise ValueError("times must be greater than 0")
    longer_s, shorter_s = max(one_s, other_s), min(one_s, other_s)
    return min(1.0, max(0.0, (both_s - longer_s) / shorter_s))
