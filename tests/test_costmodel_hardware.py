"""The hardware file: what it accepts, what its errors say, and what a change of one of its numbers leaves alone."""

import copy
import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.hardware import Hardware, quantities
from costmodel.quantity import Rate
from tests.instances import link, machine, rate

T4 = json.loads((resources.files("costmodel.catalog") / "hardware" / "t4.json").read_text("utf-8"))
ABSENT = object()


def with_field(path: str, value: Any) -> dict[str, Any]:
    """The catalogue's T4 with one field changed, or taken out."""
    data = copy.deepcopy(T4)
    owner = data
    *folders, last = path.split(".")
    for folder in folders:
        owner = owner[folder]
    if value is ABSENT:
        del owner[last]
    else:
        owner[last] = value
    return data


MEMORY, MATMUL = "gpu.memory_bytes", "gpu.matmul_flops_per_s"


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", ABSENT, 'field \'schema\' is missing: such a file has "schema": "tierwise.hardware/1"'),
        ("schema", "tierwise.hardware/2", "field 'schema' is 'tierwise.hardware/2'"),
        ("gpu", ABSENT, "field 'gpu' is missing"),
        ("gpu", 5, "field 'gpu' is 5"),
        ("name", 5, "field 'name' is 5"),
        ("gpus", {}, "field 'gpus' is not part of the schema"),
        ("gpu.vendor", "x", "field 'gpu.vendor' is not part of the schema"),
        ("gpu.kind", "tpu", "field 'gpu.kind' is 'tpu': input should be 'cuda', 'rocm', 'metal' or 'cpu'"),
        (MEMORY, 16, f"field '{MEMORY}' is 16"),
        (f"{MEMORY}.value", ABSENT, f"field '{MEMORY}.value' is missing"),
        (f"{MEMORY}.value", None, f"field '{MEMORY}.value' is None"),
        (f"{MEMORY}.value", True, f"{MEMORY}: value is True: it must be a number"),
        (f"{MEMORY}.value", "16", f"{MEMORY}: '16' is not a quantity in bytes"),
        (f"{MEMORY}.value", "16 GB/s", f"{MEMORY}: '16 GB/s' is not a quantity in bytes"),
        (f"{MEMORY}.value", "-16 GiB", f"{MEMORY}: value is -17179869184.0: it must be finite and at least 0"),
        (f"{MEMORY}.value", -1, f"{MEMORY}: value is -1.0: it must be finite and at least 0"),
        (f"{MEMORY}.value", 0, "gpu: memory_bytes.value is 0: it must be greater than 0"),
        (f"{MEMORY}.value", float("nan"), f"field '{MEMORY}.value' is nan"),
        (f"{MEMORY}.value", float("inf"), f"field '{MEMORY}.value' is inf"),
        (f"{MEMORY}.unit", "GiB", f"field '{MEMORY}.unit' is not part of the schema"),
        (f"{MEMORY}.source", ABSENT, f"field '{MEMORY}.source' is missing"),
        (f"{MEMORY}.source", "hearsay", f"{MEMORY} names source 'hearsay', which 'sources' does not define"),
        (f"{MEMORY}.efficiency", 1.01, f"{MEMORY}: efficiency is 1.01: it must lie in (0, 1]"),
        (f"{MEMORY}.efficiency", 0, f"{MEMORY}: efficiency is 0.0: it must lie in (0, 1]"),
        (f"{MEMORY}.efficiency", -0.5, f"{MEMORY}: efficiency is -0.5: it must lie in (0, 1]"),
        (f"{MEMORY}.efficiency", "half", f"field '{MEMORY}.efficiency' is 'half'"),
        (f"{MEMORY}.efficiency_source", ABSENT, "is 0.9375 but field 'efficiency_source' is missing"),
        (f"{MEMORY}.efficiency_source", "hearsay", f"{MEMORY} names source 'hearsay'"),
        (f"{MEMORY}.spread", -0.1, f"{MEMORY}: spread is -0.1: it must be at least 0"),
        (f"{MEMORY}.curve", [[1, 1]], f"field '{MEMORY}.curve' is not part of the schema"),
        (f"{MATMUL}.value", 0, "gpu: matmul_flops_per_s.value is 0: it must be greater than 0"),
        (f"{MATMUL}.curve", [], f"{MATMUL}: curve needs at least one pair"),
        (f"{MATMUL}.curve", [[0, 1e12]], f"{MATMUL}: curve needs at least one pair of rows > 0 and rate > 0"),
        (f"{MATMUL}.curve", [[1, 0]], f"{MATMUL}: curve needs at least one pair of rows > 0 and rate > 0"),
        (f"{MATMUL}.curve", [[2, 1e12], [1, 2e12]], f"{MATMUL}: curve needs strictly increasing rows"),
        (f"{MATMUL}.curve", [[1, 1e12], [1, 2e12]], f"{MATMUL}: curve needs strictly increasing rows"),
        (f"{MATMUL}.curve", [[1, "5 GB/s"]], f"{MATMUL}: '5 GB/s' is not a quantity in FLOP/s"),
        (f"{MATMUL}.curve", [[1, None]], f"field '{MATMUL}.curve.0.1' is None"),
        (f"{MATMUL}.curve", [[1, [2]]], f"field '{MATMUL}.curve.0.1' is [2]"),
        (f"{MATMUL}.curve", [[1, 2, 3]], f"field '{MATMUL}.curve.0"),
        (f"{MATMUL}.curve", [[1, float("nan")]], f"field '{MATMUL}.curve.0.1' is nan"),
        (f"{MATMUL}.curve", "fast", f"field '{MATMUL}.curve' is 'fast'"),
        (
            "links.disk_read.bytes_per_s.value",
            "2 GB",
            "links.disk_read.bytes_per_s: '2 GB' is not a quantity in bytes/s",
        ),
        ("links.disk_read.bytes_per_s.value", 0, "links.disk_read: bytes_per_s.value is 0: it must be greater than 0"),
        ("links.disk_read.cache_bytes_per_s", {"value": 0, "source": "nvidia-t4"}, "cache_bytes_per_s.value is 0"),
        ("links.disk_read.latency_s.value", "1 GB", "links.disk_read.latency_s: '1 GB' is not a quantity in s"),
        ("links.disk_read.latency_s.value", -1, "links.disk_read.latency_s: value is -1.0"),
        ("links.nvlink", {}, "field 'links.nvlink' is not part of the schema"),
        ("links.disk_write", ABSENT, "field 'links.disk_write' is missing"),
        ("cpu.attention_bytes_per_s.value", 0, "cpu: attention_bytes_per_s.value is 0: it must be greater than 0"),
        ("cpu.dequantize_values_per_s.value", "9 GB/s", "'9 GB/s' is not a quantity in values/s"),
        ("engine.stages", "token", "field 'engine.stages' is 'token': input should be 'layer' or 'attention and mlp'"),
        ("engine.unhidden_share.value", 1.5, "engine: unhidden_share.value is 1.5: it must lie in [0, 1]"),
        ("engine.attention_causal_share.value", 2, "engine: attention_causal_share.value is 2: it must lie in [0, 1]"),
        ("sources.nvidia-t4.date", ABSENT, "field 'sources.nvidia-t4.date' is missing"),
        ("sources.nvidia-t4", ABSENT, "names source 'nvidia-t4', which 'sources' does not define (it has: assumed-"),
        ("sources", {}, "which 'sources' does not define (it has: none)"),
        (
            "flexgen_constants",
            {"matmul_decode_flops_per_s": {"value": 0, "source": "nvidia-t4"}},
            "flexgen_constants.matmul_decode_flops_per_s.value is 0: it must be greater than 0",
        ),
    ],
)
def test_a_wrong_field_is_named_with_file_value_and_limit(path: str, value: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps(with_field(path, value)))
    with pytest.raises(InputError) as caught:
        Hardware.from_file(file)
    text = str(caught.value)
    assert text.startswith(f"{file}: ")
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize("keep", [0, 1, 100, 1000, 2500])
def test_a_truncated_file_says_where_it_ends(keep: int, tmp_path: Path) -> None:
    file = tmp_path / "my.json"
    file.write_text(json.dumps(T4, indent=2)[:keep])
    with pytest.raises(InputError, match=rf"^{file}: not valid JSON at line \d+, column \d+: "):
        Hardware.from_file(file)


