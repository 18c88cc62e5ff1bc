"""Questions put to the solver, and its answers in seconds, bytes and prices."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from costmodel.estimate import fullest, overfull
from costmodel.formulations.base import PARTS, Part, amounts_at, parts_of
from costmodel.linear_program.coefficients import Program, build, resident_bytes, with_row
from costmodel.linear_program.highs import Answer, run
from costmodel.linear_program.question import BLOCKS, MS, Question, Solution
from costmodel.policy import TIERS
from costmodel.units import GB

TIE_TOLERANCE = 1e-9
"""Relative slack on the best time while the second solve chooses among equals."""

CALL_TOLERANCE = 1e-9
"""The share of the prompts below which a tier is not in use: the solver's dust."""

REPAIRS = 3
"""Times that splits which do not fit, by the estimate, are looked for again with a little less memory."""


def solve(question: Question) -> Solution | None:
    """The best splits (and block, over a range of shapes), or ``None`` where nothing fits."""
    program = build(question)
    answer = run(program, program.cost, program.offset)
    if answer is None:
        return None
    solution = _solution(program, answer)
    return _fitting(question, solution) if question.case.shape.is_single else solution


def _solution(program: Program, answer: Answer) -> Solution:
    blocks = float(answer.values[BLOCKS])
    prices = dict.fromkeys(TIERS, 0.0)
    latency_price = 0.0
    for name, dual in zip(program.row_names, answer.duals, strict=True):
        if "_memory_" in name:
            # A dual is ms per GB of the right-hand side, which is limit × blocks.
            prices[name.split("_")[0]] += max(0.0, -float(dual)) * blocks / (MS * GB)
        elif name == "latency":
            latency_price = max(0.0, -float(dual)) * blocks
    return Solution(
        seconds=max(0.0, answer.bound / MS),
        prompts=program.prompts,
        amounts=answer.values,
        prices_s_per_byte=prices,
        latency_price=latency_price,
    )


def _fitting(question: Question, solution: Solution) -> Solution:
    """The solution of a single shape with splits that fit by the estimate, which has the last word.

    The solver's splits may exceed a limit by its tolerance: then they are those for a limit lower by twice that.
    The seconds stay those that are proven for the limits themselves. Where parts in use take more than the program
    counts for them, splits may not fit for all that.
    """
    for _ in range(REPAIRS):
        excess = _excess(question, solution, question.case.used)
        if not excess:
            break
        lowered = {tier: max(0.0, limit - 2 * excess.get(tier, 0.0)) for tier, limit in question.limits.items()}
        question_below = replace(question, limits=lowered)
        program = build(question_below)
        answer = run(program, program.cost, program.offset)
        if answer is None:
            break
        solution = replace(solution, amounts=answer.values)
    return replace(solution, fits=not _excess(question, solution, parts_of(question.fixed or solution.splits())))


def _excess(question: Question, solution: Solution, used: frozenset[Part]) -> dict[str, float]:
    """Bytes that the splits of a single shape take beyond the limits, these parts counted in full."""
    case = replace(question.case, used=used)
    amounts = amounts_at(question.fixed or solution.splits(), solution.block_prompts)
    return overfull(question.formulation.peaks(case, amounts), question.limits)


def solve_lexicographic(question: Question) -> Solution | None:
    """The best splits; among equally fast ones, the fewest bytes on disk, then in CPU memory.

    Optima are degenerate: a transfer hidden behind another costs nothing. The second and third solve
    fix what came before and minimise the bytes that the weights, cache and activations keep on the
    slower tiers.
    """
    program = build(question)
    answer = run(program, program.cost, program.offset)
    if answer is None:
        return None
    best = _solution(program, answer)
    for tier in ("disk", "cpu"):
        goal = resident_bytes(question, tier, program.matrix.shape[1])
        fastest = float(program.cost @ best.amounts)
        program = with_row(program, program.cost, fastest + abs(fastest) * TIE_TOLERANCE, "as_fast_as_the_best")
        answer = run(program, goal, 0.0)
        if answer is None:  # the slack was below the solver's tolerance: keep what is proven
            return best
        least = float(goal @ answer.values)
        program = with_row(program, goal, least * (1 + TIE_TOLERANCE) + 1e-9, f"least_on_{tier}")
        seconds = (float(program.cost @ answer.values) + program.offset) / MS
        best = replace(best, seconds=seconds, amounts=answer.values)
    return best


def parts_in_part(question: Question, solution: Solution) -> list[Part]:
    """The parts that are not settled and of which an optimum has some but not all: they are not counted in full."""
    least, most = solution.prompts * CALL_TOLERANCE, solution.prompts * (1 - CALL_TOLERANCE)
    held = dict(zip(PARTS, solution.amounts[BLOCKS - len(PARTS) : BLOCKS], strict=True))
    return [part for part, amount in held.items() if part not in question.case.used and least < amount < most]


def uncounted_s(question: Question, solution: Solution, parts: Iterable[Part]) -> float:
    """Seconds (for the reference prompts) that these parts add to an optimum where they count in full.

    Those of their calls and, over a range of shapes, those of what is kept for each of them, at the memory's prices:
    whether a single shape has room for it is known.
    """
    amounts = question.amounts_of(solution.amounts)
    full = replace(question, case=replace(question.case, used=question.case.used | frozenset(parts)))
    seconds = full.seconds(amounts) - question.seconds(amounts)
    if not question.case.shape.is_single:
        least, most = (fullest(one.formulation.peaks(one.case, amounts)) for one in (question, full))
        for tier, price in solution.prices_s_per_byte.items():
            seconds += price * (most[tier] - least[tier]) / amounts.blocks
    return seconds


def least_extra_bytes(question: Question, tier: str) -> float | None:
    """Least usable bytes that one tier lacks for anything to fit a single shape; ``None`` if no size helps."""
    program = build(question, growing=tier)
    blocks = question.blocks_range[1]
    on_tier = np.array([name.startswith(f"{tier}_memory_") for name in program.row_names])
    all_on_tier = np.maximum(program.matrix[on_tier], 0.0) @ program.upper - program.row_upper[on_tier]
    grown = Program(
        np.append(np.zeros_like(program.cost), 1.0),
        0.0,
        np.append(program.lower, 0.0),
        np.append(program.upper, max(0.0, float(all_on_tier.max()))),
        np.column_stack([program.matrix, np.where(on_tier, -1.0, 0.0)]),
        program.row_lower,
        program.row_upper,
        program.row_names,
        program.prompts,
    )
    answer = run(grown, grown.cost, 0.0)
    return None if answer is None else float(answer.values[-1]) / blocks * GB
