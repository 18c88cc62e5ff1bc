"""What an estimate says about a policy: jobs, limits, bottlenecks, odd workloads, refusals."""

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.estimate import Estimate, check_workload, estimate, limits_of
from costmodel.formulations import get
from costmodel.hardware import Hardware, Links
from costmodel.model import ModelSpec
from costmodel.policy import Policy
from costmodel.workload import Workload
from tests.instances import any_machine, any_model, any_splits, any_switches, link, machine, plain_model

ON_GPU = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=2)
SPREAD = Policy.from_percent((30, 50, 20, 60, 50, 25), gpu_batch_size=4, num_gpu_batches=2)


def cost(policy: Policy, workload: Workload, hardware: Hardware | None = None, **keywords: Any) -> Estimate:
    return estimate(policy, hardware=hardware or machine(), model=plain_model(), workload=workload, **keywords)


# ------------------------------------------------------------------ times and jobs


def test_throughput_counts_generated_tokens_over_all_seconds() -> None:
    result = cost(SPREAD, Workload(prompt_len=100, gen_len=10))
    assert result.latency_s == result.prefill_s + result.decode_s
    assert result.throughput_tok_per_s == pytest.approx(8 * 10 / result.latency_s)
    assert result.decode_throughput_tok_per_s == pytest.approx(8 * 9 / result.decode_s)
    assert (result.blocks, result.job_s) == (None, None)


@pytest.mark.parametrize(("prompts", "blocks"), [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3), (1009, 127)])
def test_a_job_is_charged_whole_blocks(prompts: int, blocks: int) -> None:
    endless = cost(SPREAD, Workload(prompt_len=100, gen_len=10))
    job = cost(SPREAD, Workload(prompt_len=100, gen_len=10, num_prompts=prompts))
    assert job.latency_s == endless.latency_s
    assert job.blocks == blocks
    assert job.job_s == pytest.approx(blocks * endless.latency_s)
    assert job.throughput_tok_per_s == pytest.approx(prompts * 10 / (blocks * endless.latency_s))


def test_one_generated_token_has_no_decode() -> None:
    result = cost(SPREAD, Workload(prompt_len=100, gen_len=1))
    assert result.decode_s == 0
    assert result.decode_throughput_tok_per_s is None
    assert result.throughput_tok_per_s == pytest.approx(8 / result.prefill_s)
    assert set(result.busy_s["decode"].values()) == {0}
    assert set(result.bottleneck) == {"prefill"}
    assert set(result.busy_share("decode").values()) == {0}


def test_the_shortest_workload_is_estimated() -> None:
    for name in ("roofline", "flexgen"):
        policy = Policy.from_percent((0, 100, 0, 100, 0, 100), gpu_batch_size=1, num_gpu_batches=1, cpu_attention=True)
        result = cost(policy, Workload(prompt_len=1, gen_len=1, num_prompts=1), formulation=name)
        assert result.throughput_tok_per_s == pytest.approx(1 / result.prefill_s)
        assert result.blocks == 1


def test_the_first_step_can_stand_for_all() -> None:
    # As the paper projected its large runs: 9 steps that all attend to 101 tokens.
    workload = Workload(prompt_len=100, gen_len=10)
    first = cost(ON_GPU, workload, decode_contexts="first step")
    one = cost(ON_GPU, Workload(prompt_len=100, gen_len=2))
    assert first.decode_s == pytest.approx(9 * one.decode_s)
    assert first.decode_s < cost(ON_GPU, workload).decode_s
    assert first.prefill_s == one.prefill_s
    assert cost(ON_GPU, Workload(prompt_len=100, gen_len=1), decode_contexts="first step").decode_s == 0


def test_the_default_workload_is_512_and_32() -> None:
    implicit = estimate(ON_GPU, hardware=machine(), model=plain_model())
    assert implicit == cost(ON_GPU, Workload(prompt_len=512, gen_len=32))


# ------------------------------------------------------------------ memory


