"""Splits and policies: what they accept, FlexGen's percentages, files."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import records
from costmodel.errors import InputError
from costmodel.policy import Policy, Split, splits_from_percent

SHAPE: dict[str, Any] = {"gpu_batch_size": 48, "num_gpu_batches": 3}
POLICY = Policy.from_percent((20, 80, 0, 100, 0, 100), cpu_attention=True, **SHAPE)


@pytest.mark.parametrize("tier", ["gpu", "cpu", "disk"])
@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_fraction_lies_between_zero_and_one(tier: str, value: float) -> None:
    with pytest.raises(InputError, match=rf"^{tier} is {value}: a fraction must lie in \[0, 1\]$"):
        Split(**({"gpu": 0.0, "cpu": 0.0, "disk": 0.0} | {tier: value}))


@pytest.mark.parametrize(("gpu", "total"), [(0.5, "1.2"), (0.0, "0.7"), (0.30001, "1.00001")])
def test_fractions_sum_to_one(gpu: float, total: str) -> None:
    with pytest.raises(InputError, match=f"^gpu \\+ cpu \\+ disk is {total}: the fractions of a split must sum to 1$"):
        Split(gpu=gpu, cpu=0.3, disk=0.4)


def test_rounding_does_not_break_a_split() -> None:
    assert Split(gpu=1 / 3, cpu=1 / 3, disk=0.3333333).disk == 0.3333333


def test_percentages_are_flexgens() -> None:
    weights, cache, activations = splits_from_percent((20, 50, 0, 0, 100, 0))
    assert weights == Split(gpu=0.2, cpu=0.5, disk=0.3)
    assert cache == Split(gpu=0, cpu=0, disk=1)  # zero is zero, not "unset"
    assert activations == Split(gpu=1, cpu=0, disk=0)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 1)), min_size=3, max_size=3))
def test_what_percentages_leave_is_on_disk(pairs: list[tuple[float, float]]) -> None:
    percent = [number for gpu, share in pairs for number in (gpu, (100 - gpu) * share)]
    for split, gpu, cpu in zip(splits_from_percent(tuple(percent)), percent[0::2], percent[1::2], strict=True):
        assert (split.gpu, split.cpu) == (gpu / 100, cpu / 100)
        assert split.disk == pytest.approx(1 - gpu / 100 - cpu / 100, abs=1e-12)


@pytest.mark.parametrize(
    ("percent", "message"),
    [
        ((1, 2, 3), r"^--percent takes 6 numbers \(W_GPU W_CPU C_GPU C_CPU A_GPU A_CPU\), not 3$"),
        ((1,) * 7, r"^--percent takes 6 numbers .*, not 7$"),
        ((60, 50, 0, 0, 0, 0), "weights on GPU and CPU sum to 110: the limit is 100"),
        ((0, 0, 60, 50, 0, 0), "cache on GPU and CPU sum to 110"),
        ((0, 0, 0, 0, 100, 1), "activations on GPU and CPU sum to 101"),
        ((-5, 0, 0, 0, 0, 0), r"weights on the GPU is -5: a percentage must lie in \[0, 100\]"),
        ((0, 0, 0, 101, 0, 0), "cache on the CPU is 101"),
        ((float("nan"), 0, 0, 0, 0, 0), "weights on the GPU is nan"),
    ],
)
def test_wrong_percentages_are_named(percent: tuple[float, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        splits_from_percent(percent)


def test_a_block_is_all_its_batches() -> None:
    assert POLICY.block_size == 144
    assert POLICY.replace(num_gpu_batches=1).block_size == 48
    assert POLICY.num_gpu_batches == 3  # a copy was changed


@pytest.mark.parametrize("name", ["gpu_batch_size", "num_gpu_batches"])
@pytest.mark.parametrize("value", [0, -3])
def test_a_block_holds_a_prompt(name: str, value: int) -> None:
    with pytest.raises(InputError, match=f"^{name} is {value}: it must be at least 1$"):
        POLICY.replace(**{name: value})


FRACTIONS = st.tuples(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 1000)).map(
    lambda parts: Split(gpu=parts[0] / sum(parts), cpu=parts[1] / sum(parts), disk=parts[2] / sum(parts))
)


@given(
    splits=st.tuples(FRACTIONS, FRACTIONS, FRACTIONS),
    shape=st.tuples(st.integers(1, 10**6), st.integers(1, 10**6)),
    switches=st.tuples(st.booleans(), st.booleans(), st.booleans(), st.booleans()),
)
def test_a_policy_survives_its_json(
    splits: tuple[Split, Split, Split], shape: tuple[int, int], switches: tuple[bool, bool, bool, bool]
) -> None:
    policy = Policy(
        weights=splits[0],
        cache=splits[1],
        activations=splits[2],
        gpu_batch_size=shape[0],
        num_gpu_batches=shape[1],
        compress_weights=switches[0],
        compress_cache=switches[1],
        cpu_attention=switches[2],
        overlap=switches[3],
    )
    data = json.loads(json.dumps(policy.to_dict()))
    assert records.from_dict(Policy, data, where="x") == policy


def test_a_policy_file_is_what_the_documentation_says(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    POLICY.save(path)
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "schema": "tierwise.policy/1",
        "weights": {"gpu": 0.2, "cpu": 0.8, "disk": 0.0},
        "cache": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
        "activations": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
        "gpu_batch_size": 48,
        "num_gpu_batches": 3,
        "compress_weights": False,
        "compress_cache": False,
        "cpu_attention": True,
        "overlap": True,
    }
    assert Policy.from_file(path) == POLICY


def test_a_search_result_is_a_policy_file_too(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"schema": "tierwise.search/1", "policy": POLICY.to_dict()}))
    assert Policy.from_file(path) == POLICY


def broken(**changes: Any) -> dict[str, Any]:
    data = {"schema": "tierwise.policy/1", **POLICY.to_dict()} | changes
    return {key: value for key, value in data.items() if value is not None}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], 'a JSON object with "schema": "tierwise.policy/1" is expected, not []'),
        (broken(schema=None), "field 'schema' is missing"),
        (broken(schema="tierwise.policy/2"), "field 'schema' is 'tierwise.policy/2'"),
        (broken(weights=None), "field 'weights' is missing"),
        (broken(weight={"gpu": 1}), "field 'weight' is not part of the schema"),
        (broken(gpu_batch_size="forty"), "field 'gpu_batch_size' is 'forty'"),
        (broken(gpu_batch_size=1.5), "field 'gpu_batch_size' is 1.5"),
        (broken(gpu_batch_size=0), "gpu_batch_size is 0: it must be at least 1"),
        (broken(overlap="perhaps"), "field 'overlap' is 'perhaps'"),
        (broken(cache={"gpu": 0.5, "cpu": 0.4, "disk": 0.0}), "cache: gpu + cpu + disk is 0.9"),
        (broken(cache={"gpu": 2, "cpu": 0, "disk": 0}), "cache: gpu is 2.0: a fraction must lie in [0, 1]"),
        (broken(cache={"gpu": 1, "cpu": 0}), "field 'cache.disk' is missing"),
        (broken(cache={"gpu": 1, "cpu": 0, "disk": 0, "tape": 0}), "field 'cache.tape' is not part of the schema"),
    ],
)
def test_a_broken_policy_file_is_named_with_its_field(data: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError) as caught:
        Policy.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_broken_policy_inside_a_result_says_where(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"policy": {**POLICY.to_dict(), "num_gpu_batches": -1}}))
    with pytest.raises(InputError) as caught:
        Policy.from_file(path)
    assert str(caught.value) == f"{path}: policy: num_gpu_batches is -1: it must be at least 1"
