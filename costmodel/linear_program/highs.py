"""HiGHS, asked so that its tolerances do not decide: scaled to the problem's own sizes, and checked afterwards.

A solver stops at absolute tolerances. What the search proves does not rest on them: the bound of an answer is
computed from its duals, which is valid for any duals (Neumaier and Shcherbina, 2004), an infeasible program is
believed for its Farkas certificate, and an answer that misses a row or its own bound is solved again at the sizes
that it shows.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from costmodel.errors import SolverError
from costmodel.linear_program.coefficients import Program
from costmodel.linear_program.question import Vector

ATTEMPTS = (("simplex", "off"), ("simplex", "on"), ("ipm", "off"))
"""Ways to solve, the fastest first; the others take over where one ends without a verdict ("unknown")."""

TOLERANCE = 1e-9
"""The solver's, on rows, variables and reduced costs that are near 1."""

SHARP = 1e-8
"""Relative: an answer that misses a row or its bound by more is solved again."""

ROUNDS = 3
"""Solves of one program at most."""

SMALLEST = 1e-6
"""A row is scaled to what the last answer shows in it, but not to less than this part of its largest entry."""


@dataclass(frozen=True)
class Answer:
    """The values of the optimum, the duals of the rows, and what no feasible point costs less than."""

    values: Vector
    duals: Vector
    bound: float


def run(program: Program, cost: Vector, offset: float) -> Answer | None:
    """Minimise ``cost``; ``None`` where the program is infeasible."""
    largest = _largest(program)
    shown, bound = largest, -np.inf
    for _ in range(ROUNDS):
        found = _solved(program, cost, offset, largest, shown)
        if found is None:
            return None
        values, duals = found
        bound = max(bound, lower_bound(program, cost, offset, duals))
        shown = np.minimum(np.abs(values), largest)
        if _is_sharp(program, cost, offset, values, bound):
            break
    return Answer(values, duals, bound)


def lower_bound(program: Program, cost: Vector, offset: float, duals: Vector) -> float:
    """What no feasible point costs less than, by weak duality: true for any duals, sharp for the optimal ones.

    cost·x = duals·(A x) + (cost - Aᵀ duals)·x, each part at its least over the rows' and the variables' ranges.
    What the sums may lose by rounding is taken off.
    """
    sides = np.where(duals > 0, program.row_lower, program.row_upper)
    duals = np.where(np.isfinite(sides), duals, 0.0)
    sides = np.where(duals == 0, 0.0, sides)
    reduced = cost - program.matrix.T @ duals
    ends = np.where(reduced > 0, program.lower, program.upper)
    ends = np.where(reduced == 0, 0.0, ends)
    if not np.isfinite(ends).all():
        return -np.inf
    size = np.abs(duals) @ np.abs(sides) + (np.abs(cost) + np.abs(program.matrix).T @ np.abs(duals)) @ np.abs(ends)
    rounding = np.finfo(float).eps * len(cost) * (size + abs(offset))
    return float(duals @ sides + reduced @ ends + offset - rounding)


def _largest(program: Program) -> Vector:
    """The largest size of each variable; 1 where it has no end."""
    size = np.maximum(np.abs(program.lower), np.abs(program.upper))
    return np.where(np.isfinite(size), size, 1.0)


def _is_sharp(program: Program, cost: Vector, offset: float, values: Vector, bound: float) -> bool:
    """True where the values satisfy every row and cost what the bound says, both to :data:`SHARP`."""
    terms = program.matrix * values
    reached = terms.sum(axis=1)
    excess = np.maximum(reached - program.row_upper, program.row_lower - reached)
    objective = float(cost @ values) + offset
    paid = float(np.abs(cost) @ np.abs(values)) + abs(offset)
    return bool(np.all(excess <= SHARP * np.abs(terms).max(axis=1))) and objective - bound <= SHARP * paid


def _power_of_two(size: Vector) -> Vector:
    """The powers of 2 next to the sizes (exact to multiply by); 1 for nothing."""
    return np.exp2(np.round(np.log2(np.where(size > 0, size, 1.0))))


def _scales(program: Program, cost: Vector, largest: Vector, shown: Vector) -> tuple[Vector, Vector, float]:
    """Units of the rows, the variables and the cost that bring numbers near 1.

    A variable is counted in the largest that it can be, a row in the largest part that the last answer shows in
    it: what is left of a limit is then told apart as finely as the limit itself, however large the other terms
    could become.
    """
    entries = np.abs(program.matrix)
    full, seen = (entries * largest).max(axis=1), (entries * shown).max(axis=1)
    rows = _power_of_two(np.maximum(seen, full * SMALLEST))
    # A variable that is nothing has no size; its entries shall not exceed the others.
    bare = (entries / rows[:, None]).max(axis=0)
    columns = _power_of_two(np.where(largest > 0, largest, 1.0 / np.where(bare > 0, bare, 1.0)))
    paid = np.abs(cost)
    unit = np.maximum((paid * shown).max(), (paid * largest).max() * SMALLEST)
    return rows, columns, float(_power_of_two(np.array(unit)))


@cache
def _highs() -> Any:
    """One in-process HiGHS instance, silent, reused for every program."""
    import highspy

    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    for name in ("primal_feasibility_tolerance", "dual_feasibility_tolerance"):
        highs.setOptionValue(name, TOLERANCE)
    highs.setOptionValue("small_matrix_value", 1e-12)
    return highs


def _solved(
    program: Program, cost: Vector, offset: float, largest: Vector, shown: Vector
) -> tuple[Vector, Vector] | None:
    """The values and row duals that HiGHS ends with, or ``None`` where the program is infeasible."""
    import highspy

    highs = _highs()
    lp = highspy.HighsLp()
    rows, columns, unit = _scales(program, cost, largest, shown)
    matrix = program.matrix * columns / rows[:, None]
    lp.num_row_, lp.num_col_ = matrix.shape
    lp.offset_ = offset / unit
    lp.col_cost_ = cost * columns / unit
    lp.col_lower_, lp.col_upper_ = program.lower / columns, program.upper / columns
    lp.row_lower_, lp.row_upper_ = program.row_lower / rows, program.row_upper / rows
    filled = matrix != 0
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum(filled.sum(axis=1)))).astype(np.int32)
    lp.a_matrix_.index_ = np.nonzero(filled)[1].astype(np.int32)
    lp.a_matrix_.value_ = matrix[filled]
    status, found, infeasible = highspy.HighsModelStatus, None, False
    for solver, presolve in ATTEMPTS:
        highs.setOptionValue("solver", solver)
        highs.setOptionValue("presolve", presolve)
        highs.passModel(lp)
        highs.run()
        found = highs.getModelStatus()
        if found == status.kOptimal:
            solution = highs.getSolution()
            return np.array(solution.col_value) * columns, np.array(solution.row_dual) / rows * unit
        if found == status.kInfeasible:
            infeasible = True
            if presolve == "off" and _is_certified(highs, program, rows):
                return None
    if infeasible:  # by the tolerance alone: no solver found a point
        return None
    raise SolverError(
        f"HiGHS ended with status {highs.modelStatusToString(found)!r} for a placement program; please report it"
    )


def _is_certified(highs: Any, program: Program, rows: Vector) -> bool:
    """True where the ray of the duals proves that no point satisfies the rows (Farkas)."""
    _, exists, ray = highs.getDualRay()
    if not exists:
        return False
    duals, nothing = np.array(ray) / rows, np.zeros(program.matrix.shape[1])
    return any(lower_bound(program, nothing, 0.0, sign * duals) > 0 for sign in (1.0, -1.0))
