"""Shadow prices against finite differences of the same programs, and of whole searches."""

from dataclasses import replace

import pytest

from costmodel import Hardware, ModelSpec, Workload, search
from costmodel.formulations.base import SWITCHES
from costmodel.linear_program import solve
from costmodel.policy import TIERS
from costmodel.search import make_problem
from costmodel.search.branch_and_bound import Candidate, Problem, certify
from costmodel.search.prices import price_question, shadow_prices
from costmodel.units import GiB

CASES = {
    "t4 opt-175b": ("t4", "opt-175b", "roofline"),
    "t4 opt-30b": ("t4", "opt-30b", "roofline"),
    "rtx4090 opt-66b": ("rtx4090", "opt-66b", "roofline"),
    "t4-flexgen opt-30b, published model": ("t4-flexgen", "opt-30b", "flexgen"),
}


def solved(case: str) -> tuple[Problem, Candidate]:
    machine, model, formulation = CASES[case]
    problem = make_problem(
        hardware=Hardware.from_catalog(machine),
        model=ModelSpec.from_catalog(model),
        workload=Workload(),
        formulation=formulation,
    )
    best = certify(problem, gap=1e-3).best
    assert best is not None
    return problem, best


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tier", TIERS)
def test_a_dual_lies_between_the_differences_on_both_sides(case: str, tier: str) -> None:
    """The optimal time is convex in a capacity, so its slope lies between the one-sided differences."""
    problem, best = solved(case)
    question = price_question(problem, best)
    base = solve(question)
    assert base is not None
    step = question.limits[tier] * 1e-4

    def seconds(change: float) -> float:
        found = solve(replace(question, limits={**question.limits, tier: question.limits[tier] + change}))
        assert found is not None
        return found.seconds

    saved_by_more, lost_by_less = base.seconds - seconds(step), seconds(-step) - base.seconds
    noise = base.seconds * 1e-8
    assert saved_by_more - noise <= base.prices_s_per_byte[tier] * step <= lost_by_less + noise
    assert base.prices_s_per_byte[tier] >= 0


@pytest.mark.parametrize("case", CASES)
def test_the_printed_gain_is_the_dual_for_one_gib(case: str) -> None:
    problem, best = solved(case)
    question = price_question(problem, best)
    base = solve(question)
    assert base is not None
    prices = {price.what: price for price in shadow_prices(problem, best)}
    share = problem.limits["gpu"] / problem.hardware.capacity_bytes["gpu"]
    assert prices["GPU memory"].gain == pytest.approx(
        base.prices_s_per_byte["gpu"] * share * GiB / base.seconds, rel=1e-9
    )
    assert [price.gain for price in prices.values()] == sorted((p.gain for p in prices.values()), reverse=True)


@pytest.mark.parametrize(
    ("what", "path", "raise_by"),
    [
        ("disk read", "links.disk_read.bytes_per_s", 1e9),
        ("disk write", "links.disk_write.bytes_per_s", 1e9),
        ("GPU memory bandwidth", "gpu.memory_bytes_per_s", 0.1 * 320e9 * 0.8),
        ("CPU attention rate", "cpu.attention_bytes_per_s", 0.1 * 128e9 * 0.34),
    ],
)
def test_a_rate_is_priced_by_a_machine_that_has_it(what: str, path: str, raise_by: float) -> None:
    """Against a machine whose number was written anew, not raised: the same program, built from scratch."""
    problem, best = solved("t4 opt-175b")
    (price,) = (price for price in shadow_prices(problem, best) if price.what == what)
    machine = problem.hardware
    old = {
        "links.disk_read.bytes_per_s": 2e9,
        "links.disk_write.bytes_per_s": 1e9,
        "gpu.memory_bytes_per_s": 256e9,
        "cpu.attention_bytes_per_s": 128e9 * 0.34,
    }[path]
    faster = machine.replace(path, old + raise_by, source="test")
    question = price_question(problem, best)
    base, raised = solve(question), solve(replace(question, case=replace(question.case, hardware=faster)))
    assert base is not None
    assert raised is not None
    assert price.gain == pytest.approx(base.seconds / raised.seconds - 1, rel=1e-6, abs=1e-9)
    assert price.gain >= 0


def test_more_memory_brings_about_what_its_price_says() -> None:
    """Whole searches with 4 GiB more and less at the priced GPU batch size and switches: the price is a slope."""
    machine, model = Hardware.from_catalog("t4"), ModelSpec.from_catalog("opt-175b")
    first = search(hardware=machine, model=model)
    switches = {name: getattr(first.policy, name) for name in SWITCHES}
    memory = machine.gpu.memory_bytes.effective

    def throughput(capacity: float) -> float:
        found = search(
            hardware=machine.replace("gpu.memory_bytes", capacity, source="test"),
            model=model,
            gpu_batch_size=first.policy.gpu_batch_size,
            switches=switches,
            gap=1e-4,
            with_prices=False,
        )
        return found.estimate.throughput_tok_per_s

    now = throughput(memory)
    price = next(price.gain for price in first.prices if price.what == "GPU memory")
    # Throughput is concave in the capacity there, up to the rounding of the number of batches.
    rounding = 2e-3
    assert throughput(memory + 4 * GiB) / now - 1 <= 4 * price + rounding
    assert 1 - throughput(memory - 1 * GiB) / now >= price - rounding


def test_the_published_constants_have_prices_too() -> None:
    problem, best = solved("t4-flexgen opt-30b, published model")
    found = {price.what for price in shadow_prices(problem, best) if price.method == "solved again"}
    assert found == {
        "disk read",
        "disk write",
        "host link, each way",
        "GPU memory bandwidth",
        "GPU matrix rate",
        "CPU attention rate",
    }


def test_a_price_reads_as_a_sentence() -> None:
    result = search(hardware=Hardware.from_catalog("t4"), model=ModelSpec.from_catalog("opt-30b"))
    sentence = next(price.sentence() for price in result.prices if price.what == "disk read")
    assert sentence.startswith("1 GB/s more disk read: +")
    assert sentence.endswith(" % throughput")
