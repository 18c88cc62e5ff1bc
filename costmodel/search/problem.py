"""What is searched: a machine's limits, a model, a workload, and whatever of a policy is given or settled."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from costmodel.estimate import FIT_TOLERANCE, block_seconds, case_of, fullest
from costmodel.formulations.base import PARTS, Amounts, Case, Formulation, Part, PerTier, Shape, Switches, parts_of
from costmodel.hardware import Hardware
from costmodel.linear_program import FixedSplits, Question
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.workload import Workload

LARGEST = 10**9
"""More prompts than any block holds."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What is settled of the parts: those in use count in full, those out of use hold nothing."""

    used: frozenset[Part] = frozenset()
    unused: frozenset[Part] = frozenset()

    def either_way(self, part: Part) -> "tuple[Decided, Decided]":
        """The same with one more part settled, in use and out of use."""
        return replace(self, used=self.used | {part}), replace(self, unused=self.unused | {part})

    def covers(self, other: "Decided") -> bool:
        """True where all that ``other`` leaves open is open here as well."""
        return self.used <= other.used and self.unused <= other.unused


OPEN = Decided()
"""Nothing is settled."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is searched: the machine's limits and everything that the user has fixed."""

    formulation: Formulation
    hardware: Hardware
    model: ModelSpec
    workload: Workload
    limits: dict[str, float]
    switches: tuple[Switches, ...]
    gpu_batch_size: int | None = None
    num_gpu_batches: int | None = None
    splits: FixedSplits = None

    @property
    def usable_fraction(self) -> float:
        """The share of each capacity that may be used (the GPU's is never 0)."""
        return self.limits["gpu"] / self.hardware.capacity_bytes["gpu"]

    def most_prompts(self, switches: Switches) -> int:
        """No block holds more prompts: each keeps its cache on some tier."""
        whole = Shape(gpu_batch_low=1, gpu_batch_high=LARGEST, batches_low=1, batches_high=LARGEST)
        least = min(self._cache_bytes(self._case(switches, whole), tier) for tier in TIERS)
        return min(LARGEST, max(1, int(sum(self.limits.values()) / least * (1 + FIT_TOLERANCE))))

    def _cache_bytes(self, case: Case, tier: str) -> float:
        """Bytes of one prompt's cache on one tier, working memory left out."""
        nothing = PerTier(0.0, 0.0, 0.0)
        cache = replace(nothing, **{tier: 1.0})
        peaks = self.formulation.peaks(case, Amounts(nothing, cache, nothing, prompts=0.0, blocks=0.0))
        return fullest(peaks)[tier]

    def shapes(self) -> Shape:
        """The whole range of batch shapes; a batch never holds more prompts than the job."""
        most = max(self.most_prompts(switches) for switches in self.switches)
        if self.workload.num_prompts is not None:
            most = min(most, self.workload.num_prompts)
        gpu, batches = self.gpu_batch_size, self.num_gpu_batches
        return Shape(
            gpu_batch_low=gpu or 1,
            gpu_batch_high=gpu or most,
            batches_low=batches or 1,
            batches_high=batches or most,
        )

    def useful(self, shape: Shape, most_prompts: int) -> Shape | None:
        """The part of a range worth searching, or ``None``: blocks that may fit, batches that the job needs.

        A batch more than the whole job needs makes the block longer for nothing. A given batch shape is
        kept.
        """
        gpu_batches, batches = most_prompts // shape.batches_low, most_prompts // shape.gpu_batch_low
        if self.workload.num_prompts is not None and self.num_gpu_batches is None:
            needed = math.ceil(self.workload.num_prompts / shape.gpu_batch_low)
            if shape.batches_low > needed:
                return None
            batches = min(batches, needed)
        return replace(
            shape,
            gpu_batch_high=max(shape.gpu_batch_low, min(shape.gpu_batch_high, gpu_batches)),
            batches_high=max(shape.batches_low, min(shape.batches_high, batches)),
        )

    def question(self, switches: Switches, shape: Shape, segments: int, decided: Decided = OPEN) -> Question:
        """The linear program of one node."""
        used = decided.used if self.splits is None else parts_of(self.splits)
        return Question(
            formulation=self.formulation,
            case=replace(self._case(switches, shape), used=used),
            contexts=tuple(self.formulation.decode_contexts(self.workload, segments)),
            limits=self.limits,
            max_latency_s=self.workload.max_latency_s,
            fixed=self.splits,
            max_block_prompts=self._most_useful_prompts(shape),
            unused=decided.unused,
        )

    def ways(self) -> Iterator[Decided]:
        """Every choice of the tiers that hold cache: with each, a program counts the bytes of a single shape right."""
        if self.splits is not None:
            yield OPEN
            return
        parts = [part for part in PARTS if part[0] == "cache"]
        for count in range(1, len(parts) + 1):
            for used in map(frozenset, combinations(parts, count)):
                yield Decided(used=used, unused=frozenset(parts) - used)

    def _case(self, switches: Switches, shape: Shape) -> Case:
        return Case(hardware=self.hardware, model=self.model, workload=self.workload, switches=switches, shape=shape)

    def _most_useful_prompts(self, shape: Shape) -> float:
        """The job in one block, its last batch filled up; a block of given batches may be larger."""
        prompts = self.workload.num_prompts
        if prompts is None or self.num_gpu_batches is not None:
            return math.inf
        return max(shape.gpu_batch_low * shape.batches_low, prompts + shape.gpu_batch_high - 1)

    def seconds(self, policy: Policy) -> float:
        """Seconds of one block, every decode step with its own context."""
        return sum(block_seconds(self.formulation, case_of(policy, self.hardware, self.model, self.workload), policy))

    def in_time(self, seconds: float) -> bool:
        """True where a block of this duration respects the latency limit (to the solver's tolerance)."""
        limit = self.workload.max_latency_s
        return limit is None or seconds <= limit * (1 + FIT_TOLERANCE)

    def policy(self, switches: Switches, shape: Shape, splits: tuple[Split, Split, Split]) -> Policy:
        """The policy of a single shape with these splits."""
        weights, cache, activations = splits
        return Policy(
            weights=weights,
            cache=cache,
            activations=activations,
            gpu_batch_size=shape.gpu_batch_low,
            num_gpu_batches=shape.batches_low,
            compress_weights=switches.compress_weights,
            compress_cache=switches.compress_cache,
            cpu_attention=switches.cpu_attention,
            overlap=switches.overlap,
        )

    def job_share(self, shape: Shape) -> float:
        """At most this share of the prompts of all blocks is asked for; 1 for an endless queue.

        A job fills up its last batch at least: n prompts take ceil(n / b) b places. With one batch size
        it fills up its last block.
        """
        prompts = self.workload.num_prompts
        if prompts is None:
            return 1.0
        places = np.arange(shape.gpu_batch_low, shape.gpu_batch_high + 1)
        if len(places) == 1:
            places = places * np.arange(shape.batches_low, shape.batches_high + 1)
        return float(np.max(prompts / (-(-prompts // places) * places)))

    def same_number_of_blocks(self, shape: Shape) -> bool:
        """True where the job takes as many blocks with the smallest shape of the range as with the largest."""
        prompts = self.workload.num_prompts
        if prompts is None:
            return False
        least, most = shape.gpu_batch_low * shape.batches_low, shape.gpu_batch_high * shape.batches_high
        return math.ceil(prompts / least) == math.ceil(prompts / most)
