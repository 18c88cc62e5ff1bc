"""The published model: its released answers, its formulas written a second time, its limits."""

import dataclasses
import json
import math
import random
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.estimate import Estimate, case_of, estimate
from costmodel.formulations import get
from costmodel.formulations.base import Shape, Switches, amounts_of
from costmodel.formulations.flexgen import Constants
from costmodel.hardware import Hardware
from costmodel.linear_program import solve
from costmodel.model import ModelSpec
from costmodel.policy import Policy, Split
from costmodel.search import make_problem, search
from costmodel.workload import Workload
from tests.instances import any_splits, link, machine, plain_model, quantity, rate

GIB = 2**30
REFERENCE = json.loads(
    (resources.files("costmodel.catalog") / "published" / "flexgen_cost_model_reference.json").read_text("utf-8")
)
ONLY = {"compress_cache": False, "cpu_attention": True, "overlap": True}

# The constants that the authors released for their T4 machine: GiB/s and TFLOP/s.
RELEASED_GIB_PER_S = {
    "cpu_to_gpu_bytes_per_s": 12.89,
    "gpu_to_cpu_cache_bytes_per_s": 0.97,
    "gpu_to_cpu_hidden_bytes_per_s": 4.82,
    "disk_to_cpu_bytes_per_s": 0.473,
    "cpu_to_disk_cache_prefill_bytes_per_s": 0.746,
    "cpu_to_disk_hidden_prefill_bytes_per_s": 2.015,
    "cpu_to_disk_decode_bytes_per_s": 2.015,
}
RELEASED_TFLOP_PER_S = {
    "matmul_prefill_flops_per_s": 21.24,
    "matmul_decode_flops_per_s": 4.3,
    "attention_prefill_flops_per_s": 9.97,
    "attention_decode_flops_per_s": 0.079,
    "cpu_attention_flops_per_s": 0.0123,
}


def paper_machine(case: dict[str, Any]) -> Hardware:
    """t4-flexgen with the case's sizes."""
    hardware = Hardware.from_catalog("t4-flexgen")
    for tier in ("gpu", "cpu", "disk"):
        hardware = hardware.replace(f"{tier}.memory_bytes", case[f"{tier}_gib"] * GIB, source="the case")
    return hardware


def evaluated(case: dict[str, Any], policy: Policy) -> Estimate:
    return estimate(
        policy,
        hardware=paper_machine(case),
        model=ModelSpec.from_catalog(case["model"]),
        workload=Workload(prompt_len=case["prompt_len"], gen_len=case["gen_len"]),
        formulation="flexgen",
        usable_fraction=case.get("usable_fraction", 0.8),
    )


def named(case: dict[str, Any]) -> str:
    return f"{case['model']}-{case['prompt_len']}+{case['gen_len']}-{case['gpu_batch_size']}x{case['num_gpu_batches']}"


def gpu_peaks_gib(policy: Policy, case: dict[str, Any]) -> list[float]:
    """The GPU's peaks in prefill and in decode."""
    workload = Workload(prompt_len=case["prompt_len"], gen_len=case["gen_len"])
    inputs = case_of(policy, paper_machine(case), ModelSpec.from_catalog(case["model"]), workload)
    peaks = get("flexgen").peaks(inputs, amounts_of(policy))
    return [float(peak.bytes) / GIB for peak in peaks if peak.tier == "gpu"]


# ------------------------------------------------------------------ released answers


def test_the_reference_has_its_twenty_cases() -> None:
    assert (len(REFERENCE["estimate"]), len(REFERENCE["optimum"])) == (12, 8)
    assert sum(case["feasible"] for case in REFERENCE["optimum"]) == 6


def test_the_catalogue_carries_the_released_constants() -> None:
    constants = dataclasses.asdict(Constants.of(Hardware.from_catalog("t4-flexgen")))
    expected = {name: value * GIB for name, value in RELEASED_GIB_PER_S.items()}
    expected |= {name: value * 1e12 for name, value in RELEASED_TFLOP_PER_S.items()}
    assert constants == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("case", REFERENCE["estimate"], ids=named)
