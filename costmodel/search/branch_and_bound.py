"""Branch and bound over switches and batch shapes, with linear programs as bounds.

A node is a set of switches and a range of batch shapes. Its bound is one linear program over the whole
range (:mod:`costmodel.linear_program`): no policy in the node generates more tokens per second. The
node with the highest bound is split until no bound exceeds the best policy found by more than the gap.
"""

import heapq
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from costmodel.estimate import block_seconds
from costmodel.formulations.base import Case, Formulation, Shape, Switches
from costmodel.hardware import Hardware
from costmodel.linear_program import FixedSplits, Question, Solution, solve
from costmodel.model import ModelSpec
from costmodel.policy import Policy, Split
from costmodel.workload import Workload


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
    def most_prompts(self) -> int:
        """No block holds more prompts: each keeps at least its 4-bit cache on some tier."""
        model = self.model
        least = model.kv_bytes_per_token(compressed=True) * self.workload.total_len * model.num_layers
        return max(1, int(sum(self.limits.values()) / least))

    def shapes(self) -> Shape:
        """The whole range of batch shapes."""
        most = self.most_prompts
        prompts = self.workload.num_prompts
        largest_batch = most if prompts is None else min(most, prompts)
        most_batches = most if prompts is None else min(most, prompts)
        gpu, batches = self.gpu_batch_size, self.num_gpu_batches
        return Shape(
            gpu_batch_low=gpu or 1,
            gpu_batch_high=gpu or largest_batch,
            batches_low=batches or 1,
            batches_high=batches or most_batches,
        )

    def question(self, switches: Switches, shape: Shape, segments: int) -> Question:
        """The linear program of one node."""
        case = Case(hardware=self.hardware, model=self.model, workload=self.workload, switches=switches, shape=shape)
        fixed_shape = self.gpu_batch_size is not None and self.num_gpu_batches is not None
        most = math.inf if fixed_shape or shape.is_single else float(self._most_useful_prompts(shape))
        return Question(
            formulation=self.formulation,
            case=case,
            contexts=tuple(self.formulation.decode_contexts(self.workload, segments)),
            limits=self.limits,
            max_latency_s=self.workload.max_latency_s,
            fixed=self.splits,
            max_block_prompts=most,
        )

    def _most_useful_prompts(self, shape: Shape) -> int:
        prompts = self.workload.num_prompts
        least = shape.gpu_batch_low * shape.batches_low
        most = self.most_prompts if prompts is None else min(self.most_prompts, prompts + shape.gpu_batch_high - 1)
        return max(least, most)

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
        """At most this share of the blocks' prompts is asked for; 1 for an endless queue."""
        prompts, least = self.workload.num_prompts, shape.gpu_batch_low * shape.batches_low
        if prompts is None or not self.same_number_of_blocks(shape):
            return 1.0
        return min(1.0, prompts / (math.ceil(prompts / least) * least))

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
    """What the search proves: no policy beats ``bound`` (token/s); ``best`` is the best one found."""

    best: Candidate | None
    bound: float
    linear_programs: int

    @property
    def gap(self) -> float:
        """How far the best policy may be from the best possible, relative to it."""
        return 0.0 if self.best is None else max(0.0, self.bound / self.best.throughput - 1.0)