def test_what_does_not_fit_is_estimated_and_reported() -> None:
    # 24 × 12 × 1024² parameters and the embedding are 706 MB in 16 bits.
    small = machine(gpu_bytes=0.5e9, cpu_bytes=1e9, disk_bytes=1e9)
    result = cost(ON_GPU, Workload(prompt_len=10, gen_len=2), small)
    assert not result.feasible
    assert result.violations == ("gpu",)
    assert result.latency_s == cost(ON_GPU, Workload(prompt_len=10, gen_len=2)).latency_s
    weights = (24 * 12 * 1024**2 + 50_000 * 1024) * 2
    assert 0.5e9 < weights < result.peak_bytes["gpu"]


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
def test_each_tier_has_its_limit(tier: str) -> None:
    workload = Workload(prompt_len=100, gen_len=4)
    need = cost(SPREAD, workload).peak_bytes[tier]
    for size, fits in ((need / 0.9 * 1.001, True), (need / 0.9 * 0.999, False)):
        result = cost(SPREAD, workload, machine(**{f"{tier}_bytes": size}))
        assert result.feasible is fits
        assert result.violations == (() if fits else (tier,))
        assert result.limit_bytes[tier] == pytest.approx(size * 0.9)


def test_the_usable_fraction_scales_every_limit() -> None:
    hardware = machine(gpu_bytes=10e9, cpu_bytes=20e9, disk_bytes=30e9)
    assert limits_of(hardware, get("roofline"), 0.5) == {"gpu": 5e9, "cpu": 10e9, "disk": 15e9}
    assert limits_of(hardware, get("roofline"), None) == pytest.approx({"gpu": 9e9, "cpu": 18e9, "disk": 27e9})
    assert limits_of(hardware, get("flexgen"), None) == pytest.approx({"gpu": 8e9, "cpu": 16e9, "disk": 24e9})


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, float("nan")])
def test_the_usable_fraction_lies_between_zero_and_one(fraction: float) -> None:
    with pytest.raises(InputError, match=r"^usable_fraction is .*: it must lie in \(0, 1\]$"):
        cost(ON_GPU, Workload(), usable_fraction=fraction)


# ------------------------------------------------------------------ bottlenecks


@pytest.mark.parametrize(
    ("percent", "slow", "bottleneck"),
    [
        ((0, 100, 100, 0, 100, 0), "cpu_to_gpu", "cpu_to_gpu"),
        ((100, 0, 0, 100, 100, 0), "gpu_to_cpu", "gpu_to_cpu"),
        ((0, 0, 100, 0, 100, 0), "disk_read", "disk_read"),
        ((100, 0, 0, 0, 100, 0), "disk_write", "disk_write"),
        ((100, 0, 100, 0, 100, 0), None, "gpu_compute"),
    ],
)
def test_the_busiest_resource_is_named(percent: tuple[float, ...], slow: str | None, bottleneck: str) -> None:
    links = machine().links if slow is None else dataclasses.replace(machine().links, **{slow: link(1e6)})
    policy = Policy.from_percent(percent, gpu_batch_size=4, num_gpu_batches=2)
    result = cost(policy, Workload(prompt_len=100, gen_len=1), machine(links=links))
    assert result.bottleneck == {"prefill": bottleneck}
    assert result.busy_share("prefill")[bottleneck] == pytest.approx(1.0, abs=1e-4)  # in the head nothing is moved


def test_the_cpu_can_be_the_bottleneck() -> None:
    policy = Policy.from_percent((100, 0, 0, 100, 100, 0), gpu_batch_size=4, num_gpu_batches=2, cpu_attention=True)
    result = cost(policy, Workload(prompt_len=100, gen_len=2), machine(cpu_attention_bytes_per_s=1e6))
    assert result.bottleneck["decode"] == "cpu_compute"


