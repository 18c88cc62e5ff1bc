"""When nothing fits: the message, and whether what it asks for is enough and not too much."""

import random
import re
from typing import Any

import pytest

from costmodel import units, words
from costmodel.errors import InfeasibleError
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.policy import Split
from costmodel.search import SearchResult, least_latency_s, make_problem, search
from costmodel.search.infeasible import _rounded_up
from costmodel.workload import Workload
from tests.instances import any_machine, any_model, machine, plain_model

PLAIN = {"compress_weights": False, "compress_cache": False}
FLAGS = {"gpu": "gpu_memory", "cpu": "cpu_memory", "disk": "disk"}


def failure(hardware: Hardware, **keywords: Any) -> InfeasibleError:
    with pytest.raises(InfeasibleError) as caught:
        found(hardware, **keywords)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return caught.value


def found(hardware: Hardware, **keywords: Any) -> SearchResult:
    request: dict[str, Any] = {"model": plain_model(), "workload": Workload(prompt_len=100, gen_len=4)} | keywords
    return search(hardware=hardware, with_prices=False, **request)


def asked_for(error: InfeasibleError) -> dict[str, float]:
    """The sizes that the message asks for, as someone would type them."""
    pairs = re.findall(r"--(gpu-memory|cpu-memory|disk) of at least ([\d.e+]+ \w+)", str(error))
    return {flag.replace("-", "_"): units.parse(size, "bytes") for flag, size in pairs}


# ------------------------------------------------------------------ memory


def test_the_message_names_model_machine_limits_and_mends() -> None:
    small = failure(machine(gpu_bytes=0.3e9, cpu_bytes=0.1e9, disk_bytes=0.1e9), switches=PLAIN)
    assert str(small).startswith(
        "test-model with a block of 1 × 1 prompts of 100 + 4 tokens does not fit test-machine "
        "(GPU memory 286.1 MiB, CPU memory 95.37 MiB, disk 95.37 MiB, of which 90% is usable)"
    )
    assert "any one of these would mend it: --gpu-memory of at least " in str(small)
    assert small.reason["limit"] == "memory"
    assert small.reason["usable_fraction"] == pytest.approx(0.9)
    assert small.reason["capacity_bytes"] == {"gpu": 0.3e9, "cpu": 0.1e9, "disk": 0.1e9}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["roofline", "flexgen"])
def test_the_least_memory_is_enough_and_hardly_more_than_enough(seed: int, name: str) -> None:
    rng = random.Random(seed)
    model, workload = any_model(rng, flexgen=name == "flexgen"), Workload(prompt_len=rng.choice([1, 500]), gen_len=3)
    weights = model.total_params * 2.0
    shares = [rng.random() + 0.05 for _ in range(3)]
    sizes = [weights * rng.uniform(0.1, 0.6) * share / sum(shares) for share in shares]
    hardware = any_machine(rng, gpu_bytes=sizes[0], cpu_bytes=sizes[1], disk_bytes=sizes[2])
    keywords: dict[str, Any] = {
        "model": model,
        "workload": workload,
        "formulation": name,
        "usable_fraction": rng.choice([None, 0.5, 1.0]),
        "switches": PLAIN if name == "roofline" else {"compress_weights": False},
        **rng.choice([{}, {"gpu_batch_size": 3}, {"gpu_batch_size": 2, "num_gpu_batches": 5}]),
    }
    error = failure(hardware, **keywords)
    least = error.reason["least_capacity_bytes"]
    assert isinstance(least, dict)
    mends = asked_for(error)
    assert mends.keys() == {FLAGS[tier] for tier in least}
    for tier, size in least.items():
        flag = FLAGS[tier]
        assert mends[flag] == pytest.approx(size, rel=5.1e-4)
        assert found(with_overrides(hardware, **{flag: mends[flag]}), **keywords).estimate.feasible
        failure(with_overrides(hardware, **{flag: size * 0.99}), **keywords)
    # A tier that is not named mends nothing, however large.
    for tier in set(FLAGS) - set(least):
        failure(with_overrides(hardware, **{FLAGS[tier]: 1e18}), **keywords)


def test_a_tier_that_is_absent_can_be_the_mend() -> None:
    keywords: dict[str, Any] = {"switches": PLAIN, "usable_fraction": 0.5}
    bare = machine(gpu_bytes=0.8e9, cpu_bytes=0, disk_bytes=0)
    mends = asked_for(failure(bare, **keywords))
    assert "cpu_memory" in mends
    assert found(with_overrides(bare, cpu_memory=mends["cpu_memory"]), **keywords).estimate.feasible
    failure(with_overrides(bare, cpu_memory=mends["cpu_memory"] * 0.99), **keywords)


def test_no_single_limit_may_be_enough() -> None:
    # The GPU must hold at least the buffers of a layer and of the head, the other tiers the weights.
    error = failure(machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6), num_gpu_batches=1)
    assert set(asked_for(error)) == {"gpu_memory"}
    half = Split(gpu=0.5, cpu=0.5, disk=0)
    error = failure(machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6), splits=(half, half, half))
    assert "no single limit mends it: raise several" in str(error)
    assert error.reason["least_capacity_bytes"] == {}