def test_a_fixed_policy_costs_what_the_released_solver_says(case: dict[str, Any]) -> None:
    policy = Policy.from_percent(
        tuple(case["percent"]),
        gpu_batch_size=case["gpu_batch_size"],
        num_gpu_batches=case["num_gpu_batches"],
        compress_weights=case["compress_weight"],
        **ONLY,
    )
    cost = evaluated(case, policy)
    assert cost.prefill_s == pytest.approx(case["prefill_s"], rel=1e-6)
    assert cost.decode_s == pytest.approx(case["decode_s"], rel=1e-6)
    assert cost.throughput_tok_per_s == pytest.approx(case["throughput"], rel=1e-6)
    prefill, decode = gpu_peaks_gib(policy, case)
    assert prefill == pytest.approx(case["gpu_peak_prefill_gib"], rel=1e-6)
    assert decode == pytest.approx(case["gpu_peak_decode_gib"], rel=1e-6)
    assert cost.peak_bytes["gpu"] / GIB == pytest.approx(max(prefill, decode), rel=1e-12)


@pytest.mark.parametrize("case", REFERENCE["optimum"], ids=named)
def test_the_optimum_of_a_shape_is_no_worse_than_the_released_solver(case: dict[str, Any]) -> None:
    problem = make_problem(
        hardware=paper_machine(case),
        model=ModelSpec.from_catalog(case["model"]),
        workload=Workload(prompt_len=case["prompt_len"], gen_len=case["gen_len"]),
        formulation="flexgen",
        usable_fraction=case["usable_fraction"],
        switches={"compress_weights": case["compress_weight"]},
    )
    (switches,) = problem.switches
    shape = Shape.exactly(case["gpu_batch_size"], case["num_gpu_batches"])
    solution = solve(problem.question(switches, shape, 1))
    assert (solution is not None) == case["feasible"]
    if solution is None:
        return
    cost = evaluated(case, problem.policy(switches, shape, solution.splits()))
    assert cost.feasible
    assert cost.throughput_tok_per_s >= case["throughput"] * (1 - 1e-6)
    assert case["gen_len"] / solution.seconds_per_prompt == pytest.approx(cost.throughput_tok_per_s, rel=1e-6)


@pytest.mark.parametrize("case", [case for case in REFERENCE["optimum"] if case["feasible"]], ids=named)
def test_the_released_split_costs_what_the_released_solver_says(case: dict[str, Any]) -> None:
    # Its fractions are printed to eight decimals, and may sum to a little over 1.
    splits = [Split(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu)) for gpu, cpu in (case[kind] for kind in KINDS)]
    policy = Policy(
        **dict(zip(KINDS, splits, strict=True)),
        gpu_batch_size=case["gpu_batch_size"],
        num_gpu_batches=case["num_gpu_batches"],
        compress_weights=case["compress_weight"],
        **ONLY,
    )
    cost = evaluated(case, policy)
    assert cost.prefill_s == pytest.approx(case["prefill_s"], rel=1e-6)
    assert cost.decode_s == pytest.approx(case["decode_s"], rel=1e-6)
    assert cost.throughput_tok_per_s == pytest.approx(case["throughput"], rel=1e-6)
    assert max(gpu_peaks_gib(policy, case)) == pytest.approx(
        max(case["gpu_peak_prefill_gib"], case["gpu_peak_decode_gib"]), rel=1e-6
    )


KINDS = ("weights", "cache", "activations")


def test_the_search_beats_where_the_released_search_stopped() -> None:
    # It stops at the first dip, 7.09 token/s; its own linear programs reach at least 7.13.
    result = search(
        hardware=paper_machine({"gpu_gib": 16, "cpu_gib": 200, "disk_gib": 1500}),
        model=ModelSpec.from_catalog("opt-30b"),
        workload=Workload(prompt_len=512, gen_len=32),
        formulation="flexgen",
        switches={"compress_weights": False},
    )
    assert result.usable_fraction == 0.8  # the released solver's, without asking
    assert result.estimate.throughput_tok_per_s >= 7.13
    assert result.estimate.feasible
    assert result.gap <= 1e-3


# ------------------------------------------------------------------ the formulas, written a second time


