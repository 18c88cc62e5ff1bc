"""The search's certificate against brute force, its requests, and the whole catalogue."""

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import InfeasibleError, InputError
from costmodel.estimate import estimate
from costmodel.formulations.base import SWITCHES, Shape, Switches
from costmodel.hardware import Hardware, catalog_names
from costmodel.linear_program import solve
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.policy import TIERS, Policy, Split
from costmodel.search import SearchResult, make_problem, search
from costmodel.search.branch_and_bound import certify
from costmodel.search.problem import OPEN, Problem
from costmodel.workload import Workload
from tests.instances import (
    Best,
    any_machine,
    any_model,
    any_problem,
    any_shape,
    any_splits,
    best_policy_of_shape,
    brute_force,
    cost_of,
    every_shape,
    fastest_of,
    inside,
    link,
    logarithmic,
    machine,
    plain_model,
    rate,
)

GIB = 2**30
GAP = 1e-3


def searched(problem: Problem, **keywords: Any) -> SearchResult:
    """The search for the same problem, through the public function."""
    return search(
        hardware=problem.hardware,
        model=problem.model,
        workload=problem.workload,
        formulation=problem.formulation.name,
        usable_fraction=1.0,
        gpu_batch_size=problem.gpu_batch_size,
        num_gpu_batches=problem.num_gpu_batches,
        splits=problem.splits,
        switches=keywords.pop("switches", {}),
        **{"with_prices": False} | keywords,
    )


def check(problem: Problem, result: SearchResult, found: list[Best]) -> None:
    """The certificate's promises, given the best policy of every shape."""
    best = fastest_of(found).cost.throughput_tok_per_s
    cost = cost_of(problem, result.policy)
    assert cost.throughput_tok_per_s == pytest.approx(result.estimate.throughput_tok_per_s, rel=1e-12)
    assert cost.feasible
    assert result.estimate.throughput_tok_per_s >= best * (1 - GAP)
    assert result.estimate.throughput_tok_per_s <= best * (1 + 1e-6)  # brute force has seen every shape
    assert result.bound_tok_per_s >= best * (1 - 1e-7)
    assert result.gap == pytest.approx(result.bound_tok_per_s / result.estimate.throughput_tok_per_s - 1, abs=1e-12)
    assert result.gap <= GAP
    limit = problem.workload.max_latency_s
    assert limit is None or cost.latency_s <= limit * (1 + 1e-6)


# ------------------------------------------------------------------ brute force that shares no code with the search


def small(seed: int, name: str, *, prompts: float, **request: Any) -> Problem | None:
    """A random problem whose tiers hold about this many prompts in 4 bits; ``None`` where the request means nothing.

    A narrow model and long prompts, so that weights are as large as the cache of a few prompts.
    """
    rng = random.Random(seed)
    model, prompt_len = slim(any_model(rng, flexgen=name == "flexgen")), rng.choice([500, 1000])
    if name == "roofline":
        heads, prompt_len = rng.choice([4, 8]), rng.choice([2000, 4000])
        model = slim(model, num_layers=rng.choice([2, 4]), num_heads=heads, head_dim=64)
    workload = Workload(prompt_len=prompt_len, gen_len=rng.choice([1, 2, 4]))
    workload = dataclasses.replace(workload, **request.pop("workload", {}))
    packed = model.kv_bytes_per_token(compressed=True) * workload.total_len * model.num_layers
    shares = [rng.random() + 0.05 for _ in range(3)]
    sizes = [packed * prompts * rng.uniform(0.7, 1.0) * share / sum(shares) for share in shares]
    sizes[0] += model.hidden_size * workload.prompt_len * 24.0  # working memory of a prompt or two
    hardware = any_machine(rng, gpu_bytes=sizes[0], cpu_bytes=sizes[1], disk_bytes=sizes[2])
    # Scores of 4000 × 4000 would leave room for nothing else.
    hardware = dataclasses.replace(hardware, engine=dataclasses.replace(hardware.engine, attention_scores="fused"))
    try:
        return make_problem(
            hardware=hardware,
            model=model,
            workload=workload,
            formulation=name,
            usable_fraction=1.0,
            **request,
        )
    except InputError:
        return None


def slim(model: ModelSpec, *, num_layers: int = 48, num_heads: int = 1, head_dim: int = 128) -> ModelSpec:
    """A model whose weights are no larger than the cache of a few prompts of 500 tokens."""
    return dataclasses.replace(
        model,
        num_layers=num_layers,
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        ffn_size=2 * num_heads * head_dim,
        vocab_size=500,
        embedding_size=num_heads * head_dim,
    )


