"""The best splits for one batch shape and fixed switches: one linear program, written two ways.

Variables are the amounts of :mod:`costmodel.formulations.base` for ``prompts`` reference prompts, so
``blocks`` = prompts / block size. For one batch shape ``blocks`` is a number and the program gives the
best splits. For a range of shapes ``blocks`` is a variable too: dividing the linear-fractional program
"seconds per block / prompts per block" by its denominator (Charnes and Cooper, 1962) leaves exactly the
same rows, and the optimum bounds every shape of the range.

Memory is in GB and time in ms, so that coefficients stay near 1. :func:`solve` hands HiGHS the
coefficients directly; :func:`readable` builds the same program in PuLP, constraint by named constraint.
Tests hold the two equal, for HiGHS and CBC.
"""

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing

from costmodel.errors import SolverError
from costmodel.formulations.base import Amounts, Case, Formulation, PerTier, Stage
from costmodel.policy import TIERS, Split
from costmodel.units import GB

if TYPE_CHECKING:
    import pulp

Vector = np.typing.NDArray[np.float64]

KINDS = ("weights", "cache", "activations")
SPLIT_VARIABLES = tuple(f"{kind}_{tier}" for kind in KINDS for tier in TIERS)
BLOCKS = len(SPLIT_VARIABLES)
PROMPTS = BLOCKS + 1
MS = 1e3

FixedSplits = tuple[Split, Split, Split] | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One linear program to build: what it costs (``case``), what it may use, what is fixed.

    ``contexts`` are the decode steps as (context length, steps); ``limits`` are usable bytes by tier;
    ``max_block_prompts`` bounds the block beyond what the shape says.
    """

    formulation: Formulation
    case: Case
    contexts: tuple[tuple[float, int], ...]
    limits: dict[str, float]
    max_latency_s: float | None = None
    fixed: FixedSplits = None
    max_block_prompts: float = float("inf")

    @property
    def prompts(self) -> float:
        """Reference prompts: those of the largest batch in the range."""
        return float(self.case.shape.gpu_batch_high)

    @property
    def blocks_range(self) -> tuple[float, float]:
        """Least and most blocks that the reference prompts may be spread over."""
        shape = self.case.shape
        most = min(float(shape.gpu_batch_high) * shape.batches_high, self.max_block_prompts)
        least = float(shape.gpu_batch_low) * shape.batches_low
        return self.prompts / most, self.prompts / min(least, most)

    def timed_stages(self, amounts: Amounts[Any]) -> list[tuple[str, Stage, int]]:
        """Every stage with its name and how many passes it stands for."""
        formulation, case = self.formulation, self.case
        found = [(f"prefill_{stage.name}", stage, 1) for stage in formulation.prefill(case, amounts)]
        for i, (context_len, steps) in enumerate(self.contexts):
            stages = formulation.decode(case, amounts, context_len)
            found += [(f"decode{i}_{stage.name}", stage, steps) for stage in stages]
        return [(name.replace(" ", "_"), stage, passes) for name, stage, passes in found]


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An optimum: seconds for ``prompts`` reference prompts, the amounts, and prices of the limits.

    ``prices_s_per_byte[tier]`` is how many seconds one more usable byte on that tier would save (for
    the reference prompts); ``latency_price`` likewise for one more second of allowed latency.
    """

    seconds: float
    prompts: float
    amounts: Vector
    prices_s_per_byte: dict[str, float]
    latency_price: float

    @property
    def seconds_per_prompt(self) -> float:
        """The objective, free of the reference."""
        return self.seconds / self.prompts

    @property
    def block_prompts(self) -> float:
        """Prompts of a block; not an integer where the program chose it freely."""
        return self.prompts / float(self.amounts[BLOCKS])

    def splits(self) -> tuple[Split, Split, Split]:
        """The fractions of weights, cache and activations, cleaned of solver dust."""
        found = []
        for i in range(3):
            part = np.clip(self.amounts[3 * i : 3 * i + 3], 0.0, None)
            part = part / part.sum()
            part[part < 1e-9] = 0.0
            gpu, cpu, disk = (float(x) for x in part / part.sum())
            found.append(Split(gpu=gpu, cpu=cpu, disk=disk))
        return found[0], found[1], found[2]