def published_seconds(policy: Policy, model: ModelSpec, workload: Workload) -> tuple[float, float]:
    """Prefill and decode seconds of a block, from the paper's appendix, term by term."""
    gib, tera = GIB, 1e12
    s, n, h1, h2, layers = workload.prompt_len, workload.gen_len, model.hidden_size, model.ffn_size, model.num_layers
    gbs, bls = policy.gpu_batch_size, policy.gpu_batch_size * policy.num_gpu_batches
    wc, wd = policy.weights.cpu, policy.weights.disk
    cg, cc, cd = policy.cache.gpu, policy.cache.cpu, policy.cache.disk
    hc, hd = policy.activations.cpu, policy.activations.disk
    wi = (8 * h1**2 + 4 * h1 * h2) / (4 if policy.compress_weights else 1)

    ctog = (wi * (wc + wd) + 2 * s * h1 * bls * (hc + hd)) / (12.89 * gib)
    gtoc = 4 * (s + 1) * h1 * bls * (cc + cd) / (0.97 * gib) + 2 * s * h1 * bls * (hc + hd) / (4.82 * gib)
    dtoc = (wi * wd + 2 * s * h1 * bls * hd) / (0.473 * gib)
    ctod = 4 * (s + 1) * h1 * bls * cd / (0.746 * gib) + 2 * s * h1 * bls * hd / (2.015 * gib)
    comp = bls * (8 * s * h1**2 + 4 * s * h1 * h2) / (21.24 * tera) + 4 * bls * s**2 * h1 / (9.97 * tera)
    prefill = max(ctog + dtoc, gtoc + ctod, comp)

    a, b = max(0, math.log2(64 / gbs)), max(0, math.log2(4096 / h1))
    on_cpu = 0.0123 * tera * max(0.1, 1 + 0.0168 * a * b - 0.0328 * a - 0.0621 * b)
    ctog = (wi * (wc + wd) + 2 * h1 * bls * (hc + hd)) / (12.89 * gib)
    gtoc = 2 * h1 * bls * (hc + hd) / (4.82 * gib)
    dtoc = (4 * bls * (s + n / 2) * h1 * cd + 2 * h1 * bls * hd) / (0.473 * gib) + wi * wd / (0.95 * 0.473 * gib)
    ctod = (4 * bls * h1 * cd + 2 * h1 * bls * hd) / (2.015 * gib)
    comp = (
        bls * (8 * h1**2 + 4 * h1 * h2) / (4.3 * tera)
        + 4 * bls * (s + n / 2) * h1 * cg / (0.079 * tera)
        + 4 * bls * (s + n / 2) * h1 * (cc + cd) / on_cpu
    )
    decode = ctog + max(gtoc, dtoc, ctod, comp)
    return layers * prefill, layers * (n - 1) * decode


def published_peaks(policy: Policy, model: ModelSpec, workload: Workload) -> dict[str, float]:
    """The fullest moment of each tier in bytes, from the paper's appendix."""
    s, n, h1, h2 = workload.prompt_len, workload.gen_len, model.hidden_size, model.ffn_size
    layers, nh = model.num_layers, model.num_heads
    gbs, bls = policy.gpu_batch_size, policy.gpu_batch_size * policy.num_gpu_batches
    wg, wc, wd = policy.weights.gpu, policy.weights.cpu, policy.weights.disk
    cg, cc, cd = policy.cache.gpu, policy.cache.cpu, policy.cache.disk
    hg, hc, hd = policy.activations.gpu, policy.activations.cpu, policy.activations.disk
    wi = (8 * h1**2 + 4 * h1 * h2) / (4 if policy.compress_weights else 1)

    i_p = 8 * gbs * s * h1 + gbs * (2 * s * h1 + 2 * nh * s**2) + 2 * gbs * s * h1 + 4 * gbs * s * h1
    i_p += 2 * gbs * s * h2 + 2 * gbs * s * h1
    home = wi * layers * wg + 4 * (s + n) * h1 * bls * layers * cg + 2 * wi * (1 - wg)
    prefill = home + 2 * s * h1 * bls * hg + 2 * s * h1 * gbs * (1 - hg) + i_p
    i_g = 8 * gbs * h1 + gbs * (2 * h1 + 2 * (s + n) * h1 + 2 * nh * (s + n)) * cg
    i_g += gbs * (2 * (s + n) * h1 + 2 * h1) * cg + 4 * gbs * h1 + 2 * gbs * h2 + 2 * gbs * h1
    decode = home + 2 * h1 * bls * hg + 2 * h1 * gbs * (1 - hg) + 4 * gbs * (s + n) * h1 * cg + i_g
    cpu_prefill = wi * layers * wc + 2 * s * h1 * bls * hc + 4 * s * h1 * bls * layers * cc
    cpu_prefill += wi * (1 - wg) + 2 * s * h1 * gbs * (1 - hg)
    cpu_decode = wi * layers * wc + 2 * h1 * bls * hc + 4 * (s + n) * h1 * bls * layers * cc + wi * wd
    cpu_decode += 4 * h1 * gbs * hd + 8 * (s + n) * h1 * gbs * cd + 2 * nh * (s + n) * gbs + 2 * h1 * gbs
    disk = wi * layers * wd + 2 * s * h1 * bls * hd + 4 * (s + n) * h1 * bls * layers * cd
    return {"gpu": max(prefill, decode), "cpu": max(cpu_prefill, cpu_decode), "disk": disk}


