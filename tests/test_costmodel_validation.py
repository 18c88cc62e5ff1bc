"""Drawing policies, and statistics against values worked out by hand."""

import dataclasses
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import InfeasibleError, InputError
from costmodel.estimate import PHASES, Estimate
from costmodel.formulations.base import LINKS, RESOURCES
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.policy import TIERS, Policy, Split
from costmodel.validation import Drawn, Errors, Space, Validation, draw, frame, summary
from costmodel.validation.statistics import WAITING, errors_of, errors_of_repeats, gaps, middle, ranking
from costmodel.workload import Workload

MIB = 2**20
LAPTOP = with_overrides(Hardware.from_catalog("cpu-laptop"), gpu_memory=200 * MIB, cpu_memory=100 * MIB)
MODEL = ModelSpec.from_catalog("opt-125m")
WORKLOAD = Workload(prompt_len=64, gen_len=8)
POLICY = Policy.from_percent((50, 20, 50, 50, 100, 0), gpu_batch_size=2, num_gpu_batches=1)


def space(**changes: object) -> Space:
    given = {"hardware": LAPTOP, "model": MODEL, "workload": WORKLOAD, "max_seconds": 2.0, "usable_fraction": 0.95}
    return Space(**{**given, "switches": {}, **changes})  # type: ignore[arg-type]


# ------------------------------------------------------------------ drawing


@pytest.fixture(scope="module")
def drawn() -> tuple[Drawn, ...]:
    return draw(space(), count=30, seed=7)


def test_what_is_drawn_fits_and_is_fast_enough(drawn: tuple[Drawn, ...]) -> None:
    for one in drawn:
        cost = space().predict(one.policy)
        assert cost is not None
        assert cost.feasible
        assert cost.latency_s <= 2.0


def test_the_same_seed_draws_the_same_policies(drawn: tuple[Drawn, ...]) -> None:
    assert draw(space(), count=30, seed=7) == drawn
    assert draw(space(), count=30, seed=8) != drawn


def test_the_search_comes_first_then_its_neighbours_and_the_rest(drawn: tuple[Drawn, ...]) -> None:
    assert (drawn[0].origin, drawn[0].about) == ("searched", "best")
    origins = [one.origin for one in drawn]
    assert origins.count("drawn") >= 18
    assert origins.count("neighbour") == 6
    assert len({json.dumps(one.policy.to_dict()) for one in drawn}) == 30


def test_no_two_do_the_same_where_everything_fits_the_first_tier() -> None:
    roomy = with_overrides(LAPTOP, gpu_memory=4096 * MIB)
    done = [
        one.policy.replace(cpu_attention=one.policy.cpu_attention and one.policy.cache.gpu < 1)
        for one in draw(space(hardware=roomy), count=10, seed=0)
    ]
    assert all(one != other for place, one in enumerate(done) for other in done[:place])


def test_every_stratum_is_there(drawn: tuple[Drawn, ...]) -> None:
    policies = [one.policy for one in drawn]
    for kind in ("weights", "cache", "activations"):
        mostly = {max(TIERS, key=lambda tier: getattr(getattr(one, kind), tier)) for one in policies}
        assert mostly == set(TIERS), kind
    for switch in ("compress_weights", "compress_cache", "cpu_attention"):
        on = sum(getattr(one, switch) for one in policies)
        assert 6 <= on <= 24, switch
    assert 2 <= sum(not one.overlap for one in policies) <= 15
    assert {one.num_gpu_batches == 1 for one in policies} == {True, False}
    assert len({one.gpu_batch_size.bit_length() for one in policies}) >= 4


def test_switches_that_are_given_are_kept() -> None:
    switches = {"compress_weights": False, "compress_cache": False, "overlap": True}
    for one in draw(space(switches=switches), count=12, seed=0):
        assert {name: getattr(one.policy, name) for name in switches} == switches


def test_a_tier_that_is_not_there_holds_nothing() -> None:
    two = with_overrides(LAPTOP, cpu_memory=0)
    for one in draw(space(hardware=two), count=12, seed=0):
        assert (one.policy.weights.cpu, one.policy.cache.cpu, one.policy.activations.cpu) == (0, 0, 0)
        assert not one.policy.cpu_attention


