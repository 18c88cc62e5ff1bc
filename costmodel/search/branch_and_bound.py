"""Branch and bound over switches, batch shapes and the tiers in use, with linear programs as bounds.

A node is a set of switches, a range of batch shapes and what is decided of the parts: which tiers are in use for cache
and activations, and which are not. Its bound is one linear program over the whole range
(:mod:`costmodel.linear_program`): no policy in the node generates more tokens per second. The node with the highest
bound is split until no bound exceeds the best policy found by more than the gap: by a part where its optimum counts
the calls for it too low, else by shapes.
What cannot be the best is left out first: blocks that exceed the memory of all tiers, and batches that a
job of given length does not need.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from costmodel.estimate import FIT_TOLERANCE, block_seconds, case_of
from costmodel.formulations.base import Amounts, Case, Formulation, Part, PerTier, Shape, Switches, parts_of
from costmodel.hardware import Hardware
from costmodel.linear_program import FixedSplits, Question, Solution, parts_in_part, solve, uncounted_s
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.workload import Workload

UNCOUNTED_SHARE = 0.5
"""Of the gap, what an optimum may leave uncounted of the calls for parts in use."""

LARGEST = 10**9
"""More prompts than any block holds."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """What is settled of the parts: calls for those in use count in full, those out of use hold nothing."""

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
        return max(float(peak.bytes) for peak in peaks if peak.tier == tier)

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


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A policy of the search with its exact throughput (token/s)."""

    throughput: float
    switches: Switches
    shape: Shape
    splits: tuple[Split, Split, Split]


@dataclass(kw_only=True)
class Certificate:
    """What the search proves: no policy beats ``bound`` (token/s); ``best`` is the best one found.

    Where nothing fits, the bound is 0. A bound without a policy means that contexts were too coarse.
    """

    best: Candidate | None
    bound: float
    linear_programs: int

    @property
    def gap(self) -> float:
        """How far the best policy may be from the best possible, relative to it."""
        if self.best is None:
            return math.inf if self.bound else 0.0
        return max(0.0, self.bound / self.best.throughput - 1.0)


@dataclass(order=True)
class _Node:
    sort_key: float
    tie: int
    switches: Switches = field(compare=False)
    shape: Shape = field(compare=False)
    decided: Decided = field(compare=False)
    solution: Solution = field(compare=False)


def certify(problem: Problem, *, gap: float, segments: int = 1, start: Candidate | None = None) -> Certificate:
    """Search every switch and batch shape of ``problem`` until the best is proven within ``gap``.

    ``segments`` is the number of decode contexts that the bounds distinguish; ``start`` is a policy
    already known. ``best`` is ``None`` where nothing fits.
    """
    return _Search(problem, gap, segments, start).run()