def problems(name: str, *, first: int, count: int, prompts: float = 9.0, **request: Any) -> Iterator[Problem]:
    """The first ``count`` random problems that mean something, feasible or not."""
    found = (small(seed, name, prompts=prompts, **request) for seed in itertools.count(first))
    return itertools.islice((problem for problem in found if problem is not None), count)


REQUESTS: dict[str, dict[str, Any]] = {
    "anything": {},
    "a job of one prompt": {"workload": {"num_prompts": 1}},
    "a job of a prime number of prompts": {"workload": {"num_prompts": 7}},
    "a job of twelve prompts": {"workload": {"num_prompts": 12}},
    "a given batch size": {"gpu_batch_size": 2, "prompts": 18.0},
    "a given number of batches": {"num_gpu_batches": 3},
    "a given number of batches for a job": {"num_gpu_batches": 2, "workload": {"num_prompts": 5}},
    "a given batch shape": {"gpu_batch_size": 2, "num_gpu_batches": 2, "prompts": 30.0},
    "compressed weights": {"switches": {"compress_weights": True}},
    "plain weights": {"switches": {"compress_weights": False}},
    "compressed cache": {"switches": {"compress_cache": True}},
    "plain cache": {"switches": {"compress_cache": False}},
    "attention on the CPU": {"switches": {"cpu_attention": True}},
    "attention on the GPU": {"switches": {"cpu_attention": False}},
    "no overlap": {"switches": {"overlap": False}},
}


@pytest.mark.parametrize("title", REQUESTS)
def test_the_search_finds_what_brute_force_finds(title: str) -> None:
    request = REQUESTS[title]
    feasible = 0
    for problem in problems("roofline", first=0, count=4, **request):
        found = brute_force(problem)
        switches = request.get("switches", {})
        if not found:
            with pytest.raises(InfeasibleError):
                searched(problem, switches=switches)
            continue
        feasible += 1
        result = searched(problem, switches=switches)
        check(problem, result, found)
        policy = result.policy
        assert problem.gpu_batch_size in (None, policy.gpu_batch_size)
        assert problem.num_gpu_batches in (None, policy.num_gpu_batches)
        assert all(getattr(policy, name) is value for name, value in switches.items())
    assert feasible


def test_what_is_kept_for_each_part_of_the_cache_is_searched_as_well() -> None:
    # An engine that compiles kernels: on 10 to 200 MB, 2.6 MB for every tier that holds cache decide what fits.
    feasible, divided = 0, 0
    for problem in problems("roofline", first=1016, count=6):
        engine = dataclasses.replace(problem.hardware.engine, expanded="pieces")
        problem = dataclasses.replace(problem, hardware=dataclasses.replace(problem.hardware, engine=engine))
        found = brute_force(problem)
        if not found:
            with pytest.raises(InfeasibleError):
                searched(problem)
            continue
        feasible += 1
        result = searched(problem)
        check(problem, result, found)
        divided += sum(getattr(result.policy.cache, tier) > 0 for tier in TIERS) > 1
    assert feasible >= 3
    assert divided


@pytest.mark.parametrize("num_prompts", [None, 5, 12])
def test_the_published_model_is_searched_as_well(num_prompts: int | None) -> None:
    feasible = 0
    for problem in problems("flexgen", first=50, count=8, workload={"num_prompts": num_prompts}):
        found = brute_force(problem)
        if found:
            feasible += 1
            check(problem, searched(problem), found)
        else:
            with pytest.raises(InfeasibleError):
                searched(problem)
    assert feasible


@pytest.mark.parametrize("name", ["roofline", "flexgen"])
def test_a_latency_limit_is_searched_as_well(name: str) -> None:
    feasible = 0
    for problem in problems(name, first=100, count=5):
        free = brute_force(problem)
        if not free:
            continue
        times = sorted(best.cost.latency_s for best in free)
        for limit in (times[0] * 1.0001, times[len(times) // 2] * 1.0001, times[-1] * 0.999, times[0] * 0.999):
            limited = dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, max_latency_s=limit))
            # At one shape the program minimises the time itself, so a limit only decides which shapes remain.
            found = [best for best in free if best.cost.latency_s <= limit]
            if found:
                feasible += 1
                check(limited, searched(limited), found)
            else:
                with pytest.raises(InfeasibleError, match="the fastest block takes"):
                    searched(limited)
    assert feasible > 5


