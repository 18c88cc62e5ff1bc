"""The latency–throughput frontier: monotone, within its limits, from the fastest block to the best policy."""

import json
from typing import Any

import pytest

from costmodel.errors import InfeasibleError, InputError
from costmodel.frontier import Frontier, frontier
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.search import least_latency_s, make_problem, search
from costmodel.workload import Workload
from tests.instances import machine, plain_model

T4: dict[str, Any] = {"hardware": Hardware.from_catalog("t4"), "model": ModelSpec.from_catalog("opt-30b")}
SMALL: dict[str, Any] = {"hardware": machine(gpu_bytes=1.5e9, cpu_bytes=6e9), "model": plain_model()}


def traced(**request: Any) -> Frontier:
    return frontier(**{"points": 6, "workload": Workload(prompt_len=256, gen_len=8), **request})


@pytest.mark.parametrize(
    "request_",
    [
        T4,
        SMALL,
        {**T4, "formulation": "flexgen"},
        {**T4, "workload": Workload(prompt_len=256, gen_len=8, num_prompts=97)},
        {**SMALL, "workload": Workload(prompt_len=16, gen_len=120)},
        {**T4, "gpu_batch_size": 8},
        {**SMALL, "switches": {"overlap": False, "compress_cache": False}},
    ],
    ids=["t4", "small", "flexgen", "job", "long", "batch size", "switches"],
)
def test_a_frontier_rises_from_the_fastest_block_to_the_best_policy(request_: dict[str, Any]) -> None:
    result = traced(**request_)
    workload = request_.get("workload", Workload(prompt_len=256, gen_len=8))
    keywords = {key: value for key, value in request_.items() if key != "workload"}
    latencies = [point.estimate.latency_s for point in result.points]
    speeds = [point.estimate.throughput_tok_per_s for point in result.points]
    assert latencies == sorted(latencies)
    assert speeds == sorted(speeds)
    assert len(set(speeds)) == len(speeds) >= 2
    for point in result.points:
        limit = point.workload.max_latency_s
        assert limit is None or point.estimate.latency_s <= limit * (1 + 1e-6)
        assert point.estimate.feasible
        assert point.gap <= 1e-3
    least = least_latency_s(make_problem(workload=workload, **keywords))
    # Over 64 steps share contexts where that is computed, so a search may find a block faster by a hair.
    assert least * (1 - 1e-5) <= latencies[0] <= least * (1 + 1e-3)
    best = search(workload=workload, with_prices=False, **keywords)
    assert speeds[-1] == pytest.approx(best.estimate.throughput_tok_per_s, rel=1e-3)
    assert best.bound_tok_per_s >= speeds[-1] * (1 - 1e-9)


def test_no_point_is_beaten_by_a_search_under_its_limit() -> None:
    result = traced(**SMALL)
    for point in result.points:
        workload = Workload(prompt_len=256, gen_len=8, max_latency_s=point.estimate.latency_s * (1 + 1e-9))
        again = search(workload=workload, with_prices=False, **SMALL)
        assert again.estimate.throughput_tok_per_s == pytest.approx(point.estimate.throughput_tok_per_s, rel=2e-3)


def test_a_given_limit_cuts_the_frontier() -> None:
    whole = traced(**SMALL)
    middle = whole.points[len(whole.points) // 2].estimate.latency_s
    cut = traced(**SMALL | {"workload": Workload(prompt_len=256, gen_len=8, max_latency_s=middle)})
    assert max(point.estimate.latency_s for point in cut.points) <= middle * (1 + 1e-6)
    assert cut.workload.max_latency_s == middle


def test_points_are_counted_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    result = traced(**SMALL, points=4, progress=lambda done, total: told.append((done, total)))
    assert 2 <= len(result.points) <= 4
    assert told == [(1, 4), (2, 4), (3, 4)]
    with pytest.raises(InputError, match=r"^points is 1: a frontier needs at least 2$"):
        traced(**SMALL, points=1)


def test_a_single_shape_is_a_single_point() -> None:
    result = traced(**SMALL, gpu_batch_size=2, num_gpu_batches=2)
    assert len(result.points) == 1


def test_what_fits_nothing_has_no_frontier() -> None:
    with pytest.raises(InfeasibleError, match="does not fit"):
        traced(hardware=machine(gpu_bytes=1e6, cpu_bytes=1e6, disk_bytes=1e6), model=plain_model())


def test_table_and_json_hold_the_points() -> None:
    result = traced(**SMALL)
    frame = result.to_frame()
    assert list(frame["latency_s"]) == [point.estimate.latency_s for point in result.points]
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["schema"] == "tierwise.frontier/1"
    assert [point["throughput_tok_per_s"] for point in data["points"]] == list(frame["throughput_tok_per_s"])
    assert data["points"][0].keys() == {"latency_s", "throughput_tok_per_s", "bound_tok_per_s", "policy", "estimate"}
    assert (data["formulation"], data["workload"]) == ("roofline", {"prompt_len": 256, "gen_len": 8})
