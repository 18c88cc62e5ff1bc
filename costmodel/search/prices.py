"""Shadow prices: what one more GiB or GB/s would buy at the best policy's switches and GPU batch size.

Capacities stand on the right-hand side of the program, so their prices are its duals. Rates stand in
the matrix, so theirs come from solving again with the rate raised. The number of GPU batches and the
splits are free to follow.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from costmodel.formulations.base import parts_of
from costmodel.hardware import Hardware, quantities
from costmodel.linear_program import Question, solve
from costmodel.overrides import PATHS, RELEASED
from costmodel.policy import TIERS
from costmodel.search.branch_and_bound import Candidate
from costmodel.search.problem import LARGEST, Decided, Problem
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


@dataclass(frozen=True, kw_only=True)
class _Raise:
    """What to raise for one price: quantities of the machine, or the published model's own constants.

    ``share`` raises by a part of each rate, ``step`` by an absolute amount.
    """

    what: str
    amount: str
    paths: tuple[str, ...]
    released: tuple[str, ...]
    step: float = 0.0
    share: float = 0.0

    def applied(self, problem: Problem) -> Hardware | None:
        """The machine with the rates raised; ``None`` where it has none of them."""
        hardware = problem.hardware
        published = problem.formulation.name == "flexgen" and hardware.flexgen_constants is not None
        paths = tuple(f"flexgen_constants.{name}" for name in self.released) if published else self.paths
        known = dict(quantities(hardware))
        present = [path for path in paths if path in known]
        for path in present:
            hardware = hardware.raised(path, self.step + self.share * known[path].effective)
        return hardware if present else None


def _link(what: str, flag: str) -> _Raise:
    """1 GB/s more of what a flag of the command line sets."""
    return _Raise(what=what, amount="1 GB/s", step=1 * GB, paths=PATHS[flag], released=RELEASED[flag])


_RAISES = (
    _link("disk read", "disk_read"),
    _link("disk write", "disk_write"),
    _link("host link, each way", "host_link"),
    _Raise(
        what="GPU memory bandwidth",
        amount="10 %",
        share=0.1,
        paths=("gpu.memory_bytes_per_s",),
        released=("attention_decode_flops_per_s",),
    ),
    _Raise(
        what="GPU matrix and attention rate",
        amount="10 %",
        share=0.1,
        paths=("gpu.matmul_flops_per_s", "gpu.attention_flops_per_s"),
        released=("matmul_prefill_flops_per_s", "matmul_decode_flops_per_s", "attention_prefill_flops_per_s"),
    ),
    _Raise(
        what="CPU attention rate",
        amount="10 %",
        share=0.1,
        paths=("cpu.attention_bytes_per_s",),
        released=("cpu_attention_flops_per_s",),
    ),
)


def price_question(problem: Problem, candidate: Candidate) -> Question:
    """The program whose duals are the prices: the number of batches is free unless it was given."""
    shape = candidate.shape
    if problem.num_gpu_batches is None:
        any_number = replace(shape, batches_low=1, batches_high=LARGEST)
        shape = problem.useful(any_number, problem.most_prompts(candidate.switches)) or shape
    return problem.question(candidate.switches, shape, SEGMENTS, Decided(used=parts_of(candidate.splits)))


def shadow_prices(problem: Problem, candidate: Candidate) -> tuple[Price, ...]:
    """Prices of every capacity and rate, the largest gain first."""
    question = price_question(problem, candidate)
    base = solve(question)
    if base is None:
        return ()
    found = []
    for tier in TIERS:
        saved = base.prices_s_per_byte[tier] * problem.usable_fraction * GiB / base.seconds
        found.append(Price(what=_CAPACITIES[tier], amount="1 GiB", gain=saved, method="dual of the capacity"))
    for change in _RAISES:
        hardware = change.applied(problem)
        if hardware is None:
            continue
        raised = solve(replace(question, case=replace(question.case, hardware=hardware)))
        if raised is not None:
            gain = base.seconds / raised.seconds - 1
            found.append(Price(what=change.what, amount=change.amount, gain=gain, method="solved again"))
    return tuple(sorted(found, key=lambda price: -price.gain))
