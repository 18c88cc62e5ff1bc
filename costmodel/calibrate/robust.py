"""The robust fit of a machine's constants to its runs, and what the runs alone say of each constant.

Minimised over the offsets x of the constants, within their bounds:

    Σ ρ((ln predicted(x) − ln measured) · weight / scatter) + Σ (x / deviation)²

ρ(r) = 2 c² (√(1 + r²/c²) − 1) is quadratic for small residuals and linear for large ones, so that a run that something
disturbed pulls with a bounded force (Huber's idea, with a smooth corner). The scatter of each group of observations is
1.4826 times the median size of its residuals, and found in turn with the offsets. The second sum is the prior.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from costmodel.calibrate.constants import MachineConstant, with_offsets
from costmodel.calibrate.observations import BUSY_WEIGHT, GROUPS, Array, Observed
from costmodel.hardware import Hardware
from costmodel.offset import moved

CORNER = 1.5
"""c: residuals beyond this many scatters count by their size, not its square."""

LEAST_SCATTER, FIRST_SCATTER, MOST_SCATTER = 0.02, 0.1, 0.5
"""Of ln(seconds): clocks repeat no better than the least; the search for the scatter begins at the first."""

MAD_DEVIATIONS = 1.4826
"""A normal distribution's standard deviation in medians of absolute deviations."""

_ROUNDS, _STEP = 4, 1e-3

Function = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The optimum: offsets, what the machine is then, residuals ln(predicted / measured) and their slopes.

    ``slopes`` is d ln(predicted) / d offset, (observations, constants); ``owner`` the place of each observation's run;
    ``scatter`` the standard deviation of each observation, weight included.
    """

    constants: tuple[MachineConstant, ...]
    offsets: Array
    machine: Hardware
    residuals: Array
    slopes: Array
    scatter: Array
    groups: Array
    owner: Array
    deviations: Array
    lower: Array
    upper: Array

    @property
    def freedom(self) -> float:
        """Factor from residuals to errors: the fit has bent toward its own runs, by as many ways as data decide."""
        information = self.information()
        prior = np.diag(1.0 / self.deviations**2)
        decided = float(np.trace(np.linalg.solve(information + prior, information))) if len(self.offsets) else 0.0
        count = len(self.residuals)
        return float(np.sqrt(count / max(count - decided, count / 4)))

    def information(self) -> Array:
        """What the runs alone say of the offsets: slopesᵀ · weights · slopes, without the prior."""
        weights = pull((self.residuals / self.scatter) ** 2) / self.scatter**2
        return np.asarray((self.slopes * weights[:, None]).T @ self.slopes)

    def at_bound(self) -> list[bool]:
        """Which constants ended where they may go no further."""
        width = self.upper - self.lower
        near = np.minimum(self.offsets - self.lower, self.upper - self.offsets) < 1e-3 * np.minimum(width, 1.0)
        return [bool(one) for one in near]


def pull(squares: Array) -> Array:
    """The derivative of ρ: the weight of a squared residual beside that of a small one."""
    return np.asarray(1.0 / np.sqrt(1.0 + squares / CORNER**2))


def loss(squares: Array, count: int, weights: Array | float = 1.0) -> Array:
    """ρ and its two derivatives for ``count`` squared residuals of runs, which the priors' follow, squared only."""
    data, found = squares[:count], np.empty((3, len(squares)))
    slope = pull(data)
    found[0, :count] = weights * (2 * CORNER**2 * (1 / slope - 1))
    found[1, :count] = weights * slope
    found[2, :count] = weights * (-0.5 / CORNER**2 * slope**3)
    found[:, count:] = squares[count:], np.ones(len(squares) - count), np.zeros(len(squares) - count)
    return found