@pytest.mark.parametrize("name", ["roofline", "flexgen"])
def test_given_splits_are_kept_to_the_last_digit(name: str) -> None:
    feasible = 0
    room = 9.0 if name == "roofline" else 14.0
    for seed in range(8):
        splits = any_splits(random.Random(seed), disk_activations=name == "roofline")
        for problem in problems(name, first=10 * seed, count=1, prompts=room, splits=splits):
            found = brute_force(problem)
            if found:
                feasible += 1
                result = searched(problem)
                check(problem, result, found)
                assert (result.policy.weights, result.policy.cache, result.policy.activations) == splits
    assert feasible > 1


def test_zero_percent_of_the_weights_means_zero() -> None:
    nothing, everything = Split(gpu=0, cpu=1, disk=0), Split(gpu=1, cpu=0, disk=0)
    result = search(
        hardware=machine(), model=plain_model(), workload=Workload(), splits=(nothing, everything, everything)
    )
    assert result.policy.weights == nothing
    free = search(hardware=machine(), model=plain_model(), workload=Workload())
    assert free.policy.weights.gpu == 1
    assert free.estimate.throughput_tok_per_s > result.estimate.throughput_tok_per_s


def test_the_papers_engine_is_searched_as_well() -> None:
    # Loads beside the first batch only and blocking copies are not jointly linear in splits and number of batches.
    paper, model = Hardware.from_catalog("t4-flexgen"), slim(plain_model())
    workload = Workload(prompt_len=500, gen_len=3)
    weights, cache = model.total_params * 2.0, model.kv_bytes_per_token(compressed=False) * 503 * 48
    for gpu, cpu, disk in ((0.5, 1.0, 2.0), (0.3, 1.5, 0.0), (0.1, 0.3, 2.0)):
        hardware = with_overrides(
            paper, gpu_memory=gpu * weights + 2 * cache, cpu_memory=cpu * weights, disk=disk * weights
        )
        problem = make_problem(hardware=hardware, model=model, workload=workload, usable_fraction=1.0)
        found = brute_force(problem)
        assert found
        check(problem, searched(problem), found)


# ------------------------------------------------------------------ larger ranges, shape by shape


def shape_by_shape(problem: Problem, *, most: int | None = None) -> list[Best]:
    """The best policy of every shape by the library's program for one shape (which other solvers confirm)."""
    shapes = every_shape(problem) if most is None else [Shape.exactly(*s) for s in pairs(most)]
    found = (best_of_shape(problem, switches, shape) for switches in problem.switches for shape in shapes)
    return [best for best in found if best is not None]


def best_of_shape(problem: Problem, switches: Switches, shape: Shape) -> Best | None:
    """The best policy of a shape, whichever tiers hold its cache."""
    found = []
    for way in (OPEN, *problem.ways()):
        solution = solve(problem.question(switches, shape, 1000, way))
        if solution is not None and solution.fits:
            policy = problem.policy(switches, shape, solution.splits())
            found.append(Best(policy, cost_of(problem, policy)))
        if way == OPEN and (solution is None or solution.fits):
            break
    return fastest_of(found) if found else None


def pairs(most: int) -> list[tuple[int, int]]:
    """Every batch size and number of batches up to ``most``."""
    return list(itertools.product(range(1, most + 1), repeat=2))


@pytest.mark.parametrize("num_prompts", [None, 11, 24, 37])
def test_larger_ranges_are_certified_too(num_prompts: int | None) -> None:
    request: dict[str, Any] = {"workload": {"num_prompts": num_prompts, "gen_len": 9}, "prompts": 24.0}
    for problem in problems("roofline", first=300, count=2, **request):
        found = shape_by_shape(problem)
        if found:
            check(problem, searched(problem), found)