def test_one_policy_is_the_searched_one() -> None:
    (only,) = draw(space(), count=1, seed=0)
    assert only.origin == "searched"


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(InfeasibleError):
        draw(space(max_seconds=1e-6), count=4, seed=0)
    with pytest.raises(InputError, match="count is 0: it must be at least 1"):
        draw(space(), count=0, seed=0)


# ------------------------------------------------------------------ statistics


def cost(
    *,
    prefill_s: float = 1.0,
    decode_s: float = 1.0,
    throughput: float = 10.0,
    peaks: tuple[float, float, float] = (100.0, 0.0, 0.0),
    prefill: dict[str, float] | None = None,
    decode: dict[str, float] | None = None,
) -> Estimate:
    busy = {
        phase: {resource: (given or {}).get(resource, 0.0) for resource in RESOURCES}
        for phase, given in zip(PHASES, (prefill, decode), strict=True)
    }
    return Estimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=prefill_s + decode_s,
        throughput_tok_per_s=throughput,
        decode_throughput_tok_per_s=None,
        blocks=1,
        job_s=prefill_s + decode_s,
        peak_bytes=dict(zip(TIERS, peaks, strict=True)),
        limit_bytes=dict.fromkeys(TIERS, 120.0),
        bytes_moved=dict.fromkeys(LINKS, 0.0),
        busy_s=busy,
        bottleneck={},
        feasible=True,
        violations=tuple(tier for tier, peak in zip(TIERS, peaks, strict=True) if peak > 120),
    )


def run(predicted: Estimate, measured: Estimate, policy: Policy = POLICY) -> Measurement:
    return Measurement(
        model=MODEL,
        dtype="bfloat16",
        workload=WORKLOAD,
        policy=policy,
        hardware="cpu-laptop",
        predicted=predicted,
        measured=measured,
        block_s=((measured.prefill_s, measured.decode_s),),
        resident_bytes={},
        origin={"cpu": {"name": "a processor"}, "commit": "abc", "date": "2026-11-23"},
    )


def of_throughput(predicted: float, measured: float, **busy: dict[str, float]) -> Measurement:
    return run(cost(throughput=predicted), cost(throughput=measured, **busy))  # type: ignore[arg-type]


def test_errors_are_those_worked_out_by_hand() -> None:
    # Sizes sorted: 0, 0.1, 0.2, 0.5. The 90th percentile lies 0.7 of the way from the third to the fourth.
    found = Errors.of([0.1, -0.5, 0.2, 0.0])
    assert found.runs == 4
    assert found.median == pytest.approx(0.15)
    assert found.p90 == pytest.approx(0.2 + 0.7 * 0.3)
    assert found.worst == -0.5
    assert found.bias == pytest.approx(0.05)


def test_no_errors_are_an_error() -> None:
    with pytest.raises(InputError, match="there are no errors to summarise"):
        Errors.of([])


def test_errors_of_a_run() -> None:
    found = errors_of(
        run(
            cost(prefill_s=1.1, decode_s=0.9, throughput=12, peaks=(90, 5, 0)),
            cost(prefill_s=1.0, decode_s=1.0, throughput=10, peaks=(100, 0, 0)),
        )
    )
    expected = {"throughput": 0.2, "prefill": 0.1, "decode": -0.1, "peak gpu": -0.1, "peak cpu": 1.0}
    assert found == pytest.approx(expected)


def test_a_phase_without_steps_and_an_unused_tier_have_no_error() -> None:
    found = errors_of(run(cost(decode_s=0.0), cost(decode_s=1e-6, peaks=(100, 3, 0))))
    assert set(found) == {"throughput", "prefill", "peak gpu"}


def test_regimes_are_the_measured_bottlenecks() -> None:
    runs = [
        of_throughput(11, 10, prefill={"gpu_compute": 1.0}, decode={"disk_read": 0.9}),
        of_throughput(12, 10, prefill={"gpu_compute": 0.5}, decode={"disk_read": 0.9}),
        of_throughput(7, 10, prefill={"disk_read": 0.5}, decode={"disk_read": 0.9}),
    ]
    found = summary(runs)
    assert {name: one["throughput"].runs for name, one in found.regimes.items()} == {"gpu_compute": 1, "disk_read": 2}
    assert found.regimes["disk_read"]["throughput"].worst == pytest.approx(-0.3)
    assert found.regimes["disk_read"]["throughput"].median == pytest.approx(0.25)
    assert found.errors["throughput"].median == pytest.approx(0.2)