@settings(max_examples=60)
@given(rng=st.randoms(use_true_random=False))
def test_busy_seconds_and_bytes_are_consistent(rng: random.Random) -> None:
    hardware, model = any_machine(rng, gpu_bytes=16e9, cpu_bytes=64e9, disk_bytes=1e12), any_model(rng)
    switches = any_switches(rng, get("roofline"), hardware)
    weights, cache, activations = any_splits(rng)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=rng.randint(1, 9),
        num_gpu_batches=rng.randint(1, 9),
        **dataclasses.asdict(switches),
    )
    workload = Workload(prompt_len=rng.choice([1, 50]), gen_len=rng.choice([1, 4]))
    result = estimate(policy, hardware=hardware, model=model, workload=workload)
    # A link that moves bytes is busy, for no less time than its fastest rate allows.
    for name, moved in result.bytes_moved.items():
        wire = getattr(hardware.links, name)
        fastest = max(wire.bytes_per_s.effective, wire.for_cache.effective)
        busy = result.busy_s["prefill"][name] + result.busy_s["decode"][name]
        assert busy >= moved / fastest * (1 - 1e-9)
        assert (moved >= 1) <= (busy > 0)  # what is less than a byte may take no second that a float can tell from 0
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["resources"]["prefill"].keys() == result.busy_s["prefill"].keys()


def test_without_latency_a_link_is_busy_for_bytes_over_bandwidth() -> None:
    links = Links(cpu_to_gpu=link(10e9), gpu_to_cpu=link(8e9), disk_read=link(2e9), disk_write=link(1e9))
    result = cost(SPREAD, Workload(prompt_len=100, gen_len=5), machine(links=links))
    for name, rate in (("cpu_to_gpu", 10e9), ("gpu_to_cpu", 8e9), ("disk_read", 2e9), ("disk_write", 1e9)):
        busy = sum(result.busy_s[phase][name] for phase in ("prefill", "decode"))
        assert busy == pytest.approx(result.bytes_moved[name] / rate, rel=1e-12)


def test_the_documented_json() -> None:
    result = cost(SPREAD, Workload(prompt_len=100, gen_len=5, num_prompts=20))
    data = result.to_dict()
    assert list(data) == [
        "prefill_s",
        "decode_s",
        "latency_s",
        "throughput_tok_per_s",
        "decode_throughput_tok_per_s",
        "blocks",
        "job_s",
        "peak_bytes",
        "limit_bytes",
        "bytes_moved",
        "feasible",
        "violations",
        "bottleneck",
        "resources",
    ]
    share = data["resources"]["decode"]["disk_read"]
    assert share["busy_share"] == pytest.approx(share["busy_s"] / data["decode_s"])
    assert "job_s" not in cost(SPREAD, Workload(prompt_len=100, gen_len=5)).to_dict()


# ------------------------------------------------------------------ refusals


def test_a_sequence_beyond_the_models_positions_is_refused() -> None:
    model = ModelSpec.from_catalog("opt-30b")
    check_workload(get("roofline"), machine(), model, Workload(prompt_len=2016, gen_len=32))
    with pytest.raises(
        InputError, match=r"^prompt_len 2017 \+ gen_len 32 = 2049 tokens: model 'opt-30b' has 2048 positions$"
    ):
        estimate(ON_GPU, hardware=machine(), model=model, workload=Workload(prompt_len=2017, gen_len=32))


def test_a_model_without_a_limit_takes_any_sequence() -> None:
    result = cost(ON_GPU, Workload(prompt_len=100_000, gen_len=2))
    assert result.latency_s > 0


def test_refused_switches_name_the_reason() -> None:
    hardware = machine(cpu_attention_bytes_per_s=None)
    with pytest.raises(
        InputError, match=r"needs cpu\.attention_bytes_per_s, which hardware 'test-machine' does not have"
    ):
        cost(SPREAD.replace(cpu_attention=True), Workload(), hardware)


def test_a_thousand_tokens_are_summed_step_by_step() -> None:
    # All on the GPU, every step's attention grows by the same amount: an arithmetic series.
    result = cost(ON_GPU, Workload(prompt_len=100, gen_len=1501))
    first = cost(ON_GPU, Workload(prompt_len=100, gen_len=2)).decode_s
    last = cost(ON_GPU, Workload(prompt_len=1599, gen_len=2)).decode_s
    assert result.decode_s == pytest.approx(1500 * (first + last) / 2, rel=1e-9)
