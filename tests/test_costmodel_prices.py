"""Shadow prices against finite differences of the same question, and against searching again."""

import dataclasses
import random
from typing import Any

import pytest

from costmodel.formulations.base import Shape, Switches
from costmodel.hardware import Hardware, Links
from costmodel.linear_program import Question, Solution, solve
from costmodel.model import ModelSpec
from costmodel.policy import TIERS
from costmodel.search import make_problem, search
from costmodel.search.branch_and_bound import Candidate
from costmodel.search.prices import Price, price_question, shadow_prices
from costmodel.search.problem import Problem
from costmodel.workload import Workload
from tests.instances import any_problem, any_shape, inside, link, machine, plain_model

GIB = 2**30


def seconds_with(question: Question, tier: str, limit: float) -> float | None:
    solution = solve(dataclasses.replace(question, limits={**question.limits, tier: limit}))
    return None if solution is None else solution.seconds


@pytest.mark.parametrize("name", ["roofline", "flexgen"])
@pytest.mark.parametrize("single", [True, False], ids=["single shape", "range"])
def test_the_dual_of_a_capacity_is_the_slope_of_the_time(name: str, single: bool) -> None:
    binding = 0
    for seed in range(60):
        rng = random.Random(seed)
        problem = any_problem(rng, name)
        shape = any_shape(rng, most=20)
        question = problem.question(problem.switches[0], inside(rng, shape) if single else shape, 3)
        base = solve(question)
        if base is None:
            continue
        for tier in TIERS:
            price, limit = base.prices_s_per_byte[tier], question.limits[tier]
            assert price >= 0
            step = limit * 1e-4
            more, less = (seconds_with(question, tier, limit + sign * step) for sign in (1, -1))
            assert more is not None
            gained = (base.seconds - more) / step
            lost = float("inf") if less is None else (less - base.seconds) / step
            # The slope to either side of a kink differs; a dual is one of them or lies between (over a range of
            # shapes the limit multiplies a variable, so the time bends a little between kinks).
            bend = 1e-3 * max(price, gained) + 1e-7 * base.seconds / limit
            assert min(gained, lost) - bend <= price <= max(gained, lost) + bend, (seed, tier)
            binding += price > 1e-3 * base.seconds / limit
    assert binding >= 10  # the test is about prices that are not zero


def slow_link() -> Links:
    return Links(cpu_to_gpu=link(2e9), gpu_to_cpu=link(2e9), disk_read=link(2e9), disk_write=link(1e9))


def paper_like() -> tuple[Problem, Candidate]:
    """A machine on which GPU memory, the link and the CPU's attention all matter."""
    problem = make_problem(
        hardware=machine(gpu_bytes=1.2e9, cpu_bytes=40e9, disk_bytes=0, links=slow_link()),
        model=plain_model(),
        workload=Workload(prompt_len=500, gen_len=9),
        switches={"compress_weights": False, "compress_cache": False, "cpu_attention": True},
        num_gpu_batches=4,
    )
    (switches,) = problem.switches
    shape = Shape.exactly(16, 4)
    solution = solve(problem.question(switches, shape, 1000))
    assert solution is not None
    return problem, Candidate(throughput=1.0, switches=switches, shape=shape, splits=solution.splits())


def gains(prices: tuple[Price, ...]) -> dict[str, float]:
    return {price.what: price.gain for price in prices}


def resolved(problem: Problem, candidate: Candidate, hardware: Hardware) -> float:
    """The relative change of throughput at the candidate's shape on another machine."""
    times = []
    for machine_ in (problem.hardware, hardware):
        limits = {tier: size * problem.usable_fraction for tier, size in machine_.capacity_bytes.items()}
        other = dataclasses.replace(problem, hardware=machine_, limits=limits)
        solution = solve(other.question(candidate.switches, candidate.shape, 4))
        assert solution is not None
        times.append(solution.seconds)
    return times[0] / times[1] - 1


@pytest.mark.parametrize(
    ("what", "amount", "paths", "step", "share"),
    [
        ("disk read", "1 GB/s", ["links.disk_read.bytes_per_s"], 1e9, 0.0),
        ("disk write", "1 GB/s", ["links.disk_write.bytes_per_s"], 1e9, 0.0),
        (
            "host link, each way",
            "1 GB/s",
            ["links.cpu_to_gpu.bytes_per_s", "links.gpu_to_cpu.bytes_per_s"],
            1e9,
            0.0,
        ),
        ("GPU memory bandwidth", "10 %", ["gpu.memory_bytes_per_s"], 0.0, 0.1),
        ("GPU matrix and attention rate", "10 %", ["gpu.matmul_flops_per_s", "gpu.attention_flops_per_s"], 0.0, 0.1),
        ("CPU attention rate", "10 %", ["cpu.attention_bytes_per_s"], 0.0, 0.1),
    ],
)
def test_the_price_of_a_rate_is_what_solving_again_gains(
    what: str, amount: str, paths: list[str], step: float, share: float
) -> None:
    problem, candidate = paper_like()
    (price,) = [price for price in shadow_prices(problem, candidate) if price.what == what]
    hardware = problem.hardware
    for path in paths:
        rates: Any = hardware
        for part in path.split("."):
            rates = getattr(rates, part)
        hardware = hardware.raised(path, step + share * rates.effective)
    assert (price.amount, price.method) == (amount, "solved again")
    assert price.gain == pytest.approx(resolved(problem, candidate, hardware), rel=1e-6, abs=1e-9)
    assert price.gain >= -1e-12