def test_with_overlap_the_bottleneck_and_what_it_does_not_hide_explain_the_gap() -> None:
    one = run(
        cost(decode_s=2.0, decode={"gpu_compute": 1.5, "disk_read": 1.8}),
        cost(decode_s=3.0, decode={"gpu_compute": 1.0, "disk_read": 2.6}),
    )
    # The disk took 0.8 s longer; 0.2 s were not hidden in the prediction and 0.4 s in the run.
    assert gaps(one, "decode") == pytest.approx({"disk_read": 0.8, WAITING: 0.2})


def test_without_overlap_every_resource_explains_its_part() -> None:
    one = run(
        cost(decode_s=3.3, decode={"gpu_compute": 1.5, "disk_read": 1.8}),
        cost(decode_s=3.8, decode={"gpu_compute": 1.0, "disk_read": 2.6}),
        POLICY.replace(overlap=False),
    )
    assert gaps(one, "decode") == pytest.approx({"gpu_compute": -0.5, "disk_read": 0.8, WAITING: 0.2})


def test_attention_on_the_cpu_is_predicted_apart_and_measured_with_the_rest() -> None:
    predicted = cost(decode={"gpu_compute": 0.5, "cpu_compute": 0.3})
    one = run(predicted, cost(decode_s=1.1, decode={"gpu_compute": 0.9}))
    assert gaps(one, "decode") == pytest.approx({"gpu_compute": 0.1, WAITING: 0.0})
    (computing,) = [cause for cause in summary([one]).causes if cause.resource != WAITING]
    assert (computing.resource, computing.predicted_s, computing.measured_s) == ("gpu_compute", 0.8, 0.9)


seconds = st.just(0.0) | st.floats(1e-3, 10)
busy = st.dictionaries(st.sampled_from(RESOURCES), seconds)
costs = st.builds(cost, prefill_s=seconds, decode_s=seconds, prefill=busy, decode=busy)
runs_of_any_kind = st.lists(
    st.builds(run, costs, costs, st.booleans().map(lambda overlap: POLICY.replace(overlap=overlap))),
    min_size=1,
    max_size=6,
)


@given(runs_of_any_kind)
@settings(max_examples=60)
def test_causes_sum_to_the_whole_difference(runs: list[Measurement]) -> None:
    found = summary(runs)
    whole = sum(one.measured.latency_s - one.predicted.latency_s for one in runs)
    assert math.fsum(cause.gap_s for cause in found.causes) == pytest.approx(whole, abs=1e-9)
    assert all(abs(one.gap_s) >= abs(other.gap_s) for one, other in pairwise(found.causes))
    json.dumps(found.to_dict(), allow_nan=False)


def test_ranking_by_hand() -> None:
    # Predicted 4 3 2 1, measured 9 10 5 6: two of six pairs disagree, so tau is (4 − 2) / 6.
    found = ranking([of_throughput(*pair) for pair in ((4, 9), (3, 10), (2, 5), (1, 6))])
    assert found is not None
    assert found.tau == pytest.approx(1 / 3)
    assert found.regret == pytest.approx(0.1)
    assert (found.best_predicted, found.best_measured) == (0, 1)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True), st.floats(0.2, 5))
def test_a_constant_factor_does_not_change_the_order(measured: list[int], factor: float) -> None:
    found = ranking([of_throughput(one * factor, one) for one in measured])
    assert found is not None
    assert found.tau == pytest.approx(1.0)
    assert found.regret == 0


def test_one_run_has_no_ranking() -> None:
    assert ranking([of_throughput(1, 1)]) is None


def test_equal_predictions_rank_nothing() -> None:
    found = ranking([of_throughput(1, 2), of_throughput(1, 3)])
    assert found is not None
    assert (found.tau, found.p_value) == (0.0, 1.0)


def test_runs_over_their_budget_are_counted() -> None:
    runs = [run(cost(), cost(peaks=(130, 0, 0))), run(cost(), cost())]
    assert summary(runs).over_budget == 1


# ------------------------------------------------------------------ repeats