# ------------------------------------------------------------------ compression


def test_compression_is_named_where_it_would_be_enough() -> None:
    # 24 layers of 12 × 1024² parameters: 604 MB in 16 bits, 170 MB in 4; the embedding is 102 MB either way.
    hardware = machine(gpu_bytes=0.7e9, cpu_bytes=0, disk_bytes=0)
    error = failure(hardware, switches=PLAIN)
    assert error.reason["compression"] == "--compress-weights on"
    assert str(error).endswith("; --compress-weights on")
    assert found(hardware, switches={"compress_cache": False, "compress_weights": True}).estimate.feasible


def test_compressing_the_cache_is_named_where_that_is_what_it_takes() -> None:
    # 60 prompts of 104 tokens have 24 × 4096 × 104 × 60 = 613 MB of cache.
    hardware = machine(gpu_bytes=1.3e9, cpu_bytes=0, disk_bytes=0)
    error = failure(hardware, switches=PLAIN, gpu_batch_size=1, num_gpu_batches=60)
    weights_first = error.reason["compression"]
    works = {
        flags: _fits(hardware, switches=dict(zip(PLAIN, flags, strict=True)), gpu_batch_size=1, num_gpu_batches=60)
        for flags in ((True, False), (False, True), (True, True))
    }
    names = {(True, False): "--compress-weights on", (False, True): "--compress-cache on"}
    names[True, True] = "--compress-weights on --compress-cache on"
    assert weights_first == next(names[flags] for flags, fits in works.items() if fits)
    assert failure(hardware, switches=PLAIN | {"compress_weights": True}, gpu_batch_size=1, num_gpu_batches=100).reason[
        "compression"
    ] == ("--compress-cache on")


def _fits(hardware: Hardware, **keywords: Any) -> bool:
    try:
        found(hardware, **keywords)
    except InfeasibleError:
        return False
    return True


def test_no_compression_is_named_where_none_is_enough() -> None:
    hardware = machine(gpu_bytes=0.2e9, cpu_bytes=0, disk_bytes=0)
    assert failure(hardware, switches=PLAIN).reason["compression"] is None
    assert "compress" not in str(failure(hardware, switches=PLAIN))
    # Nor where it was searched already.
    assert failure(hardware).reason["compression"] is None


# ------------------------------------------------------------------ latency


@pytest.mark.parametrize("formulation", ["roofline", "flexgen"])
@pytest.mark.parametrize(
    ("prompt_len", "gen_len", "shape"),
    [(512, 32, {}), (1, 1, {}), (16, 400, {}), (512, 32, {"gpu_batch_size": 8}), (512, 8, {"num_gpu_batches": 3})],
)
def test_the_least_latency_is_feasible_and_no_less_is(
    formulation: str, prompt_len: int, gen_len: int, shape: dict[str, int]
) -> None:
    keywords: dict[str, Any] = {"model": ModelSpec.from_catalog("opt-30b"), "formulation": formulation, **shape}
    hardware = Hardware.from_catalog("t4")

    def limited(limit: float) -> dict[str, Any]:
        return {"workload": Workload(prompt_len=prompt_len, gen_len=gen_len, max_latency_s=limit)}

    error = failure(hardware, **keywords, **limited(1e-3))
    assert error.reason["limit"] == "max_latency_s"
    assert error.reason["given"] == 1e-3
    least = error.reason["least"]
    assert isinstance(least, float)
    match = re.search(
        rf"^no policy generates {words.counted(gen_len, 'token')} after {prompt_len} within 1 ms: "
        r"the fastest block takes .*; raise --max-latency to at least ([\d.e+]+)$",
        str(error),
    )
    assert match is not None
    printed = float(match[1])
    assert least <= printed <= least * 1.002
    for limit in (least, printed):
        result = found(hardware, **keywords, **limited(limit))
        assert result.estimate.latency_s <= limit * (1 + 1e-6)
    failure(hardware, **keywords, **limited(least * 0.999))
    problem = make_problem(hardware=hardware, **keywords, **limited(1e-3))
    assert least_latency_s(problem) == least


@pytest.mark.parametrize(
    ("seconds", "printed"), [(12.3411, 12.35), (12.34, 12.34), (0.0012341, 0.001235), (99999.0, 100000.0), (1.0, 1.0)]
)
def test_a_least_latency_is_rounded_up(seconds: float, printed: float) -> None:
    assert _rounded_up(seconds) == pytest.approx(printed, rel=1e-12)
    assert _rounded_up(seconds) >= seconds


def test_memory_is_the_reason_where_no_latency_would_help() -> None:
    error = failure(
        machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6),
        workload=Workload(prompt_len=100, gen_len=4, max_latency_s=1e6),
    )
    assert error.reason["limit"] == "memory"
    problem = make_problem(
        hardware=machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6), model=plain_model(), workload=Workload()
    )
    with pytest.raises(InfeasibleError, match="does not fit"):
        least_latency_s(problem)
