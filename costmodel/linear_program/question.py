"""What a linear program is asked (:class:`Question`) and what it answers (:class:`Solution`)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing

from costmodel.formulations.base import KINDS, Amounts, Case, Formulation, Part, PerTier, Stage
from costmodel.policy import TIERS, Split

Vector = np.typing.NDArray[np.float64]

SPLIT_VARIABLES = tuple(f"{kind}_{tier}" for kind in KINDS for tier in TIERS)
BLOCKS = len(SPLIT_VARIABLES)
PROMPTS = BLOCKS + 1
MS = 1e3

FixedSplits = tuple[Split, Split, Split] | None


@dataclass(frozen=True, kw_only=True)
class Question:
    """One linear program to build: what it costs (``case``), what it may use, what is fixed.

    ``contexts`` are the decode steps as (context length, steps); ``limits`` are usable bytes by tier;
    ``max_block_prompts`` bounds the block beyond what the shape says; ``unused`` parts hold nothing.
    """

    formulation: Formulation
    case: Case
    contexts: tuple[tuple[float, int], ...]
    limits: dict[str, float]
    max_latency_s: float | None = None
    fixed: FixedSplits = None
    max_block_prompts: float = float("inf")
    unused: frozenset[Part] = frozenset()

    @property
    def empty(self) -> frozenset[Part]:
        """The parts that hold nothing, by what is asked or by the formulation."""
        return self.unused if self.formulation.activations_on_disk else self.unused | {("activations", "disk")}

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

    def amounts_of(self, values: Vector) -> Amounts[float]:
        """The amounts of the reference prompts that a solver's variables say."""
        weights, cache, activations = (PerTier(*map(float, values[3 * i : 3 * i + 3])) for i in range(3))
        return Amounts(weights, cache, activations, prompts=self.prompts, blocks=float(values[BLOCKS]))

    def seconds(self, amounts: Amounts[float]) -> float:
        """Seconds of these amounts over all stages."""
        return sum(float(stage.total()) * passes for _, stage, passes in self.timed_stages(amounts))


@dataclass(frozen=True, kw_only=True)
class Solution:
    """An optimum: seconds for ``prompts`` reference prompts, the amounts, and prices of the limits.

    ``seconds`` is proven from the duals: no amounts that respect the rows take less.
    ``prices_s_per_byte[tier]`` is how many seconds one more usable byte on that tier would save (for
    the reference prompts); ``latency_price`` likewise for one more second of allowed latency. ``fits`` is
    false where the splits of a single shape exceed a limit, by what no precision of the solver mends or by what is
    kept for parts that the program counts by their share.
    """

    seconds: float
    prompts: float
    amounts: Vector
    prices_s_per_byte: dict[str, float]
    latency_price: float
    fits: bool = True

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