def test_throughput_that_dips_and_rises_is_searched_past_its_dip() -> None:
    # Seven prompts in batches of one: k batches a block make ceil(7 / k) blocks, so throughput falls from 4 to 5 and 6
    # batches (2 blocks still, longer ones) and jumps at 7. Streaming the weights dominates.
    hardware = machine(gpu_bytes=1.1e9, cpu_bytes=8e9, disk_bytes=0, cpu_attention_bytes_per_s=None)
    model = plain_model()
    problem = make_problem(
        hardware=hardware,
        model=model,
        workload=Workload(prompt_len=500, gen_len=8, num_prompts=7),
        usable_fraction=1.0,
        gpu_batch_size=1,
        switches={"compress_weights": False, "compress_cache": False},
        splits=(Split(gpu=0, cpu=1, disk=0), Split(gpu=1, cpu=0, disk=0), Split(gpu=1, cpu=0, disk=0)),
    )
    (switches,) = problem.switches
    curve = {}
    for batches in range(1, 8):
        best = best_policy_of_shape(problem, switches, Shape.exactly(1, batches))
        assert best is not None
        curve[batches] = best.cost.throughput_tok_per_s
    assert curve[4] > curve[5] > curve[6] < curve[7]
    assert curve[4] < curve[7]
    result = searched(problem, switches={"compress_weights": False, "compress_cache": False})
    assert result.policy.num_gpu_batches == 7
    assert result.estimate.throughput_tok_per_s == pytest.approx(curve[7], rel=1e-9)


def test_a_rate_that_dips_and_rises_over_batch_sizes_is_searched_past_its_dip() -> None:
    # The matrix rate has a hole at batches of 4 to 8 prompts; memory ends at some dozens.
    curve = rate(1e12, (1, 1e11), (3, 4e11), (4, 5e10), (8, 5e10), (12, 1e12))
    model = plain_model(num_layers=4, vocab_size=10)
    cache = 4 * 2 * 1024 * 2 * 3
    room = model.total_params * 2.0 + 30 * cache
    hardware = machine(gpu_bytes=room, cpu_bytes=0, disk_bytes=0, matmul=curve)
    problem = make_problem(
        hardware=hardware,
        model=model,
        workload=Workload(prompt_len=1, gen_len=2),
        usable_fraction=1.0,
        num_gpu_batches=1,
        switches={"compress_weights": False, "compress_cache": False},
    )
    found = {}
    for size in range(1, 80):
        best = best_policy_of_shape(problem, problem.switches[0], Shape.exactly(size, 1))
        if best is not None:
            found[size] = best.cost.throughput_tok_per_s
    assert 12 < max(found) < 79
    assert found[3] > 2 * found[6]
    assert found[12] > 2 * found[3]
    result = searched(problem, switches={"compress_weights": False, "compress_cache": False})
    assert result.estimate.throughput_tok_per_s >= max(found.values()) * (1 - GAP)


# ------------------------------------------------------------------ what the search rests on


@pytest.mark.parametrize("num_prompts", [2, 3, 5, 7, 11, 12, 24])
@pytest.mark.parametrize("room", [1, 2, 3])
def test_a_job_on_a_gpu_with_room_for_a_few_prompts_at_a_time(num_prompts: int, room: int) -> None:
    # Weights come over a slow link and the GPU's memory ends at one, two or three prompts of a batch: blocks of many
    # small batches are what is best, of a number that leaves little of the last one empty.
    model = slim(plain_model(), num_layers=8, num_heads=4)
    links = dataclasses.replace(machine().links, cpu_to_gpu=link(0.2e9))
    workload = Workload(prompt_len=500, gen_len=2, num_prompts=num_prompts)
    # Two buffers of a layer (4.2 MB), and for each prompt of a batch its scores, states and widest moment.
    prompt = 2 * 4 * 500**2 * 2 + 6 * 512 * 500 * 2 + 2 * 512 * 500 * 2
    hardware = machine(
        gpu_bytes=8.4e6 + (room + 0.5) * prompt,
        cpu_bytes=1e9,
        disk_bytes=0,
        links=links,
        attention_scores="stored",
    )
    switches = {"compress_weights": False, "compress_cache": False, "cpu_attention": True}
    problem = make_problem(hardware=hardware, model=model, workload=workload, usable_fraction=1.0, switches=switches)
    found = shape_by_shape(problem, most=num_prompts)
    assert max(best.policy.gpu_batch_size for best in found) == min(room, num_prompts)
    result = searched(problem, switches=switches)
    check(problem, result, found)
    assert result.policy.num_gpu_batches > 1 or num_prompts <= room


def job_throughput(problem: Problem, shape: Shape) -> float | None:
    """The best throughput of one batch shape, its job's last block charged in full."""
    best = best_of_shape(problem, problem.switches[0], shape)
    return None if best is None else best.cost.throughput_tok_per_s