# ------------------------------------------------------------------ coefficients


@cache
def _unit_amounts() -> Amounts[Vector]:
    """Amounts that are unit vectors: a formula applied to them returns its own coefficients."""
    units = np.eye(PROMPTS + 1)
    tiers = [PerTier(*units[3 * i : 3 * i + 3]) for i in range(3)]
    return Amounts(tiers[0], tiers[1], tiers[2], prompts=units[PROMPTS], blocks=units[BLOCKS])


@dataclass(frozen=True)
class Program:
    """min cost·x with row_lower <= A x <= row_upper and lower <= x <= upper; in GB and ms."""

    cost: Vector
    offset: float
    lower: Vector
    upper: Vector
    matrix: Vector
    row_lower: Vector
    row_upper: Vector
    row_names: tuple[str, ...]
    prompts: float


def build(question: Question) -> Program:
    """Read the coefficients off the formulas and arrange them as rows."""
    amounts = _unit_amounts()
    prompts = question.prompts
    stages = question.timed_stages(amounts)
    width = PROMPTS + sum(2 if stage.has_first_batch else 1 for _, stage, _ in stages)
    rows: list[Vector] = []
    bounds: list[tuple[float, float]] = []
    names: list[str] = []

    def row(name: str, coefficients: Vector, extra: dict[int, float], low: float, high: float) -> None:
        """Add low <= coefficients·(x, prompts) + extra·x <= high; the prompts term moves to the right."""
        full = np.zeros(width)
        full[:PROMPTS] = coefficients[:PROMPTS]
        for column, value in extra.items():
            full[column] += value
        constant = float(coefficients[PROMPTS]) * prompts
        rows.append(full)
        bounds.append((low - constant, high - constant))
        names.append(name)

    infinity, nothing = float("inf"), np.zeros(PROMPTS + 1)
    for i, kind in enumerate(KINDS):
        whole = {BLOCKS: -1.0} if kind == "weights" else {}
        total = 0.0 if kind == "weights" else prompts
        row(f"{kind}_are_somewhere", nothing, {**{3 * i + j: 1.0 for j in range(3)}, **whole}, total, total)
    for peak in question.formulation.peaks(question.case, amounts):
        limit = question.limits[peak.tier] / GB
        row(f"{peak.tier}_memory_{peak.moment}".replace(" ", "_"), peak.bytes / GB, {BLOCKS: -limit}, -infinity, 0.0)

    cost, offset = np.zeros(width), 0.0
    column = PROMPTS
    for name, stage, passes in stages:
        longest = column
        column += 1
        for j, track in enumerate(stage.tracks):
            row(f"{name}_track{j}", track.spread * -MS, {longest: 1.0}, 0.0, infinity)
        weight = stage.longest_weight * passes
        if stage.has_first_batch:
            first, later = column, stage.later_batches_share
            column += 1
            row(f"{name}_first_batch_is_no_shorter", nothing, {first: 1.0, longest: later - 1.0}, 0.0, infinity)
            for j, seconds in enumerate(stage.first_batch_seconds()):
                row(f"{name}_first_batch_track{j}", seconds * -MS, {first: 1.0}, 0.0, infinity)
            cost[first] += weight
            cost[longest] += weight * later
        else:
            cost[longest] += weight
        plain = stage.plain_seconds()
        if plain is not None:
            cost[:PROMPTS] += plain[:PROMPTS] * (MS * passes)
            offset += float(plain[PROMPTS]) * prompts * MS * passes

    lower, upper = np.zeros(width), np.full(width, infinity)
    lower[BLOCKS], upper[BLOCKS] = question.blocks_range
    if not question.formulation.activations_on_disk:
        upper[3 * 2 + 2] = 0.0
    if question.fixed is not None:
        for i, split in enumerate(question.fixed):
            for j, tier in enumerate(TIERS):
                share = getattr(split, tier)
                if KINDS[i] == "weights":
                    row(f"weights_{tier}_as_given", nothing, {3 * i + j: 1.0, BLOCKS: -share}, 0.0, 0.0)
                else:
                    lower[3 * i + j] = upper[3 * i + j] = share * prompts
    if question.max_latency_s is not None:
        row(
            "latency",
            np.append(cost[:PROMPTS], 0.0),
            {**dict(enumerate(cost[PROMPTS:], PROMPTS)), BLOCKS: -question.max_latency_s * MS},
            -infinity,
            -offset,
        )
    low, high = zip(*bounds, strict=True)
    return Program(cost, offset, lower, upper, np.array(rows), np.array(low), np.array(high), tuple(names), prompts)