def test_some_rates_matter_and_others_do_not() -> None:
    found = gains(shadow_prices(*paper_like()))
    assert found["host link, each way"] > 0.005
    assert found["CPU attention rate"] > 0.005
    assert found["disk read"] == pytest.approx(0, abs=1e-9)
    assert found["disk write"] == pytest.approx(0, abs=1e-9)


def test_a_gib_of_memory_is_priced_by_its_usable_part() -> None:
    problem, candidate = paper_like()
    prices = {price.what: price for price in shadow_prices(problem, candidate)}
    price = prices["GPU memory"]
    assert (price.amount, price.method) == ("1 GiB", "dual of the capacity")
    # A hundredth of a GiB, of which 0.9 is usable, gains a hundredth of the price.
    small = problem.hardware.raised("gpu.memory_bytes", 0.01 * GIB)
    assert resolved(problem, candidate, small) * 100 == pytest.approx(price.gain, rel=0.02)
    assert price.gain > 0.05
    assert prices["CPU memory"].gain == pytest.approx(0, abs=1e-9)


def test_prices_are_listed_from_the_largest_gain_down() -> None:
    prices = shadow_prices(*paper_like())
    assert [price.gain for price in prices] == sorted((price.gain for price in prices), reverse=True)
    assert {price.what for price in prices} == {
        "GPU memory",
        "CPU memory",
        "disk",
        "disk read",
        "disk write",
        "host link, each way",
        "GPU memory bandwidth",
        "GPU matrix and attention rate",
        "CPU attention rate",
    }


def test_a_rate_that_the_machine_lacks_has_no_price() -> None:
    result = search(hardware=machine(cpu_attention_bytes_per_s=None), model=plain_model())
    assert "CPU attention rate" not in gains(result.prices)


def test_the_published_models_own_constants_are_raised() -> None:
    # t4-flexgen carries them, so a faster catalogue disk would change nothing: its constant is what must be raised.
    problem = make_problem(
        hardware=Hardware.from_catalog("t4-flexgen"),
        model=ModelSpec.from_catalog("opt-175b"),
        workload=Workload(),
        formulation="flexgen",
        switches={"compress_weights": False},
        num_gpu_batches=2,
    )
    (switches,) = problem.switches
    shape = Shape.exactly(16, 2)
    solution = solve(problem.question(switches, shape, 1))
    assert solution is not None
    candidate = Candidate(throughput=1.0, switches=switches, shape=shape, splits=solution.splits())
    found = gains(shadow_prices(problem, candidate))
    faster = problem.hardware.raised("flexgen_constants.disk_to_cpu_bytes_per_s", 1e9)
    assert found["disk read"] == pytest.approx(resolved(problem, candidate, faster), rel=1e-6)
    assert found["disk read"] > 0.5


@pytest.mark.parametrize("given", [None, 3])
def test_the_number_of_batches_is_free_unless_it_was_given(given: int | None) -> None:
    problem = make_problem(
        hardware=Hardware.from_catalog("t4"),
        model=ModelSpec.from_catalog("opt-30b"),
        workload=Workload(),
        num_gpu_batches=given,
    )
    shape = Shape.exactly(32, 3)
    switches = Switches(compress_weights=True, compress_cache=True, cpu_attention=False, overlap=True)
    candidate = Candidate(throughput=1.0, switches=switches, shape=shape, splits=_everywhere(problem, switches, shape))
    priced = price_question(problem, candidate).case.shape
    assert (priced.gpu_batch_low, priced.gpu_batch_high) == (32, 32)
    assert (priced.batches_low == priced.batches_high == 3) == (given is not None)
    assert priced.batches_low <= 3 <= priced.batches_high


def _everywhere(problem: Problem, switches: Switches, shape: Shape) -> Any:
    solution = solve(problem.question(switches, shape, 1))
    assert isinstance(solution, Solution)
    return solution.splits()


@pytest.mark.parametrize(
    ("gain", "words"), [(0.021, "+2.1 % throughput"), (0.0, "+0.0 % throughput"), (1e-9, "+0.0 % throughput")]
)
def test_a_price_in_words(gain: float, words: str) -> None:
    price = Price(what="GPU memory", amount="1 GiB", gain=gain, method="dual of the capacity")
    assert price.sentence() == f"1 GiB more GPU memory: {words}"
    assert price.to_dict() == {"what": "GPU memory", "amount": "1 GiB", "gain": gain, "method": "dual of the capacity"}


def test_a_search_can_leave_prices_out() -> None:
    keywords: dict[str, Any] = {"hardware": machine(), "model": plain_model(), "workload": Workload(num_prompts=4)}
    assert search(**keywords, with_prices=False).prices == ()
    assert len(search(**keywords).prices) == 9