@settings(max_examples=100)
@given(
    rng=st.randoms(use_true_random=False),
    name=st.sampled_from(["opt-125m", "opt-1.3b", "opt-6.7b", "opt-30b", "opt-175b"]),
    prompt_len=st.integers(1, 1000),
    gen_len=st.integers(1, 1000),
    shape=st.tuples(st.integers(1, 300), st.integers(1, 40)),
    compress_weights=st.booleans(),
)
def test_any_policy_costs_what_the_papers_appendix_says(
    rng: random.Random,
    name: str,
    prompt_len: int,
    gen_len: int,
    shape: tuple[int, int],
    compress_weights: bool,
) -> None:
    model, workload = ModelSpec.from_catalog(name), Workload(prompt_len=prompt_len, gen_len=gen_len)
    weights, cache, activations = any_splits(rng, disk_activations=False)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=shape[0],
        num_gpu_batches=shape[1],
        compress_weights=compress_weights,
        **ONLY,
    )
    hardware = Hardware.from_catalog("t4-flexgen")
    cost = estimate(policy, hardware=hardware, model=model, workload=workload, formulation="flexgen")
    prefill_s, decode_s = published_seconds(policy, model, workload)
    assert cost.prefill_s == pytest.approx(prefill_s, rel=1e-9)
    assert cost.decode_s == pytest.approx(decode_s, rel=1e-9)
    assert cost.throughput_tok_per_s == pytest.approx(policy.block_size * gen_len / (prefill_s + decode_s), rel=1e-9)
    assert cost.peak_bytes == pytest.approx(published_peaks(policy, model, workload), rel=1e-9)


def test_compression_divides_weights_by_four_and_costs_nothing() -> None:
    shape: dict[str, Any] = {"gpu_batch_size": 4, "num_gpu_batches": 1, **ONLY}
    model = plain_model()
    # Everything that is not weights is on the GPU, and prefill is bound by streaming the weights.
    plain = Policy.from_percent((0, 100, 100, 0, 100, 0), **shape)
    hardware, workload = machine(links=None), Workload(prompt_len=1, gen_len=1)
    seconds = [
        estimate(policy, hardware=hardware, model=model, workload=workload, formulation="flexgen").prefill_s
        for policy in (plain, plain.replace(compress_weights=True))
    ]
    assert seconds[0] == pytest.approx(24 * (8 + 16) * 1024**2 / 10e9)
    assert seconds[1] == pytest.approx(seconds[0] / 4)


# ------------------------------------------------------------------ constants and limits


def test_another_machine_derives_its_constants_and_says_so() -> None:
    links = machine().links
    links = dataclasses.replace(
        links,
        gpu_to_cpu=link(8e9, cache_bytes_per_s=3e9),
        disk_write=link(1e9, cache_bytes_per_s=0.5e9),
    )
    hardware = machine(links=links, matmul=rate(20e12, (1, 1e12), (100, 15e12)), memory_bytes_per_s=250e9)
    assert Constants.of(hardware) == Constants(
        cpu_to_gpu_bytes_per_s=10e9,
        gpu_to_cpu_cache_bytes_per_s=3e9,
        gpu_to_cpu_hidden_bytes_per_s=8e9,
        disk_to_cpu_bytes_per_s=2e9,
        cpu_to_disk_cache_prefill_bytes_per_s=0.5e9,
        cpu_to_disk_hidden_prefill_bytes_per_s=1e9,
        cpu_to_disk_decode_bytes_per_s=0.5e9,
        matmul_prefill_flops_per_s=20e12,
        matmul_decode_flops_per_s=20e12,
        attention_prefill_flops_per_s=20e12,
        attention_decode_flops_per_s=250e9,  # one multiply-add for each 2-byte value
        cpu_attention_flops_per_s=20e9,
    )
    (note,) = get("flexgen").notes(hardware)
    assert "derived from the rates of test-machine" in note
    (note,) = get("flexgen").notes(Hardware.from_catalog("t4-flexgen"))
    assert "released with the published model" in note


