"""Branch and bound over switches, batch shapes and the tiers in use, with linear programs as bounds.

A node is a set of switches, a range of batch shapes and what is decided of the parts: which tiers are in use for cache
and activations, and which are not. Its bound is one linear program over the whole range
(:mod:`costmodel.linear_program`): no policy in the node generates more tokens per second. The node with the highest
bound is split until no bound exceeds the best policy found by more than the gap: by a part where its optimum counts
too little for it, else by shapes.
What cannot be the best is left out first: blocks that exceed the memory of all tiers, and batches that a
job of given length does not need.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from costmodel.estimate import FIT_TOLERANCE
from costmodel.formulations.base import Part, Shape, Switches
from costmodel.linear_program import Solution, parts_in_part, solve, uncounted_s
from costmodel.policy import Split
from costmodel.search.problem import OPEN, Decided, Problem

UNCOUNTED_SHARE = 0.5
"""Of the gap, what an optimum may leave uncounted of the parts in use."""


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
        """Open a node unless it is empty; a single shape whose parts are counted right is closed at once."""
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

        The program rounds contexts down and may count too little for parts, so the exact time is a little longer (and
        may miss the latency limit).
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
        """The part that the node's optimum counts too low by most, where that matters to the proof.

        Or to whether a single shape fits, for which one of the cache is taken, or is within a limit of latency.
        """
        question, optimum = self.problem.question(node.switches, node.shape, self.segments, node.decided), node.solution
        parts = parts_in_part(question, optimum)
        limited = node.shape.is_single and question.max_latency_s is not None
        tolerance = FIT_TOLERANCE if limited else self.gap * UNCOUNTED_SHARE
        if not parts or (optimum.fits and uncounted_s(question, optimum, parts) <= optimum.seconds * tolerance):
            return None
        kept = [part for part in parts if part[0] == "cache" and not optimum.fits]
        return max(kept or parts, key=lambda part: uncounted_s(question, optimum, [part]))

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