@pytest.mark.parametrize("name", ["roofline", "flexgen"])
@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_a_nodes_bound_holds_for_every_shape_in_it(name: str, rng: random.Random) -> None:
    num_prompts = rng.choice([None, 1, 5, 7, 12, 30])
    problem = any_problem(rng, name)
    workload = dataclasses.replace(problem.workload, num_prompts=num_prompts)
    # A given number of batches may exceed what the job needs.
    problem = dataclasses.replace(problem, workload=workload, num_gpu_batches=rng.choice([None, None, 4]))
    (switches,) = problem.switches
    whole = any_shape(rng, most=num_prompts or 30)
    if problem.num_gpu_batches is not None:
        whole = dataclasses.replace(whole, batches_low=4, batches_high=4)
    useful = problem.useful(whole, problem.most_prompts(switches))
    bound = 0.0
    if useful is not None:
        solution = solve(problem.question(switches, useful, 2))
        if solution is not None:
            bound = problem.workload.gen_len / solution.seconds_per_prompt * problem.job_share(useful)
    for _ in range(4):
        shape = inside(rng, whole)
        throughput = job_throughput(problem, shape)
        if throughput is None:
            continue
        size, batches = shape.gpu_batch_low, shape.batches_low
        if useful is not None and size <= useful.gpu_batch_high and batches <= useful.batches_high:
            assert throughput <= bound * (1 + 1e-7)
            continue
        # It was left out: the job needs fewer batches of that size, and they are no slower.
        assert num_prompts is not None
        needed = -(-num_prompts // size)
        assert batches > needed
        fewer = job_throughput(problem, Shape.exactly(size, needed))
        assert fewer is not None
        assert throughput <= fewer * (1 + 1e-7)


@settings(max_examples=40)
@given(rng=st.randoms(use_true_random=False), num_prompts=st.integers(1, 40), ends=st.tuples(*[st.integers(1, 40)] * 2))
def test_the_smallest_block_of_an_equal_number_of_blocks_is_the_best(
    rng: random.Random, num_prompts: int, ends: tuple[int, int]
) -> None:
    problem = any_problem(rng, "roofline")
    problem = dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, num_prompts=num_prompts))
    size, (low, high) = rng.randint(1, 8), sorted(ends)
    shape = Shape(gpu_batch_low=size, gpu_batch_high=size, batches_low=low, batches_high=high)
    blocks = {-(-num_prompts // (size * batches)) for batches in range(low, high + 1)}
    assert problem.same_number_of_blocks(shape) == (len(blocks) == 1)
    if len(blocks) == 1:
        best = job_throughput(problem, Shape.exactly(size, low))
        other = job_throughput(problem, Shape.exactly(size, rng.randint(low, high)))
        assert other is None or (best is not None and other <= best * (1 + 1e-7))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("name", ["roofline", "flexgen"])
def test_no_block_that_fits_is_larger_than_assumed(name: str, seed: int) -> None:
    # Little but cache, so that the largest block comes close to the bound on prompts.
    rng = random.Random(seed)
    model = slim(plain_model(), num_layers=rng.choice([24, 48]))
    workload = Workload(prompt_len=1000, gen_len=2)
    packed = model.kv_bytes_per_token(compressed=True) * 1002 * model.num_layers
    size = model.total_params * 2.0 + packed * 400
    hardware = machine(
        gpu_bytes=size, cpu_bytes=rng.choice([size / 50, size / 3]), disk_bytes=rng.choice([0, size / 2])
    )
    problem = make_problem(hardware=hardware, model=model, workload=workload, formulation=name, usable_fraction=1.0)
    for switches in problem.switches:
        largest = 0
        step = 2048
        while step:  # how many single-prompt batches fit grows monotonely
            if solve(problem.question(switches, Shape.exactly(1, largest + step), 1)) is not None:
                largest += step
            step //= 2
        most = problem.most_prompts(switches)
        assert largest <= most
        assert largest > 0.5 * most


def test_a_bound_from_coarse_contexts_is_still_a_bound() -> None:
    # One mean context chooses splits that the growing cache makes a little worse than the best: the bound must stay
    # above the best, not above what was found.
    suboptimal = 0
    for seed in range(120):
        problem = any_problem(random.Random(seed), "roofline")
        workload = dataclasses.replace(problem.workload, gen_len=129, prompt_len=16)
        problem = dataclasses.replace(problem, workload=workload, gpu_batch_size=8, num_gpu_batches=3)
        exact = job_throughput(problem, Shape.exactly(8, 3))
        if exact is None:
            continue
        coarse = certify(problem, gap=1e-6, segments=1)
        assert coarse.bound >= exact * (1 - 1e-7)
        assert coarse.best is not None
        suboptimal += coarse.best.throughput < exact * (1 - 1e-6)
    assert suboptimal >= 3


# ------------------------------------------------------------------ latency, to the last step


def test_the_latency_limit_holds_for_the_exact_time_of_every_step() -> None:
    # Weights up the link in 2 s beside CPU attention that grows past it: the mean context says less than the sum of
    # the steps. Between the two lies a limit that a search with one mean context would think it meets.
    hardware = machine(gpu_bytes=3e9, cpu_bytes=60e9, disk_bytes=0, cpu_attention_bytes_per_s=2e9)
    model = plain_model()
    request: dict[str, Any] = {
        "gpu_batch_size": 32,
        "num_gpu_batches": 1,
        "splits": (Split(gpu=0, cpu=1, disk=0), Split(gpu=0, cpu=1, disk=0), Split(gpu=1, cpu=0, disk=0)),
        "switches": {"compress_weights": False, "compress_cache": False, "cpu_attention": True},
    }
    workload = Workload(prompt_len=1, gen_len=129)
    problem = make_problem(hardware=hardware, model=model, workload=workload, usable_fraction=1.0, **request)
    shape = Shape.exactly(32, 1)
    coarse = solve(problem.question(problem.switches[0], shape, 1))
    exact = best_policy_of_shape(problem, problem.switches[0], shape)
    assert coarse is not None
    assert exact is not None
    coarse_s, exact_s = coarse.seconds_per_prompt * 32, exact.cost.latency_s
    assert coarse_s < 0.95 * exact_s
    for limit in ((coarse_s + exact_s) / 2, exact_s * 0.9999):
        with pytest.raises(InfeasibleError, match="the fastest block takes"):
            searched(limited_to(problem, limit), switches=request["switches"])
    result = searched(limited_to(problem, exact_s * 1.0001), switches=request["switches"])
    assert result.estimate.latency_s == pytest.approx(exact_s, rel=1e-9)
    assert result.gap <= GAP


def limited_to(problem: Problem, limit: float) -> Problem:
    return dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, max_latency_s=limit))


