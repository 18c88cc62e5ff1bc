"""The coefficients of a program, read off the formulas and arranged as rows."""

from dataclasses import dataclass
from functools import cache

import numpy as np

from costmodel.formulations.base import KINDS, Amounts, Peak, PerTier
from costmodel.linear_program.question import BLOCKS, MS, PROMPTS, Question, Vector
from costmodel.policy import TIERS
from costmodel.units import GB


@cache
def unit_amounts() -> Amounts[Vector]:
    """Amounts that are unit vectors: a formula applied to them returns its own coefficients."""
    units = np.eye(PROMPTS + 1)
    tiers = [PerTier(*units[3 * i : 3 * i + 3]) for i in range(3)]
    return Amounts(tiers[0], tiers[1], tiers[2], prompts=units[PROMPTS], blocks=units[BLOCKS])


SPLIT_TIERS = tuple(tier for _ in KINDS for tier in TIERS)

NEXT_TO_NOTHING = 1e-3
"""The part of the least bytes on a tier that something without bytes counts for."""

LOOSE = 2.0
"""How much further than what is implied the end of a variable lies."""


@dataclass(frozen=True)
class Program:
    """min cost·x with row_lower <= A x <= row_upper and lower <= x <= upper; in GB and ms.

    Every variable has an end: bounds and scales rest on them. One that rows or the optimum imply is :data:`LOOSE`,
    so that it never binds and takes no share of a row's price.
    """

    cost: Vector
    offset: float
    lower: Vector
    upper: Vector
    matrix: Vector
    row_lower: Vector
    row_upper: Vector
    row_names: tuple[str, ...]
    prompts: float


def build(question: Question, *, growing: str | None = None) -> Program:
    """Read the coefficients off the formulas and arrange them as rows.

    ``growing`` is a tier whose limit is about to be raised, so that it implies no end of a variable.
    """
    amounts = unit_amounts()
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
    peaks = question.formulation.peaks(question.case, amounts)
    for peak in peaks:
        limit = question.limits[peak.tier] / GB
        row(f"{peak.tier}_memory_{peak.moment}".replace(" ", "_"), peak.bytes / GB, {BLOCKS: -limit}, -infinity, 0.0)

    lower, upper = np.zeros(width), np.zeros(width)
    lower[:PROMPTS], upper[:PROMPTS] = _ends(question, [peak for peak in peaks if peak.tier != growing])

    def longest_of(tracks: list[Vector]) -> float:
        """Milliseconds of the longest track where every amount is as large as it can be."""
        most = np.append(upper[:PROMPTS], prompts)
        return max(float(np.maximum(track, 0.0) @ most) for track in tracks) * MS * LOOSE

    cost, offset = np.zeros(width), 0.0
    column = PROMPTS
    for name, stage, passes in stages:
        longest = column
        column += 1
        upper[longest] = longest_of([track.lasting for track in stage.tracks])
        for j, track in enumerate(stage.tracks):
            row(f"{name}_track{j}", track.lasting * -MS, {longest: 1.0}, 0.0, infinity)
        weight = stage.longest_weight * passes
        if stage.has_first_batch:
            first, later = column, stage.later_batches_share
            column += 1
            beside = longest_of(stage.first_batch_seconds())
            upper[first] = max(beside, upper[longest] * (1.0 - later))
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

    for i, split in enumerate(question.fixed or ()):
        if KINDS[i] == "weights":
            for j, tier in enumerate(TIERS):
                share = getattr(split, tier)
                row(f"weights_{tier}_as_given", nothing, {3 * i + j: 1.0, BLOCKS: -share}, 0.0, 0.0)
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


def _ends(question: Question, peaks: list[Peak]) -> tuple[Vector, Vector]:
    """The least and the most of every amount and of blocks, as the request and the memory of tiers imply."""
    lower, upper = np.zeros(PROMPTS), np.full(PROMPTS, question.prompts * LOOSE)
    least, most = lower[BLOCKS], upper[BLOCKS] = question.blocks_range
    upper[:3] = most * LOOSE
    for peak in peaks:
        size = peak.bytes / GB
        free = question.limits[peak.tier] / GB - size[BLOCKS]
        room = free * most - float(size[PROMPTS]) * question.prompts
        if room > 0:
            taking = np.flatnonzero(size[:BLOCKS] > 0)
            upper[taking] = np.minimum(upper[taking], room / size[taking] * LOOSE)
    for kind, tier in question.empty:
        upper[3 * KINDS.index(kind) + TIERS.index(tier)] = 0.0
    for i, split in enumerate(question.fixed or ()):
        shares = np.array([getattr(split, tier) for tier in TIERS])
        whole = (least, most) if KINDS[i] == "weights" else (question.prompts, question.prompts)
        lower[3 * i : 3 * i + 3], upper[3 * i : 3 * i + 3] = shares * whole[0], shares * whole[1]
    return lower, upper


def with_row(program: Program, coefficients: Vector, high: float, name: str) -> Program:
    """The program with one more row: coefficients·x <= high."""
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


def resident_bytes(question: Question, tier: str, width: int) -> Vector:
    """Coefficients (GB) of everything that lives on one tier; nothing lies there for free."""
    peaks = question.formulation.peaks(question.case, unit_amounts())
    fullest = np.zeros(width)
    for peak in peaks:
        if peak.tier == tier:
            fullest[:BLOCKS] = np.maximum(fullest[:BLOCKS], peak.bytes[:BLOCKS] / GB)
    there = np.flatnonzero(np.array(SPLIT_TIERS) == tier)
    sizes = fullest[there]
    fullest[there] = np.where(sizes > 0, sizes, sizes[sizes > 0].min(initial=1.0) * NEXT_TO_NOTHING)
    return fullest
