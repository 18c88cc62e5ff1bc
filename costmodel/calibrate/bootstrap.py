"""Confidence of the fitted constants: the fit again, to runs drawn anew.

A draw takes as many runs as there are, with replacement, and moves the centre of every prior within its own deviation,
so that what a constant owes to its prior is uncertain as well. Within a draw the predictions are linear in the offsets,
with the slopes at the optimum: draws differ by little, and no formula is evaluated again.
"""

import time
from collections.abc import Callable

import numpy as np

from costmodel.calibrate.observations import Array
from costmodel.calibrate.robust import Fit, loss, solve

DRAWS, MOST_SECONDS = 200, 60.0


def draws(found: Fit, *, seed: int, count: int = DRAWS, progress: Callable[[], None] = lambda: None) -> Array:
    """Offsets of every draw, (draws, constants): ``count``, or as many as a minute allows, at least 20."""
    generator, began = np.random.default_rng(seed), time.perf_counter()
    runs, size = int(found.owner.max()) + 1, len(found.residuals)
    slopes = np.vstack([found.slopes / found.scatter[:, None], np.diag(1.0 / found.deviations)])
    made = []
    for _ in range(count if found.constants else 0):
        times = np.bincount(generator.integers(runs, size=runs), minlength=runs)[found.owner].astype(float)
        centre = generator.normal(0.0, found.deviations)
        start = np.concatenate([found.residuals / found.scatter, (found.offsets - centre) / found.deviations])
        made.append(
            solve(
                lambda x, start=start: start + slopes @ (x - found.offsets),  # type: ignore[misc]
                lambda x: slopes,
                found.offsets,
                bounds=(found.lower, found.upper),
                scale=found.deviations,
                rho=lambda squares, times=times: loss(squares, size, times),
            )
        )
        progress()
        if len(made) >= 20 and time.perf_counter() - began > MOST_SECONDS:
            break
    return np.array(made).reshape(len(made), len(found.constants))