def test_a_long_generation_under_a_limit_stays_within_it() -> None:
    result = search(
        hardware=Hardware.from_catalog("rtx3090"),
        model=ModelSpec.from_catalog("opt-30b"),
        workload=Workload(prompt_len=16, gen_len=500, max_latency_s=193.5),
        switches={"compress_weights": True},
        with_prices=False,
    )
    assert result.estimate.latency_s <= 193.5 * (1 + 1e-6)
    assert result.gap <= GAP


# ------------------------------------------------------------------ requests


def test_the_result_says_what_was_used() -> None:
    workload = Workload(prompt_len=100, gen_len=4)
    result = search(hardware=machine(), model=plain_model(), workload=workload, usable_fraction=0.5)
    assert (result.workload, result.formulation, result.usable_fraction) == (workload, "roofline", 0.5)
    assert result.estimate == estimate(
        result.policy, hardware=machine(), model=plain_model(), workload=workload, usable_fraction=0.5
    )
    assert result.estimate.limit_bytes == {"gpu": 8e9, "cpu": 100e9, "disk": 750e9}
    assert result.seconds > 0
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["schema"] == "tierwise.search/1"
    assert data["search"].keys() == {"bound_tok_per_s", "gap", "linear_programs", "seconds"}
    assert data["policy"] == json.loads(json.dumps(result.policy.to_dict()))
    frame = result.to_frame()
    assert list(frame["throughput_tok_per_s"]) == [result.estimate.throughput_tok_per_s]
    assert frame["weights_gpu_percent"][0] == result.policy.weights.gpu * 100


def test_the_default_prompts_and_tokens_are_the_papers() -> None:
    assert search(hardware=machine(), model=plain_model(), with_prices=False).workload == Workload()


def test_top_lists_the_best_of_other_switches_in_order() -> None:
    hardware = machine(gpu_bytes=1.5e9, cpu_bytes=2e9, disk_bytes=4e9)
    keywords: dict[str, Any] = {
        "hardware": hardware,
        "model": plain_model(),
        "workload": Workload(prompt_len=200, gen_len=4),
        "with_prices": False,
    }
    result = search(**keywords, top=20)
    listed = [(result.policy, result.estimate), *result.alternatives]
    chosen = [tuple(getattr(policy, name) for name in SWITCHES) for policy, _ in listed]
    assert len(set(chosen)) == len(chosen) == 8  # overlap is never off unless asked for
    assert "only 8 combinations of switches fit this request, so --top 20 shows 8" in result.notes
    speeds = [cost.throughput_tok_per_s for _, cost in listed]
    assert speeds == sorted(speeds, reverse=True)
    for policy, cost in listed:
        alone = search(**keywords, switches={name: getattr(policy, name) for name in SWITCHES})
        assert alone.estimate.throughput_tok_per_s == pytest.approx(cost.throughput_tok_per_s, rel=GAP)
    assert len(search(**keywords, top=3).alternatives) == 2


