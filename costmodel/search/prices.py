"""Shadow prices: what one more GiB or GB/s would buy at the best policy's switches and GPU batch size.

Capacities stand on the right-hand side of the program, so their prices are its duals. Rates stand in
the matrix, so theirs come from solving again with the rate raised. The number of GPU batches and the
splits are free to follow.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from costmodel.linear_program import Question, solve
from costmodel.policy import TIERS
from costmodel.search.branch_and_bound import LARGEST, Candidate, Problem
from costmodel.units import GB, GiB

SEGMENTS = 4
"""Decode contexts that the prices distinguish."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """``amount`` more of ``what`` changes the throughput by the relative ``gain``."""

    what: str
    amount: str
    gain: float
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; ``gain`` 0.021 is +2.1 %."""
        return asdict(self)

    def sentence(self) -> str:
        """The price in words."""
        return f"{self.amount} more {self.what}: {self.gain * 100:+.1f} % throughput"


_CAPACITIES = {"gpu": "GPU memory", "cpu": "CPU memory", "disk": "disk"}

_RATES: tuple[tuple[str, str, float, tuple[str, ...]], ...] = (
    ("disk read", "1 GB/s", 1 * GB, ("links.disk_read.bytes_per_s", "links.disk_read.cache_bytes_per_s")),
    ("disk write", "1 GB/s", 1 * GB, ("links.disk_write.bytes_per_s", "links.disk_write.cache_bytes_per_s")),
    (
        "host link, each way",
        "1 GB/s",
        1 * GB,
        (
            "links.cpu_to_gpu.bytes_per_s",
            "links.cpu_to_gpu.cache_bytes_per_s",
            "links.gpu_to_cpu.bytes_per_s",
            "links.gpu_to_cpu.cache_bytes_per_s",
        ),
    ),
    ("GPU memory bandwidth", "100 GB/s", 100 * GB, ("gpu.memory_bytes_per_s",)),
    ("GPU matrix rate", "10 TFLOP/s", 10e12, ("gpu.matmul_flops_per_s",)),
    ("CPU attention rate", "10 GB/s", 10 * GB, ("cpu.attention_bytes_per_s",)),
)


def price_question(problem: Problem, candidate: Candidate) -> Question:
    """The program whose duals are the prices: the number of batches is free unless it was given."""
    shape = candidate.shape
    if problem.num_gpu_batches is None:
        any_number = replace(shape, batches_low=1, batches_high=LARGEST)
        shape = problem.useful(any_number, problem.most_prompts(candidate.switches)) or shape
    return problem.question(candidate.switches, shape, SEGMENTS)


def shadow_prices(problem: Problem, candidate: Candidate) -> tuple[Price, ...]:
    """Prices of every capacity and rate, the largest gain first."""
    question = price_question(problem, candidate)
    base = solve(question)
    if base is None:
        return ()
    found = []
    for tier in TIERS:
        capacity = problem.hardware.capacity_bytes[tier]
        usable = problem.limits[tier] / capacity if capacity else 1.0
        saved = base.prices_s_per_byte[tier] * usable * GiB / base.seconds
        found.append(Price(what=_CAPACITIES[tier], amount="1 GiB", gain=saved, method="dual of the capacity"))
    released = problem.formulation.name == "flexgen" and problem.hardware.flexgen_constants is not None
    for what, amount, step, paths in () if released else _RATES:
        hardware = problem.hardware
        present = [path for path in paths if _has(hardware, path)]
        if not present:
            continue
        for path in present:
            hardware = hardware.raised(path, step)
        raised = solve(replace(question, case=replace(question.case, hardware=hardware)))
        if raised is not None:
            gain = base.seconds / raised.seconds - 1
            found.append(Price(what=what, amount=amount, gain=gain, method="solved again"))
    return tuple(sorted(found, key=lambda price: -price.gain))


def _has(owner: Any, path: str) -> bool:
    for step in path.split("."):
        owner = getattr(owner, step)
    return owner is not None
