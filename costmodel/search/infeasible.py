"""When nothing fits: which limit fails, and the least memory, latency or compression that mends it."""

import math
from dataclasses import replace

from costmodel import units, words
from costmodel.errors import InfeasibleError
from costmodel.formulations.base import SWITCHES, Shape, Switches
from costmodel.linear_program import least_extra_bytes, solve
from costmodel.policy import TIERS
from costmodel.search.branch_and_bound import certify
from costmodel.search.problem import Problem

SEGMENTS = 64
"""Decode contexts that the fastest block distinguishes."""

FASTEST_GAP = 1e-5
"""How much faster than it another block may be."""

_NAMES = {"gpu": "GPU memory", "cpu": "CPU memory", "disk": "disk"}
_FLAGS = {"gpu": "--gpu-memory", "cpu": "--cpu-memory", "disk": "--disk"}


def smallest(problem: Problem) -> Shape:
    """The batch shape that needs the least memory and time."""
    shape = problem.shapes()
    return Shape.exactly(shape.gpu_batch_low, shape.batches_low)


def fastest_block_s(problem: Problem) -> float | None:
    """Least seconds for a block over all switches at the smallest shape, or ``None`` if none fits."""
    shape = smallest(problem)
    free = replace(
        problem,
        workload=replace(problem.workload, max_latency_s=None),
        gpu_batch_size=shape.gpu_batch_low,
        num_gpu_batches=shape.batches_low,
    )
    best = certify(free, gap=FASTEST_GAP, segments=SEGMENTS).best
    return None if best is None else free.seconds(free.policy(best.switches, best.shape, best.splits))


def explain(problem: Problem) -> InfeasibleError:
    """The error to raise for a problem without any feasible policy."""
    limit = problem.workload.max_latency_s
    if limit is not None:
        fastest = fastest_block_s(problem)
        if fastest is not None:
            generated = words.counted(problem.workload.gen_len, "token")
            return InfeasibleError(
                f"no policy generates {generated} after {problem.workload.prompt_len} within "
                f"{units.format_seconds(limit)}: the fastest block takes {units.format_seconds(fastest)}; raise "
                f"--max-latency to at least {_rounded_up(fastest):g}",
                reason={"limit": "max_latency_s", "given": limit, "least": fastest},
            )
    # Memory fails whatever the time: what mends it is computed without the latency limit.
    return _memory(replace(problem, workload=replace(problem.workload, max_latency_s=None)))


def _rounded_up(seconds: float) -> float:
    """Four significant digits that are enough: 12.3411 gives 12.35."""
    unit = 10.0 ** (math.floor(math.log10(seconds)) - 3)
    return float(f"{math.ceil(seconds / unit) * unit:.4g}")


def _memory(problem: Problem) -> InfeasibleError:
    needed = {tier: _least_capacity(problem, tier) for tier in TIERS}
    capacity = problem.hardware.capacity_bytes
    share = problem.usable_fraction
    have = ", ".join(f"{_NAMES[t]} {units.format_bytes(capacity[t])}" for t in TIERS)
    shape = smallest(problem)
    what = f"{problem.model.name} with a block of {shape.gpu_batch_low} × {shape.batches_low} prompts of "
    what += f"{problem.workload.prompt_len} + {problem.workload.gen_len} tokens"
    mends = [
        f"{_FLAGS[tier]} of at least {units.format_bytes(least)}" for tier, least in needed.items() if least is not None
    ]
    failing = [tier for tier in TIERS if needed[tier] is not None]
    compression = _compression_that_fits(problem)
    if compression:
        mends.append(compression)
    if _smaller_block_fits(problem):
        mends.append("a smaller block: leave --gpu-batch-size and --num-gpu-batches to the search")
    mend = f"any one of these would mend it: {'; '.join(mends)}" if mends else "no single limit mends it: raise several"
    return InfeasibleError(
        f"{what} does not fit {problem.hardware.name} ({have}, of which {share:.0%} is usable){_blame(failing)}; "
        f"{mend}",
        reason={
            "limit": "memory",
            "capacity_bytes": capacity,
            "usable_fraction": share,
            "least_capacity_bytes": {tier: least for tier, least in needed.items() if least is not None},
            "compression": compression,
        },
    )


def _blame(failing: list[str]) -> str:
    """The tier that fails, where only one can be at fault."""
    return f": the {_NAMES[failing[0]]} is too small" if len(failing) == 1 else ""


def _smaller_block_fits(problem: Problem) -> bool:
    """True where the batch shape was given and the smallest one would fit."""
    if problem.gpu_batch_size is None and problem.num_gpu_batches is None:
        return False
    free = replace(problem, gpu_batch_size=None, num_gpu_batches=None)
    return any(_fits(free, switches, smallest(free)) for switches in free.switches)


def _fits(problem: Problem, switches: Switches, shape: Shape) -> bool:
    """True where a batch shape has splits that fit."""
    solutions = (solve(problem.question(switches, shape, 1, way)) for way in problem.ways())
    return any(solution is not None and solution.fits for solution in solutions)


def _least_capacity(problem: Problem, tier: str) -> float | None:
    """Least capacity of one tier that lets the smallest shape fit, the others unchanged."""
    shape = smallest(problem)
    questions = [problem.question(switches, shape, 1, way) for switches in problem.switches for way in problem.ways()]
    found = [extra for question in questions if (extra := least_extra_bytes(question, tier)) is not None]
    if not found:
        return None
    # A thousandth on top, so that the printed figure still fits after rounding.
    return (problem.limits[tier] + min(found)) / problem.usable_fraction * 1.001


def _compression_that_fits(problem: Problem) -> str | None:
    """The compression flags, not allowed so far, with which the smallest shape fits."""
    shape = smallest(problem)
    tried = set(problem.switches)
    for extra in (("compress_weights",), ("compress_cache",), ("compress_weights", "compress_cache")):
        for base in problem.switches:
            values = {name: getattr(base, name) or name in extra for name in SWITCHES}
            switches = Switches(**values)
            if switches in tried or problem.formulation.refusal(switches, problem.hardware) is not None:
                continue
            if _fits(problem, switches, shape):
                return " ".join(f"--{name.replace('_', '-')} on" for name in extra)
    return None