def taking(*seconds: float) -> list[Measurement]:
    """Runs of one policy that decoded 12 tokens in so long, after a prefill of no time."""
    return [run(cost(), cost(prefill_s=0.0, decode_s=one, throughput=12 / one)) for one in seconds]


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [((5,), 5), ((5, 2), 2), ((5, 2, 9), 5), ((9, 2, 5, 3), 3), ((4, 9, 1, 7, 6), 6)],
)
def test_the_middle_run_is_the_one_of_median_latency(seconds: tuple[float, ...], expected: float) -> None:
    assert middle(taking(*seconds)).measured.latency_s == expected


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=9))
def test_at_most_half_of_the_runs_are_faster_and_at_most_half_slower(seconds: list[float]) -> None:
    runs = taking(*seconds)
    found = middle(runs)
    assert any(found is one for one in runs), "a whole run, not a mean of some"
    assert 2 * sum(one < found.measured.latency_s for one in seconds) < len(seconds)
    assert 2 * sum(one > found.measured.latency_s for one in seconds) <= len(seconds)


def test_repeatability_by_hand() -> None:
    # Token/s: 6, 4, 3, the middle run's is 4: +1/2 and −1/4. Then 2 and 3, of which the faster one is the middle: −1/3.
    # A policy that ran once says nothing.
    found = errors_of_repeats([taking(2, 3, 4), taking(6, 4), taking(1)])
    assert found is not None
    assert found.runs == 3
    assert found.worst == pytest.approx(6 / 4 - 1)
    assert found.median == pytest.approx(1 / 3)
    assert found.bias == pytest.approx(-1 / 4)
    assert errors_of_repeats([taking(1), taking(2)]) is None


def test_all_but_repeatability_is_of_middle_runs() -> None:
    sizes, seconds = (1, 2, 4), ((2, 6, 3), (3, 4, 3), (4, 5, 30))
    found = validation(repeats=3)
    for turn in range(3):
        for size, took in zip(sizes, seconds, strict=True):
            found = found.with_run(taking_once(took[turn], size))
    assert [one.measured.latency_s for one in found.measurements] == [3, 3, 5]
    alone = summary(found.measurements)
    assert alone.repeatability is None
    assert found.summary() == dataclasses.replace(alone, repeatability=errors_of_repeats(found.by_policy))
    assert found.summary().repeatability.runs == 6  # type: ignore[union-attr]


@given(st.integers(1, 4), st.integers(1, 4), st.data())
@settings(max_examples=40)
def test_runs_are_made_in_rounds(policies: int, repeats: int, data: st.DataObject) -> None:
    """At any moment every policy has run as often as any other, or once more where it stands before it."""
    sizes = [2**place for place in range(policies)]
    found = validation(sizes=sizes, repeats=repeats)
    assert found.planned == policies * repeats
    for done in range(found.planned):
        assert len(found.left) == found.planned - done
        assert found.progress.startswith(f"{done} of {found.planned} run")
        found = found.with_run(taking_once(data.draw(st.floats(0.1, 9)), found.left[0].policy.gpu_batch_size))
        counts = [len(runs) for runs in found.by_policy]
        assert sum(counts) == done + 1
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=True)
        assert [one.policy.gpu_batch_size for one in found.measurements] == sizes[: len(counts)]
        for runs, size in zip(found.by_policy, sizes, strict=False):
            assert {one.policy.gpu_batch_size for one in runs} == {size}
    assert not found.left


def taking_once(seconds: float, size: int) -> Measurement:
    (one,) = taking(seconds)
    return dataclasses.replace(one, policy=POLICY.replace(gpu_batch_size=size))


def test_the_frame_has_a_row_for_every_run() -> None:
    table = frame(
        [of_throughput(11, 10, prefill={"gpu_compute": 1.0}), of_throughput(12, 10, decode={"disk_read": 1.0})]
    )
    assert table["regime"].tolist() == ["gpu_compute", "disk_read"]
    assert table["throughput_error"].tolist() == pytest.approx([0.1, 0.2])
    assert table["predicted_throughput_tok_per_s"].tolist() == [11, 12]
    assert table["throughput_tok_per_s"].tolist() == [10, 10]
    assert table["peak_disk_error"].isna().all()


# ------------------------------------------------------------------ the file


