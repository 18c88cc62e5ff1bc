"""Which runs count where the cores of a machine come apart at times."""

import dataclasses
from pathlib import Path

import pytest

from costmodel.errors import InputError
from costmodel.measurement import Measurement
from costmodel.shared_cache import ORIGIN_KEY, best_rate, is_apart, ran_apart
from costmodel.validation import Validation
from tests.test_costmodel_validation import taking_once, validation

TOGETHER, APART = 18e9, 2.5e9


def beside(rates: list[float], seconds: float, size: int = 1) -> Measurement:
    one = taking_once(seconds, size)
    return dataclasses.replace(one, origin={**one.origin, ORIGIN_KEY: rates})


def validated(*runs: Measurement, repeats: int) -> Validation:
    found = validation(sizes=[1], repeats=repeats)
    for one in runs:
        found = found.with_run(one)
    return found


def test_a_rate_far_below_the_best_was_taken_apart() -> None:
    # What this was first seen on: 10 to 45 GB/s together and 2 to 3 apart, beside a run that keeps both cores busy.
    rates = [10e9, 30e9, 17e9, 19e9, 2e9, 3e9, 20e9, 16e9]
    best = best_rate(rates)
    assert [is_apart(rate, best) for rate in rates] == [False, False, False, False, True, True, False, False]
    assert ran_apart(rates, best)
    assert not ran_apart([*rates, *[best] * 2], best), "a fifth of the looks"
    assert not ran_apart([2e9, best], best), "a single look"
    assert not ran_apart([], best)


def test_runs_of_cores_that_were_apart_are_set_aside() -> None:
    found = validated(
        beside([TOGETHER] * 9 + [APART], 4.0),  # a look in ten is no matter
        beside([TOGETHER] * 5 + [APART] * 5, 9.0),
        beside([APART] * 10, 12.0),
        beside([TOGETHER] * 10, 5.0),
        repeats=4,
    )
    assert found.apart == {1, 2}
    assert found.set_aside == 2
    assert [one.measured.latency_s for one in found.by_policy[0]] == [4.0, 5.0]
    assert found.measurements[0].measured.latency_s == 4.0
    assert not found.left, "half of the runs asked for count"
    summary = found.summary()
    assert summary.set_aside == 2
    assert summary.repeatability is not None
    assert summary.repeatability.worst == pytest.approx(4 / 5 - 1)


def test_a_policy_of_which_too_few_runs_count_is_run_again_in_rounds_up_to_as_often(tmp_path: Path) -> None:
    found = validation(sizes=[1, 2, 4], repeats=2)
    for size, apart in ((1, True), (2, False), (4, True)) * 2:
        assert found.left[0].policy.gpu_batch_size == size
        found = found.with_run(beside([APART if apart else TOGETHER] * 4, 6.0 if apart else 3.0, size))
    # 1 and 4 have none that counts: one more each, then one that still has none.
    assert [one.policy.gpu_batch_size for one in found.left] == [1, 4]
    assert found.planned == 6 + 2
    found = found.with_run(beside([APART] * 4, 6.0, 1))
    assert [one.policy.gpu_batch_size for one in found.left] == [4, 1], "the one that ran less often first"
    found = found.with_run(beside([TOGETHER] * 4, 4.0, 4))
    assert [one.policy.gpu_batch_size for one in found.left] == [1]
    assert [one.measured.latency_s for one in found.measurements] == [6.0, 3.0, 4.0]
    found = found.with_run(beside([APART] * 4, 7.0, 1))
    assert not found.left, "a policy runs four times at most where two were asked for"
    # Without a run that counts, all do.
    assert [len(runs) for runs in found.by_policy] == [4, 2, 1]
    found.save(tmp_path / "v.json")
    assert Validation.from_file(tmp_path / "v.json") == found


@pytest.mark.parametrize("rates", [[APART] * 4, [TOGETHER] * 4, []])
def test_a_machine_that_is_always_the_same_is_not_judged(rates: list[float]) -> None:
    found = validated(beside(rates, 3.0), beside(rates, 4.0), beside(rates, 5.0), repeats=3)
    assert not found.apart
    assert len(found.by_policy[0]) == 3


def test_rates_survive_the_file() -> None:
    one = beside([TOGETHER, APART], 3.0)
    assert Measurement.from_dict(one.to_dict()).shared_write_rates == (TOGETHER, APART)
    assert taking_once(3.0, 1).shared_write_rates == ()


@pytest.mark.parametrize("origin", [[1], {ORIGIN_KEY: "fast"}, {ORIGIN_KEY: [1.0, "fast"]}, {ORIGIN_KEY: [-1.0]}])
def test_rates_that_cannot_be_reckoned_with_are_refused(origin: object) -> None:
    with pytest.raises(InputError, match=r"^m\.json: origin"):
        Measurement.from_dict({**taking_once(3.0, 1).to_dict(), "origin": origin}, where="m.json")
