"""The frontier: monotone, certified, and between the ends that two other questions give."""

import pytest

from costmodel import Frontier, Hardware, InputError, ModelSpec, Workload, frontier, search
from costmodel.search import least_latency_s, make_problem

T4, OPT = Hardware.from_catalog("t4"), ModelSpec.from_catalog("opt-30b")


@pytest.fixture(scope="module")
def found() -> Frontier:
    return frontier(hardware=T4, model=OPT, points=6)


def test_later_points_take_longer_and_bring_more(found: Frontier) -> None:
    latencies = [point.estimate.latency_s for point in found.points]
    throughputs = [point.estimate.throughput_tok_per_s for point in found.points]
    assert len(found.points) >= 4
    assert latencies == sorted(latencies)
    assert throughputs == sorted(throughputs)


def test_the_ends_are_the_fastest_block_and_the_best_policy(found: Frontier) -> None:
    problem = make_problem(hardware=T4, model=OPT, workload=Workload())
    assert found.points[0].estimate.latency_s == pytest.approx(least_latency_s(problem), rel=1e-3)
    best = search(hardware=T4, model=OPT)
    assert found.points[-1].estimate.throughput_tok_per_s == pytest.approx(best.estimate.throughput_tok_per_s, rel=1e-9)


def test_every_point_is_certified_and_fits(found: Frontier) -> None:
    for point in found.points:
        assert point.gap <= 1e-3
        assert point.estimate.feasible
        limit = point.workload.max_latency_s
        assert limit is None or point.estimate.latency_s <= limit * (1 + 1e-6)


def test_no_policy_of_a_point_s_latency_beats_its_bound(found: Frontier) -> None:
    """The best of a looser limit may be better; re-solving under the point's own latency may not."""
    point = found.points[len(found.points) // 2]
    again = search(hardware=T4, model=OPT, workload=Workload(max_latency_s=point.estimate.latency_s))
    assert again.estimate.throughput_tok_per_s <= point.bound_tok_per_s * (1 + 1e-9)


def test_a_latency_limit_ends_the_frontier() -> None:
    ceiling = 120.0
    short = frontier(hardware=T4, model=OPT, workload=Workload(max_latency_s=ceiling), points=4)
    assert all(point.estimate.latency_s <= ceiling * (1 + 1e-6) for point in short.points)


def test_the_table_and_the_json_agree(found: Frontier) -> None:
    frame, data = found.to_frame(), found.to_dict()
    assert list(frame["throughput_tok_per_s"]) == [point["throughput_tok_per_s"] for point in data["points"]]
    assert data["schema"] == "tierwise.frontier/1"


def test_one_point_is_no_frontier() -> None:
    with pytest.raises(InputError, match="points is 1"):
        frontier(hardware=T4, model=OPT, points=1)