# ------------------------------------------------------------------ solving

SCALING_PASSES = 2
"""Alternations between rows and columns; more change nothing that matters."""

ATTEMPTS = (("simplex", "off"), ("simplex", "on"), ("ipm", "off"))
"""Ways to solve, the fastest first; the others take over where one ends without a verdict ("unknown")."""


@cache
def _highs() -> Any:
    """One in-process HiGHS instance, silent, reused for every program."""
    import highspy

    highs: Any = highspy.Highs()  # type: ignore[no-untyped-call]
    highs.setOptionValue("output_flag", False)
    highs.setOptionValue("threads", 1)
    return highs


def _scales(program: Program, cost: Vector) -> tuple[Vector, Vector, float, float]:
    """Factors for the rows, the columns and the cost, and the unit of all variables, that bring numbers near 1.

    The solver's tolerances are absolute and coefficients differ by the size of the model and by machine,
    so each row and column is divided by the geometric mean of its largest and smallest entry, in turn.
    What remains in the right-hand sides is the unit.
    """
    size = np.abs(np.vstack([program.matrix, cost]))
    size[size == 0] = np.nan
    rows, columns = np.ones(len(size)), np.ones(len(cost))
    for _ in range(SCALING_PASSES):
        rows = _inverse_middle(size * columns, axis=1)
        columns = _inverse_middle(size * rows[:, None], axis=0)
    sides = np.abs(np.concatenate([program.row_lower * rows[:-1], program.row_upper * rows[:-1]]))
    sides = sides[np.isfinite(sides) & (sides > 0)]
    unit = 1.0 / float(_inverse_middle(sides, axis=0)) if len(sides) else 1.0
    return rows[:-1], columns, float(rows[-1]), unit


def _inverse_middle(size: Vector, *, axis: int) -> Vector:
    """1 / sqrt(largest × smallest) of each line, as a power of 2 (exact to apply); 1 for an empty line."""
    largest, smallest = np.fmax.reduce(size, axis=axis), np.fmin.reduce(size, axis=axis)
    middle = np.sqrt(largest) * np.sqrt(smallest)
    return np.exp2(-np.round(np.log2(np.where(np.isnan(middle), 1.0, middle))))


def _run(program: Program, cost: Vector, offset: float) -> tuple[Vector, Vector] | None:
    """Solve with HiGHS; the values and row duals, or ``None`` where the program is infeasible."""
    import highspy

    highs = _highs()
    lp = highspy.HighsLp()
    row_scale, column_scale, cost_scale, unit = _scales(program, cost)
    matrix = program.matrix * row_scale[:, None] * column_scale
    rows, columns = matrix.shape
    lp.num_col_, lp.num_row_, lp.offset_ = columns, rows, offset * cost_scale / unit
    lp.col_cost_ = cost * column_scale * cost_scale
    lp.col_lower_, lp.col_upper_ = program.lower / column_scale / unit, program.upper / column_scale / unit
    lp.row_lower_, lp.row_upper_ = program.row_lower * row_scale / unit, program.row_upper * row_scale / unit
    filled = matrix != 0
    lp.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
    lp.a_matrix_.start_ = np.concatenate(([0], np.cumsum(filled.sum(axis=1)))).astype(np.int32)
    lp.a_matrix_.index_ = np.nonzero(filled)[1].astype(np.int32)
    lp.a_matrix_.value_ = matrix[filled]
    status = highspy.HighsModelStatus
    for solver, presolve in ATTEMPTS:
        highs.setOptionValue("solver", solver)
        highs.setOptionValue("presolve", presolve)
        highs.passModel(lp)
        highs.run()
        found = highs.getModelStatus()
        if found == status.kOptimal:
            solution = highs.getSolution()
            values = np.array(solution.col_value) * column_scale * unit
            return values, np.array(solution.row_dual) * row_scale / cost_scale
        if found == status.kInfeasible:
            return None
    raise SolverError(
        f"HiGHS ended with status {highs.modelStatusToString(found)!r} for a placement program; please report it"
    )