def validation(*, sizes: Sequence[int] = (1, 2, 4), repeats: int = 1) -> Validation:
    drawn = tuple(Drawn(origin="drawn", about="", policy=POLICY.replace(gpu_batch_size=size)) for size in sizes)
    return Validation(request={"seed": 3}, hardware=LAPTOP, drawn=drawn, repeats=repeats)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    begun = validation()
    some = begun.with_run(run(cost(), cost(decode={"gpu_compute": 1.0}), POLICY.replace(gpu_batch_size=1)))
    for found in (begun, some):
        found.save(tmp_path / "v.json")
        again = Validation.from_file(tmp_path / "v.json")
        assert again == found
        assert again.left == found.drawn[len(found.measurements) :]
    assert json.loads((tmp_path / "v.json").read_text())["summary"]["runs"] == 1


def test_a_file_has_all_runs_and_one_without_repeats_is_of_one_round(tmp_path: Path) -> None:
    found = validation(repeats=2)
    for seconds, size in ((3, 1), (1, 2), (2, 4), (1, 1)):
        found = found.with_run(taking_once(seconds, size))
    found.save(tmp_path / "v.json")
    data = json.loads((tmp_path / "v.json").read_text())
    assert [one["measured"]["decode_s"] for one in data["measurements"]] == [3, 1, 2, 1]
    assert data["summary"]["runs"] == 3
    assert data["summary"]["repeatability"]["worst"] == pytest.approx(1 / 3 - 1)
    again = Validation.from_file(tmp_path / "v.json")
    assert again == found
    assert [one.policy.gpu_batch_size for one in again.left] == [2, 4]
    # As written before there were repeats.
    del data["repeats"], data["summary"]["repeatability"], data["measurements"][3]
    (tmp_path / "v.json").write_text(json.dumps(data))
    old = Validation.from_file(tmp_path / "v.json")
    assert (old.repeats, old.left) == (1, ())
    assert old.measurements == old.runs == found.runs[:3]
    assert old.summary().repeatability is None


def test_too_many_runs_and_too_few_repeats_are_refused(tmp_path: Path) -> None:
    found = validation(sizes=[1, 2], repeats=2)
    for size in (1, 2, 1, 2):
        found = found.with_run(taking_once(1, size))
    with pytest.raises(InputError, match=r"2 policies to be run 2 times each, but more measurements \(5\)"):
        found.with_run(taking_once(1, 1))
    with pytest.raises(InputError, match=r"2 policies, but more measurements \(4\)"):
        dataclasses.replace(found, repeats=1)
    with pytest.raises(InputError, match=r"measurements\[2\] is not a run of policies\[0\]"):
        dataclasses.replace(found, runs=(*found.runs[:2], found.runs[1]))
    with pytest.raises(InputError, match="repeats is 0: it must be at least 1"):
        validation(repeats=0)
    (tmp_path / "v.json").write_text(json.dumps(validation().to_dict() | {"repeats": "twice"}))
    with pytest.raises(InputError, match="v.json: this is no validation"):
        Validation.from_file(tmp_path / "v.json")


def test_runs_of_other_policies_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"measurements\[0\] is not a run of policies\[0\]"):
        validation().with_run(run(cost(), cost(), POLICY.replace(gpu_batch_size=4)))
    (tmp_path / "v.json").write_text('{"schema": "tierwise.validation/1"}')
    with pytest.raises(InputError, match="v.json: this is no validation: 'request'"):
        Validation.from_file(tmp_path / "v.json")
    data = validation().to_dict()
    data["policies"][1]["policy"]["gpu_batch_size"] = 0
    (tmp_path / "v.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"policies\[1\]: policy: gpu_batch_size is 0"):
        Validation.from_file(tmp_path / "v.json")


def test_splits_of_neighbours_are_splits() -> None:
    from costmodel.validation.draw import _moved

    assert _moved(Split(gpu=0.5, cpu=0.0, disk=0.5), "gpu", "cpu", 0.5) == Split(gpu=0.25, cpu=0.25, disk=0.5)
    assert _moved(Split(gpu=0.5, cpu=0.0, disk=0.5), "cpu", "gpu", 0.5) is None
    assert dataclasses.asdict(_moved(Split(gpu=1.0, cpu=0.0, disk=0.0), "gpu", "disk", 1.0)) == {  # type: ignore[call-overload]
        "gpu": 0.0,
        "cpu": 0.0,
        "disk": 1.0,
    }