def test_a_smaller_gap_is_honoured() -> None:
    keywords: dict[str, Any] = {
        "hardware": Hardware.from_catalog("t4"),
        "model": ModelSpec.from_catalog("opt-6.7b"),
        "with_prices": False,
    }
    rough, fine = search(**keywords, gap=0.05), search(**keywords, gap=1e-5)
    assert rough.gap <= 0.05
    assert fine.gap <= 1.2e-5
    assert rough.linear_programs < fine.linear_programs
    assert rough.bound_tok_per_s >= fine.estimate.throughput_tok_per_s * (1 - 1e-7)
    assert fine.bound_tok_per_s >= rough.estimate.throughput_tok_per_s * (1 - 1e-7)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"gap": 0.0}, "^gap is 0: it must lie between 0 and 1$"),
        ({"gap": 1.0}, "^gap is 1: it must lie between 0 and 1$"),
        ({"top": 0}, "^top is 0: it must be at least 1$"),
        ({"gpu_batch_size": 0}, "^gpu_batch_size is 0: it must be at least 1$"),
        ({"num_gpu_batches": -1}, "^num_gpu_batches is -1: it must be at least 1$"),
        ({"usable_fraction": 1.5}, "^usable_fraction is 1.5"),
        ({"formulation": "flexgenn"}, "unknown formulation 'flexgenn': did you mean 'flexgen'"),
        ({"switches": {"overlaps": True}}, "unknown switch 'overlaps': did you mean 'overlap'"),
        (
            {"formulation": "flexgen", "switches": {"compress_cache": True}},
            "flexgen formulation has no cache compression",
        ),
        ({"workload": Workload(prompt_len=2048, gen_len=1)}, "model 'opt-125m' has 2048 positions"),
        (
            {"formulation": "flexgen", "splits": (Split(gpu=0, cpu=0, disk=1),) * 3},
            "activations on disk are 100.0%: the flexgen formulation keeps none there",
        ),
    ],
)
def test_requests_that_mean_nothing_are_refused(request_: dict[str, Any], message: str) -> None:
    keywords = {"hardware": Hardware.from_catalog("t4"), "model": ModelSpec.from_catalog("opt-125m")} | request_
    with pytest.raises(InputError, match=message):
        search(**keywords)


def test_a_machine_without_cpu_attention_is_searched_without_it() -> None:
    result = search(hardware=machine(cpu_attention_bytes_per_s=None), model=plain_model(), with_prices=False)
    assert not result.policy.cpu_attention
    with pytest.raises(InputError, match=r"needs cpu\.attention_bytes_per_s"):
        search(hardware=machine(cpu_attention_bytes_per_s=None), model=plain_model(), switches={"cpu_attention": True})


# ------------------------------------------------------------------ odd workloads


@pytest.mark.parametrize(
    "workload",
    [
        Workload(prompt_len=1, gen_len=1),
        Workload(prompt_len=1, gen_len=1, num_prompts=1),
        Workload(prompt_len=512, gen_len=1),
        Workload(prompt_len=1, gen_len=64, num_prompts=1),
        Workload(prompt_len=2047, gen_len=1),
        Workload(prompt_len=500, gen_len=1500),
        Workload(prompt_len=16, gen_len=32, num_prompts=1009),
        Workload(prompt_len=16, gen_len=8, num_prompts=100_003),
    ],
    ids=str,
)
@pytest.mark.parametrize("formulation", ["roofline", "flexgen"])
def test_odd_workloads_are_certified(workload: Workload, formulation: str) -> None:
    result = search(
        hardware=Hardware.from_catalog("t4"),
        model=ModelSpec.from_catalog("opt-30b"),
        workload=workload,
        formulation=formulation,
        with_prices=False,
    )
    assert result.gap <= GAP
    assert result.estimate.feasible
    assert result.linear_programs < 3000  # peeling off one shape after another takes ten thousands