class _Search:
    """The state of one run: open nodes, the incumbent and the count of programs solved."""

    def __init__(self, problem: Problem, gap: float, segments: int, start: Candidate | None) -> None:
        self.problem, self.gap, self.segments, self.best = problem, gap, segments, start
        self.linear_programs = 0
        self.closed_bound = 0.0
        self.open: list[_Node] = []
        self.ties = itertools.count()
        self.tried: dict[tuple[Switches, Shape], list[Decided]] = {}
        self.most_prompts = {switches: problem.most_prompts(switches) for switches in problem.switches}

    def run(self) -> Certificate:
        """Best-first: the bound on everything is the highest bound that is still open."""
        whole = self.problem.shapes()
        for switches in self.problem.switches:
            self.push(switches, whole)
        while self.open:
            node = heapq.heappop(self.open)
            bound = -node.sort_key
            if self.is_beaten(bound) or self.is_too_coarse(bound):
                heapq.heappush(self.open, node)
                break
            self.expand(node)
        incumbent = 0.0 if self.best is None else self.best.throughput
        still_open = max((-node.sort_key for node in self.open), default=0.0)
        return Certificate(
            best=self.best,
            bound=max(incumbent, still_open, self.closed_bound),
            linear_programs=self.linear_programs,
        )

    def is_beaten(self, bound: float) -> bool:
        """True where a bound promises less than the gap over the incumbent."""
        return self.best is not None and bound <= self.best.throughput * (1.0 + self.gap)

    def is_too_coarse(self, bound: float) -> bool:
        """True where the contexts of a closed shape leave the gap open, whatever else is still to come."""
        return bound <= self.closed_bound and not self.is_beaten(self.closed_bound)

    def solve(self, switches: Switches, shape: Shape, decided: Decided) -> tuple[float, Solution] | None:
        """The bound of a range and its optimum, or ``None`` where the range holds no policy that fits."""
        self.linear_programs += 1
        solution = solve(self.problem.question(switches, shape, self.segments, decided))
        if solution is None:
            return None
        return self.throughput_of(solution.seconds_per_prompt) * self.problem.job_share(shape), solution

    def throughput_of(self, seconds_per_prompt: float) -> float:
        return self.problem.workload.gen_len / seconds_per_prompt if seconds_per_prompt else math.inf

    def push(self, switches: Switches, whole: Shape, decided: Decided = OPEN) -> None:
        """Open a node for what of a range is worth it, unless a single shape was opened with as little settled.

        Where every number of batches in the range makes the job take the same number of blocks, the
        smallest one is the best: a block of fewer prompts is never slower.
        """
        shape = self.problem.useful(whole, self.most_prompts[switches])
        if shape is None:
            return
        if shape.gpu_batch_low == shape.gpu_batch_high and self.problem.same_number_of_blocks(shape):
            shape = Shape.exactly(shape.gpu_batch_low, shape.batches_low)
        if shape.is_single:
            before = self.tried.setdefault((switches, shape), [])
            if any(done.covers(decided) for done in before):
                return
            before.append(decided)
        self.enter(switches, shape, decided)

    def enter(self, switches: Switches, shape: Shape, decided: Decided) -> None:
        """Open a node unless it is empty; a single shape whose calls are counted right is closed at once."""
        found = self.solve(switches, shape, decided)
        if found is None:
            return
        bound, solution = found
        node = _Node(-bound, next(self.ties), switches, shape, decided, solution)
        if shape.is_single:
            self.offer(switches, shape, bound, solution)
            if self.is_beaten(bound) or self.part_to_settle(node) is None:
                self.closed_bound = max(self.closed_bound, bound)
                return
        heapq.heappush(self.open, node)

    def offer(self, switches: Switches, shape: Shape, bound: float, solution: Solution) -> None:
        """Consider the optimum of a single shape as the incumbent.

        The program rounds contexts down and may count too few calls, so the exact time is a little longer (and may miss
        the latency limit).
        """
        if not solution.fits or (self.best is not None and bound <= self.best.throughput):
            return
        splits = self.problem.splits or solution.splits()
        policy = self.problem.policy(switches, shape, splits)
        seconds = self.problem.seconds(policy)
        throughput = self.throughput_of(seconds / policy.block_size) * self.problem.job_share(shape)
        if self.problem.in_time(seconds) and (self.best is None or throughput > self.best.throughput):
            self.best = Candidate(throughput=throughput, switches=switches, shape=shape, splits=splits)

    def expand(self, node: _Node) -> None:
        """Try the shapes that the node's optimum points to, then split the node."""
        if not node.shape.is_single:
            for shape in self.nearby(node):
                self.push(node.switches, shape, node.decided)
        part = self.part_to_settle(node)
        if part is not None:
            for decided in node.decided.either_way(part):
                self.enter(node.switches, node.shape, decided)
            return
        for shape in self.split(node):
            self.push(node.switches, shape, node.decided)

    def part_to_settle(self, node: _Node) -> Part | None:
        """The part whose calls the node's optimum counts too low by most, where that matters to the proof.

        Or to whether a single shape is within a limit of latency.
        """
        question, optimum = self.problem.question(node.switches, node.shape, self.segments, node.decided), node.solution
        parts = parts_in_part(question, optimum)
        limited = node.shape.is_single and question.max_latency_s is not None
        tolerance = FIT_TOLERANCE if limited else self.gap * UNCOUNTED_SHARE
        if not parts or uncounted_s(question, optimum, parts) <= optimum.seconds * tolerance:
            return None
        return max(parts, key=lambda part: uncounted_s(question, optimum, [part]))

    def nearby(self, node: _Node) -> Iterator[Shape]:
        """Single shapes close to the node's relaxed optimum."""
        shape = node.shape
        gpu_batch = _middle(shape.gpu_batch_low, shape.gpu_batch_high)
        wanted = node.solution.block_prompts / gpu_batch
        for batches in sorted({math.floor(wanted + 1e-9), math.ceil(wanted - 1e-9)}):
            if shape.batches_low <= batches <= shape.batches_high:
                yield Shape.exactly(gpu_batch, batches)

    def split(self, node: _Node) -> Iterable[Shape]:
        """Two halves of the wider range, by the ratio of its ends."""
        shape = node.shape
        if shape.gpu_batch_high * shape.batches_low > shape.gpu_batch_low * shape.batches_high:
            middle = _middle(shape.gpu_batch_low, shape.gpu_batch_high)
            return (
                replace(shape, gpu_batch_high=middle),
                replace(shape, gpu_batch_low=middle + 1),
            )
        middle = _middle(shape.batches_low, shape.batches_high)
        return replace(shape, batches_high=middle), replace(shape, batches_low=middle + 1)


def _middle(low: int, high: int) -> int:
    """The geometric middle: batch sizes matter by their ratio."""
    return min(high - 1, max(low, round(math.sqrt(low * high)))) if low < high else low