def test_an_unknown_machine_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"^unknown GPU 'T44': did you mean 't4'\? known: a100-40gb, "):
        Hardware.from_catalog("T44")


@given(
    path=st.sampled_from(
        ["gpu", "gpu.memory_bytes", "gpu.matmul_flops_per_s.curve", "links", "engine.stages", "sources"]
    ),
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=4,
    ),
)
def test_rubbish_is_one_sentence_or_a_machine(path: str, value: Any) -> None:
    try:
        Hardware.from_dict(with_field(path, value), where="my.json")
    except InputError:
        with pytest.raises(InputError, match=r"^my\.json: "):
            Hardware.from_dict(with_field(path, value), where="my.json")


# ------------------------------------------------------------------ what is accepted


def test_units_are_converted_once() -> None:
    hardware = Hardware.from_dict(with_field(f"{MEMORY}.value", "24 GB"))
    assert hardware.gpu.memory_bytes.value == 24e9
    assert hardware.gpu.memory_bytes.effective == 24e9 * 0.9375
    assert Hardware.from_dict(
        with_field("links.cpu_to_gpu.latency_s.value", "15 us")
    ).links.cpu_to_gpu.latency_s.value == (pytest.approx(15e-6))
    curve = [[1, "500 GFLOP/s"], [64, 2e13]]
    assert Hardware.from_dict(with_field(f"{MATMUL}.curve", curve)).gpu.matmul_flops_per_s.curve == (
        (1.0, 5e11),
        (64.0, 2e13),
    )