def solve(question: Question) -> Solution | None:
    """The best splits (and block, over a range of shapes), or ``None`` where nothing fits."""
    program = build(question)
    answer = _run(program, program.cost, program.offset)
    if answer is None:
        return None
    return _solution(program, *answer)


def _solution(program: Program, values: Vector, duals: Vector) -> Solution:
    seconds = (float(program.cost @ values) + program.offset) / MS
    blocks = float(values[BLOCKS])
    prices = dict.fromkeys(TIERS, 0.0)
    latency_price = 0.0
    for name, dual in zip(program.row_names, duals, strict=True):
        if "_memory_" in name:
            # A dual is ms per GB of the right-hand side, which is limit × blocks.
            prices[name.split("_")[0]] += max(0.0, -float(dual)) * blocks / (MS * GB)
        elif name == "latency":
            latency_price = max(0.0, -float(dual)) * blocks
    return Solution(
        seconds=seconds, prompts=program.prompts, amounts=values, prices_s_per_byte=prices, latency_price=latency_price
    )


TIE_TOLERANCE = 1e-9
"""Relative slack on the best time while the second solve chooses among equals."""


def solve_lexicographic(question: Question) -> Solution | None:
    """The best splits; among equally fast ones, the fewest bytes on disk, then in CPU memory.

    Optima are degenerate: a transfer hidden behind another costs nothing. The second and third solve
    fix what came before and minimise the bytes that the weights, cache and activations keep on the
    slower tiers.
    """
    program = build(question)
    answer = _run(program, program.cost, program.offset)
    if answer is None:
        return None
    best = _solution(program, *answer)
    for tier in ("disk", "cpu"):
        goal = _resident_bytes(question, tier, program.matrix.shape[1])
        ceiling = best.seconds * MS * (1 + TIE_TOLERANCE) - program.offset
        program = _with_row(program, program.cost, ceiling, "as_fast_as_the_best")
        answer = _run(program, goal, 0.0)
        if answer is None:  # the slack was below the solver's tolerance: keep what is proven
            return best
        program = _with_row(program, goal, float(goal @ answer[0]) * (1 + TIE_TOLERANCE) + 1e-9, f"least_on_{tier}")
        values = answer[0]
        best = Solution(
            seconds=(float(program.cost @ values) + program.offset) / MS,
            prompts=best.prompts,
            amounts=values,
            prices_s_per_byte=best.prices_s_per_byte,
            latency_price=best.latency_price,
        )
    return best


def _with_row(program: Program, coefficients: Vector, high: float, name: str) -> Program:
    return Program(
        program.cost,
        program.offset,
        program.lower,
        program.upper,
        np.vstack([program.matrix, coefficients]),
        np.append(program.row_lower, -np.inf),
        np.append(program.row_upper, high),
        (*program.row_names, name),
        program.prompts,
    )


def _resident_bytes(question: Question, tier: str, width: int) -> Vector:
    """Coefficients (GB) of everything that lives on one tier."""
    peaks = question.formulation.peaks(question.case, _unit_amounts())
    fullest = np.zeros(width)
    for peak in peaks:
        if peak.tier == tier:
            fullest[:BLOCKS] = np.maximum(fullest[:BLOCKS], peak.bytes[:BLOCKS] / GB)
    return fullest