def test_a_job_of_one_prompt_is_one_batch_of_one() -> None:
    result = search(
        hardware=Hardware.from_catalog("t4"), model=ModelSpec.from_catalog("opt-30b"), workload=Workload(num_prompts=1)
    )
    assert (result.policy.gpu_batch_size, result.policy.num_gpu_batches) == (1, 1)
    assert result.estimate.blocks == 1


@pytest.mark.parametrize(
    ("hardware", "model", "workload", "sizes"),
    [
        # Each of these once ended in the solver's "Unknown": barely infeasible programs, badly scaled.
        ("v100-16gb", "opt-6.7b", Workload(prompt_len=1, gen_len=128), {"gpu_memory": 1082699155.7405388}),
        (
            "v100-16gb",
            "opt-175b",
            Workload(prompt_len=512, gen_len=500, max_latency_s=56485.66340990992),
            {"gpu_memory": 25972980203.915974},
        ),
        (
            "rtx5090",
            "opt-66b",
            Workload(prompt_len=1500, gen_len=500, num_prompts=1, max_latency_s=2788.849710271499),
            {},
        ),
    ],
)
def test_the_edge_of_feasibility_has_an_answer(
    hardware: str, model: str, workload: Workload, sizes: dict[str, float]
) -> None:
    keywords: dict[str, Any] = {
        "hardware": with_overrides(Hardware.from_catalog(hardware), **sizes),
        "model": ModelSpec.from_catalog(model),
        "workload": workload,
        "with_prices": False,
    }
    try:
        result = search(**keywords)
    except InfeasibleError:
        return
    assert result.estimate.feasible
    assert result.gap <= GAP


# ------------------------------------------------------------------ nothing for nothing


def test_no_tensor_lies_on_disk_for_nothing() -> None:
    # With less disk than the policy uses, it is slower; that is what makes the bytes on disk worth their place.
    for name, model in (("t4", "opt-175b"), ("rtx3090", "opt-175b"), ("t4-flexgen", "opt-175b")):
        hardware = Hardware.from_catalog(name)
        keywords: dict[str, Any] = {"model": ModelSpec.from_catalog(model), "with_prices": False}
        result = search(hardware=hardware, **keywords)
        used = result.estimate.peak_bytes["disk"]
        if used == 0:
            continue
        policy = result.policy
        shape: dict[str, Any] = {
            "gpu_batch_size": policy.gpu_batch_size,
            "num_gpu_batches": policy.num_gpu_batches,
            "switches": {switch: getattr(policy, switch) for switch in SWITCHES},
        }
        tight = with_overrides(hardware, disk=used * 0.98 / result.usable_fraction)
        try:
            squeezed = search(hardware=tight, **shape, **keywords)
        except InfeasibleError:
            continue
        assert squeezed.estimate.throughput_tok_per_s < result.estimate.throughput_tok_per_s * (1 - 1e-7)


def test_what_fits_the_gpu_is_on_the_gpu() -> None:
    result = search(hardware=machine(gpu_bytes=1e12), model=plain_model(), workload=Workload(num_prompts=8))
    assert [split.gpu for split in (result.policy.weights, result.policy.cache, result.policy.activations)] == [1, 1, 1]


# ------------------------------------------------------------------ the whole catalogue


@pytest.mark.parametrize("name", catalog_names())
def test_every_machine_of_the_catalogue_gets_a_certified_answer(name: str) -> None:
    for model in ("opt-1.3b", "opt-30b", "opt-175b"):
        began = time.perf_counter()
        result = search(hardware=Hardware.from_catalog(name), model=ModelSpec.from_catalog(model), top=2)
        assert result.gap <= GAP
        assert result.estimate.feasible
        assert result.alternatives
        assert result.prices
        assert result.linear_programs < 5000
        assert time.perf_counter() - began < 30  # a second is usual: this is for a search that has lost its way


def test_a_branch_without_a_policy_has_no_bound() -> None:
    problem = make_problem(
        hardware=machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6), model=plain_model(), workload=Workload()
    )
    certificate = certify(problem, gap=GAP)
    assert (certificate.best, certificate.bound, certificate.gap) == (None, 0.0, 0.0)


def test_policies_are_plain_data() -> None:
    policy = search(hardware=machine(), model=plain_model(), with_prices=False).policy
    assert isinstance(policy, Policy)
    assert json.loads(json.dumps(policy.to_dict())) == policy.to_dict()
    assert logarithmic(random.Random(0), 1, 1) == 1