def fit(
    runs: Sequence[Observed],
    hardware: Hardware,
    constants: Sequence[MachineConstant],
    *,
    start: Fit | None = None,
) -> Fit:
    """Fit the constants to the runs, starting from the file's numbers or from another fit; deterministic."""
    logs = np.concatenate([run.logs for run in runs])
    groups = np.concatenate([run.groups for run in runs])
    owner = np.concatenate([[place] * len(run.logs) for place, run in enumerate(runs)])
    deviations = np.array([one.deviation(hardware) for one in constants])
    limits = [one.bounds(hardware) for one in constants]
    lower, upper = np.array([low for low, _ in limits]), np.array([high for _, high in limits])

    def residuals(offsets: Array) -> Array:
        machine = with_offsets(hardware, constants, offsets)
        return np.asarray(np.log(np.concatenate([run.seconds(machine) for run in runs])) - logs)

    def slopes(offsets: Array) -> Array:
        machine = with_offsets(hardware, constants, offsets)
        here = [run.seconds(machine) for run in runs]
        found = np.zeros((len(logs), len(offsets)))
        for place in range(len(offsets)):
            step = _STEP if offsets[place] + _STEP <= upper[place] else -_STEP
            other = moved(machine, constants[place].path, step)
            for number, run in enumerate(runs):
                if used[number][place]:
                    found[owner == number, place] = np.log(run.seconds(other) / here[number]) / step
        return found

    used = _used(runs, hardware, constants)
    offsets, scatter = np.zeros(len(constants)), _each(np.full(len(GROUPS), FIRST_SCATTER), groups)
    if start is not None:
        begun = dict(zip((one.path for one in start.constants), start.offsets, strict=True))
        offsets = np.array([begun.get(one.path, 0.0) for one in constants])
        scatter = _each(_scatters(residuals(offsets), groups, len(constants)), groups)
    misfit, prior = residuals(offsets), np.diag(1.0 / deviations)
    for _ in range(_ROUNDS if constants else 1):
        offsets = solve(
            lambda x, scatter=scatter: np.concatenate([residuals(x) / scatter, x / deviations]),  # type: ignore[misc]
            lambda x, scatter=scatter: np.vstack([slopes(x) / scatter[:, None], prior]),  # type: ignore[misc]
            offsets,
            bounds=(lower, upper),
            scale=deviations,
            rho=lambda squares: loss(squares, len(logs)),
        )
        misfit = residuals(offsets)
        found = _each(_scatters(misfit, groups, len(constants)), groups)
        settled = np.allclose(found, scatter, rtol=0.05)
        scatter = found
        if settled:
            break
    return Fit(
        constants=tuple(constants),
        offsets=offsets,
        machine=with_offsets(hardware, constants, offsets),
        residuals=misfit,
        slopes=slopes(offsets),
        scatter=scatter,
        groups=groups,
        owner=owner,
        deviations=deviations,
        lower=lower,
        upper=upper,
    )


def _used(runs: Sequence[Observed], hardware: Hardware, constants: Sequence[MachineConstant]) -> list[list[bool]]:
    """Which constants each run depends on at all: its seconds differ where the constant is at one of its bounds."""
    here = [run.seconds(hardware) for run in runs]
    ends = [[with_offsets(hardware, [one], [end]) for end in one.bounds(hardware)] for one in constants]
    return [
        [any(not np.array_equal(run.seconds(machine), before) for machine in pair) for pair in ends]
        for run, before in zip(runs, here, strict=True)
    ]


def solve(
    residuals: Function, slopes: Function, start: Array, *, bounds: tuple[Array, Array], scale: Array, rho: Any
) -> Array:
    """Offsets at the least sum of ``rho`` of squared residuals, from ``start`` and within the bounds."""
    lower, upper = bounds
    solver: Any = least_squares  # whose types know no loss that is a function
    solution = solver(
        residuals,
        start,
        jac=slopes,
        bounds=(lower - 1e-9, upper + 1e-9),
        loss=rho,
        x_scale=scale,
        xtol=1e-3,
        ftol=1e-4,
        gtol=1e-4,
        max_nfev=20,
    )
    return np.asarray(np.clip(solution.x, lower, upper))


def _scatters(residuals: Array, groups: Array, constants: int) -> Array:
    """The scatter of each group of observations; a group of a few takes that of all."""
    bent = np.sqrt(len(residuals) / max(len(residuals) - constants, len(residuals) / 4))
    found = []
    for group in range(len(GROUPS)):
        sizes = np.abs(residuals[groups == group])
        some = sizes if len(sizes) >= 5 else np.abs(residuals)
        found.append(np.clip(MAD_DEVIATIONS * bent * np.median(some), LEAST_SCATTER, MOST_SCATTER))
    return np.array(found)


def _each(scatters: Array, groups: Array) -> Array:
    """The scatter of every observation, larger where it weighs less."""
    weights = np.array([BUSY_WEIGHT if name == "busy" else 1.0 for name in GROUPS])
    return np.asarray((scatters / weights)[groups])