def least_extra_bytes(question: Question, tier: str) -> float | None:
    """Least usable bytes that one tier lacks for anything to fit a single shape; ``None`` if no size helps."""
    program = build(question)
    blocks = question.blocks_range[1]
    on_tier = np.array([name.startswith(f"{tier}_memory_") for name in program.row_names])
    grown = Program(
        np.append(np.zeros_like(program.cost), 1.0),
        0.0,
        np.append(program.lower, 0.0),
        np.append(program.upper, np.inf),
        np.column_stack([program.matrix, np.where(on_tier, -1.0, 0.0)]),
        program.row_lower,
        program.row_upper,
        program.row_names,
        program.prompts,
    )
    answer = _run(grown, grown.cost, 0.0)
    return None if answer is None else float(answer[0][-1]) / blocks * GB


# ------------------------------------------------------------------ the readable model


def readable(question: Question) -> "pulp.LpProblem":
    """The same program as a PuLP problem whose constraints carry their names.

    Solve it with any PuLP solver, or print it: it reads like docs/cost-model.md. Its objective is in ms
    for the reference prompts.
    """
    import pulp

    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    prompts = question.prompts
    least, most = question.blocks_range
    blocks = problem.add_variable("blocks", lowBound=least, upBound=most)
    split = {name: problem.add_variable(name, lowBound=0) for name in SPLIT_VARIABLES}

    def tiers(kind: str) -> PerTier[Any]:
        return PerTier(*(split[f"{kind}_{tier}"] for tier in TIERS))

    amounts: Amounts[Any] = Amounts(
        tiers("weights"), tiers("cache"), tiers("activations"), prompts=prompts, blocks=blocks
    )

    def constrain(condition: Any, name: str) -> None:
        """Name a constraint; one between plain numbers holds or fails by itself and is dropped."""
        if isinstance(condition, pulp.LpConstraint):
            problem.addConstraint(condition, name)

    for kind in KINDS:
        whole = blocks if kind == "weights" else prompts
        constrain(pulp.lpSum(split[f"{kind}_{tier}"] for tier in TIERS) == whole, f"{kind}_are_somewhere")
    for peak in question.formulation.peaks(question.case, amounts):
        limit = question.limits[peak.tier] / GB
        constrain(peak.bytes * (1 / GB) <= blocks * limit, f"{peak.tier}_memory_{peak.moment}".replace(" ", "_"))
    milliseconds: Any = 0
    for name, stage, passes in question.timed_stages(amounts):
        longest = problem.add_variable(f"{name}_longest", lowBound=0)
        for j, track in enumerate(stage.tracks):
            constrain(longest >= track.spread * MS, f"{name}_track{j}")
        stage_ms: Any = longest
        if stage.has_first_batch:
            first = problem.add_variable(f"{name}_first_batch", lowBound=0)
            later = stage.later_batches_share
            constrain(first >= longest * (1 - later), f"{name}_first_batch_is_no_shorter")
            for j, seconds in enumerate(stage.first_batch_seconds()):
                constrain(first >= seconds * MS, f"{name}_first_batch_track{j}")
            stage_ms = first + longest * later
        plain = stage.plain_seconds()
        if plain is not None:
            stage_ms = stage_ms * stage.longest_weight + plain * MS
        milliseconds = milliseconds + stage_ms * passes
    problem.setObjective(milliseconds)
    if not question.formulation.activations_on_disk:
        constrain(split["activations_disk"] == 0, "no_activations_on_disk")
    if question.fixed is not None:
        for kind, given in zip(KINDS, question.fixed, strict=True):
            whole = blocks if kind == "weights" else prompts
            for tier in TIERS:
                constrain(split[f"{kind}_{tier}"] == whole * getattr(given, tier), f"{kind}_{tier}_as_given")
    if question.max_latency_s is not None:
        constrain(milliseconds <= blocks * (question.max_latency_s * MS), "latency")
    return problem