def test_a_machine_without_cpu_attention_attends_at_the_links_rate() -> None:
    assert Constants.of(machine(cpu_attention_bytes_per_s=None)).cpu_attention_flops_per_s == 10e9


@pytest.mark.parametrize(
    ("gpu_batch_size", "hidden_size", "factor"),
    [
        (64, 4096, 1.0),
        (1024, 16384, 1.0),
        (32, 4096, 1 - 0.0328),
        (64, 2048, 1 - 0.0621),
        (16, 1024, 1 + 0.0168 * 2 * 2 - 0.0328 * 2 - 0.0621 * 2),
        (1, 2, 1 + 0.0168 * 6 * 11 - 0.0328 * 6 - 0.0621 * 11),
        (64, 1, 1 - 0.0621 * 12),
    ],
)
def test_cpu_attention_is_slower_for_small_batches_and_narrow_models(
    gpu_batch_size: int, hidden_size: int, factor: float
) -> None:
    constants = Constants.of(machine(cpu_attention_bytes_per_s=1e9))
    assert constants.cpu_attention(gpu_batch_size, gpu_batch_size, hidden_size) == pytest.approx(factor * 1e9)


@given(low=st.integers(1, 200), more=st.integers(0, 200), hidden_size=st.integers(1, 9000), share=st.floats(0, 1))
def test_the_cpu_attention_rate_of_a_range_is_its_best(low: int, more: int, hidden_size: int, share: float) -> None:
    constants = Constants.of(machine())
    size = low + round(more * share)
    best = constants.cpu_attention(low, low + more, hidden_size)
    assert best >= constants.cpu_attention(size, size, hidden_size) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compress_cache": True, "cpu_attention": True, "overlap": True}, "no cache compression"),
        ({"compress_cache": False, "cpu_attention": False, "overlap": True}, "always attends on the CPU"),
        ({"compress_cache": False, "cpu_attention": True, "overlap": False}, "always overlaps"),
    ],
)
def test_switches_that_the_paper_does_not_know_are_refused(change: dict[str, bool], message: str) -> None:
    reason = get("flexgen").refusal(Switches(compress_weights=False, **change), machine())
    assert reason is not None
    assert message in reason
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1, **change)
    with pytest.raises(InputError, match=message):
        estimate(policy, hardware=machine(), model=plain_model(), formulation="flexgen")


@pytest.mark.parametrize("change", [{"gated_mlp": True}, {"num_kv_heads": 4}])
def test_models_that_the_paper_does_not_know_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"model 'test-model': the flexgen formulation knows only plain MLPs"):
        get("flexgen").check(machine(), plain_model(**change), Workload())


def test_activations_on_disk_are_refused() -> None:
    policy = Policy.from_percent((100, 0, 100, 0, 50, 0), gpu_batch_size=1, num_gpu_batches=1, **ONLY)
    with pytest.raises(InputError, match=r"activations\.disk is 0\.5: the flexgen formulation keeps none on disk"):
        estimate(policy, hardware=machine(), model=plain_model(), formulation="flexgen")


def test_incomplete_released_constants_are_named() -> None:
    hardware = Hardware.from_catalog("t4-flexgen")
    constants = dict(hardware.flexgen_constants or {})
    del constants["matmul_decode_flops_per_s"]
    constants["matmul_flops_per_s"] = quantity(1e12)
    sources = {**hardware.sources, **machine().sources}
    wrong = dataclasses.replace(hardware, flexgen_constants=constants, sources=sources)
    with pytest.raises(InputError, match="missing or unknown: matmul_decode_flops_per_s, matmul_flops_per_s"):
        get("flexgen").check(wrong, plain_model(), Workload())