@dataclass(order=True)
class _Node:
    sort_key: float
    tie: int
    switches: Switches = field(compare=False)
    shape: Shape = field(compare=False)
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
        self.tried: set[tuple[Switches, Shape]] = set()

    def run(self) -> Certificate:
        """Best-first: the bound on everything is the highest bound that is still open."""
        whole = self.problem.shapes()
        for switches in self.problem.switches:
            self.push(switches, whole)
        while self.open:
            node = heapq.heappop(self.open)
            bound = -node.sort_key
            if self.is_beaten(bound):
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

    def solve(self, switches: Switches, shape: Shape) -> tuple[float, Solution] | None:
        """The bound of a range and its optimum, or ``None`` where the range holds no policy that fits."""
        self.linear_programs += 1
        solution = solve(self.problem.question(switches, shape, self.segments))
        if solution is None:
            return None
        return self.throughput_of(solution.seconds_per_prompt) * self.problem.job_share(shape), solution

    def throughput_of(self, seconds_per_prompt: float) -> float:
        return self.problem.workload.gen_len / seconds_per_prompt

    def push(self, switches: Switches, shape: Shape) -> None:
        """Open a node unless it is empty; a single shape is closed at once.

        Where every number of batches in the range makes the job take the same number of blocks, the
        smallest one is the best: a block of fewer prompts is never slower.
        """
        if shape.gpu_batch_low == shape.gpu_batch_high and self.problem.same_number_of_blocks(shape):
            shape = Shape.exactly(shape.gpu_batch_low, shape.batches_low)
        found = self.solve(switches, shape)
        if found is None:
            return
        bound, solution = found
        if shape.is_single:
            self.tried.add((switches, shape))
            self.offer(switches, shape, bound, solution)
        else:
            heapq.heappush(self.open, _Node(-bound, next(self.ties), switches, shape, solution))

    def offer(self, switches: Switches, shape: Shape, bound: float, solution: Solution) -> None:
        """Consider the optimum of a single shape as the incumbent.

        Its bound stays on record: the program rounds contexts down, so the exact time is a little longer.
        """
        self.closed_bound = max(self.closed_bound, bound)
        if self.best is not None and bound <= self.best.throughput:
            return
        splits = solution.splits()
        policy = self.problem.policy(switches, shape, splits)
        problem = self.problem
        case = Case(
            hardware=problem.hardware,
            model=problem.model,
            workload=problem.workload,
            switches=switches,
            shape=shape,
        )
        seconds = sum(block_seconds(problem.formulation, case, policy))
        throughput = self.throughput_of(seconds / policy.block_size) * problem.job_share(shape)
        if self.best is None or throughput > self.best.throughput:
            self.best = Candidate(throughput=throughput, switches=switches, shape=shape, splits=splits)

    def expand(self, node: _Node) -> None:
        """Try the shapes that the node's optimum points to, then split the node."""
        for shape in self.nearby(node):
            key = (node.switches, shape)
            if key not in self.tried:
                self.tried.add(key)
                found = self.solve(node.switches, shape)
                if found is not None:
                    self.offer(node.switches, shape, *found)
        for shape in self.split(node):
            if shape.is_single and (node.switches, shape) in self.tried:
                continue
            self.push(node.switches, shape)

    def nearby(self, node: _Node) -> Iterator[Shape]:
        """Single shapes close to the node's relaxed optimum."""
        shape = node.shape
        gpu_batch = _middle(shape.gpu_batch_low, shape.gpu_batch_high)
        wanted = node.solution.block_prompts / gpu_batch
        for batches in sorted({math.floor(wanted + 1e-9), math.ceil(wanted - 1e-9)}):
            if shape.batches_low <= batches <= shape.batches_high:
                yield Shape.exactly(gpu_batch, batches)

    def split(self, node: _Node) -> Iterable[Shape]:
        """Two halves: of the GPU batch sizes while there are several, then of the numbers of batches."""
        shape = node.shape
        if shape.gpu_batch_low < shape.gpu_batch_high:
            middle = _middle(shape.gpu_batch_low, shape.gpu_batch_high)
            return (
                replace(shape, gpu_batch_high=middle),
                replace(shape, gpu_batch_low=middle + 1),
            )
        wanted = node.solution.block_prompts / shape.gpu_batch_low
        cut = int(np.clip(math.floor(wanted + 1e-9), shape.batches_low, shape.batches_high - 1))
        return replace(shape, batches_high=cut), replace(shape, batches_low=cut + 1)


def _middle(low: int, high: int) -> int:
    """The geometric middle: batch sizes matter by their ratio."""
    return min(high - 1, max(low, round(math.sqrt(low * high)))) if low < high else low