def test_what_is_optional_may_be_missing() -> None:
    data = with_field("cpu.attention_bytes_per_s", ABSENT)
    del data["cpu"]["dequantize_values_per_s"]
    hardware = Hardware.from_dict(data)
    assert hardware.cpu.attention_bytes_per_s is None
    assert hardware.cpu.attention_call_s is None
    assert hardware.flexgen_constants is None
    assert Hardware.from_dict(hardware.to_dict()) == hardware


def test_a_profiler_may_add_what_it_measured() -> None:
    hardware = Hardware.from_dict(with_field("measured", {"repeats": 5, "curves": {"a": [1, 2]}}))
    assert hardware.measured == {"repeats": 5, "curves": {"a": [1, 2]}}
    assert Hardware.from_dict(hardware.to_dict()) == hardware


def test_capacities_are_the_effective_sizes() -> None:
    hardware = Hardware.from_dict(with_field("disk.memory_bytes.value", 0))
    assert hardware.capacity_bytes == {"gpu": 15 * 2**30, "cpu": 208e9, "disk": 0}


def test_every_quantity_is_listed_by_its_path() -> None:
    hardware = Hardware.from_catalog("t4")
    listed = dict(quantities(hardware))
    assert len(listed) == 20
    assert listed["gpu.memory_bytes"] is hardware.gpu.memory_bytes
    assert listed["links.disk_read.latency_s"] is hardware.links.disk_read.latency_s
    assert listed["engine.unhidden_share"] is hardware.engine.unhidden_share


def test_the_cache_takes_its_own_route_where_it_has_one() -> None:
    assert link(10e9).for_cache.effective == 10e9
    assert link(10e9, cache_bytes_per_s=1e9).for_cache.effective == 1e9


# ------------------------------------------------------------------ changed copies


def test_a_replaced_number_stands_alone() -> None:
    before = machine(matmul=rate(20e12, (1, 1e12)))
    after = before.replace("gpu.matmul_flops_per_s", 5e12, source="me")
    assert after.gpu.matmul_flops_per_s == Rate(value=5e12, source="me")
    assert after.sources["me"].title == "me"
    assert before.gpu.matmul_flops_per_s.curve == ((1, 1e12),)


def test_a_raised_number_keeps_its_efficiency_and_its_curve() -> None:
    half = Rate(value=20e12, source="test", efficiency=0.5, efficiency_source="test", curve=((1, 4e12), (8, 10e12)))
    before = machine(matmul=half)
    after = before.raised("gpu.matmul_flops_per_s", 5e12).gpu.matmul_flops_per_s  # 10 effective TFLOP/s and 5 more
    assert after.effective == pytest.approx(15e12)
    assert (after.value, after.efficiency) == (pytest.approx(30e12), 0.5)
    assert after.at(1) == pytest.approx(1.5 * half.at(1))
    assert after.at(8) == pytest.approx(1.5 * half.at(8))


def test_a_tier_that_is_not_there_can_be_raised() -> None:
    assert machine(disk_bytes=0).raised("disk.memory_bytes", 5e9).capacity_bytes["disk"] == 5e9


@pytest.mark.parametrize(
    "path", ["gpu.speed", "gpu", "gpu.name", "links.nvlink.bytes_per_s", "cpu.attention_call_s", ""]
)
def test_a_path_to_nothing_is_an_error(path: str) -> None:
    with pytest.raises(InputError, match=f"^hardware 'test-machine' has no quantity '{path}'$"):
        machine().raised(path, 1.0)
