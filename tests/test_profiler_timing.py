"""Repeats, rounds and budgets, under a clock that the tests turn."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.timing import Figure, Reading, Results, Task, Timer, quartiles, run_rounds, spread_of, time_tasks


@dataclass
class Clock:
    """Time passes only while bodies run."""

    now_s: float = 0.0
    calls: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s

    def work(self, seconds: float | Callable[[], float], name: str = "") -> Callable[[], None]:
        def body() -> None:
            self.now_s += seconds() if callable(seconds) else seconds
            self.calls.append(name)

        return body


def timer(clock: Clock) -> Timer:
    return Timer(now=clock)


def test_steady_work_is_sampled_a_few_times() -> None:
    clock = Clock()
    samples = timer(clock).samples(clock.work(0.1), budget_s=100.0)
    assert samples == pytest.approx([0.1] * 5)
    assert len(clock.calls) == 6  # and once to warm up


def test_unsteady_work_is_sampled_until_the_budget_is_used_up() -> None:
    clock, noise = Clock(), random.Random(0)
    samples = timer(clock).samples(clock.work(lambda: noise.uniform(0.05, 0.15)), budget_s=10.0)
    assert 60 < len(samples) < 140
    assert 10.0 <= clock.now_s < 10.2


def test_short_work_is_repeated_within_a_sample() -> None:
    clock = Clock()
    samples = timer(clock).samples(clock.work(1e-5), budget_s=1.0)
    assert samples == pytest.approx([1e-5] * 5)
    assert len(clock.calls) == 1 + 5 * 200


def test_a_first_call_that_loads_what_it_needs_does_not_decide_the_repeats() -> None:
    clock = Clock()
    first = iter([0.5])
    samples = timer(clock).samples(clock.work(lambda: next(first, 1e-5)), budget_s=2.0)
    assert samples == pytest.approx([1e-5] * 5)
    assert len(clock.calls) == 1 + 1 + 5 * 200  # the warm-up, a call that turns out to be short, five samples


def test_work_longer_than_the_budget_is_its_own_sample() -> None:
    clock = Clock()
    assert timer(clock).samples(clock.work(3.0), budget_s=2.0) == (3.0,)


def test_preparation_is_not_timed() -> None:
    clock = Clock()
    samples = timer(clock).samples(clock.work(0.1), budget_s=3.0, before=clock.work(0.5, "before"))
    assert samples == pytest.approx([0.1] * len(samples))
    assert clock.calls.count("before") == clock.calls.count("")


def test_the_device_is_waited_for() -> None:
    clock = Clock()
    pending: list[float] = []

    def synchronize() -> None:
        clock.now_s += sum(pending)
        pending.clear()

    samples = Timer(now=clock, synchronize=synchronize).samples(lambda: pending.append(0.25), budget_s=9.0)
    assert samples == pytest.approx([0.25] * 5)


@pytest.mark.parametrize(
    ("values", "expected"), [([3.0], (3.0, 3.0)), ([1, 2, 3, 4, 5], (2, 4)), ([0.0, 10.0], (2.5, 7.5))]
)
def test_quartiles_by_hand(values: list[float], expected: tuple[float, float]) -> None:
    assert quartiles(values) == expected


@given(st.lists(st.floats(0.1, 1e6), min_size=1, max_size=20), st.floats(0.1, 1e3))
def test_spread_does_not_depend_on_the_unit(values: list[float], factor: float) -> None:
    assert spread_of([value * factor for value in values]) == pytest.approx(spread_of(values), rel=1e-6, abs=1e-9)


def test_figure_in_its_unit() -> None:
    figure = Figure(name="copy", at=(("bytes", 100),), unit="bytes/s", work=100.0, samples=(1.0, 2.0, 4.0))
    assert (figure.median, figure.seconds, figure.number("bytes")) == (50.0, 2.0, 100)
    assert figure.spread == pytest.approx((75.0 - 37.5) / 50.0)
    assert figure.wide


@pytest.mark.parametrize(("samples", "wide"), [((1.0, 1.01, 0.99), False), ((1.0, 1.5, 0.5), True), ((1.0, 1.0), True)])
def test_few_or_scattered_samples_are_marked(samples: tuple[float, ...], wide: bool) -> None:
    assert Figure(name="share", at=(), unit="times", work=None, samples=samples).wide is wide


def reading(name: str, *samples: float, **at: str | int) -> Reading:
    return Reading(name=name, at=tuple(at.items()), unit="s", work=None, samples=samples)


def test_rounds_are_pooled_and_selected_by_place() -> None:
    results = Results()
    results.add([reading("read", 1.0, bytes=10, method="direct"), reading("read", 5.0, bytes=2, method="direct")])
    results.add(
        [reading("read", 2.0, 3.0, bytes=10, method="direct"), reading("read", 9.0, bytes=3, method="buffered")]
    )
    results.add([reading("read", bytes=99, method="direct")])
    found = results.select("read", method="direct")
    assert [(figure.number("bytes"), figure.samples) for figure in found] == [(2, (5.0,)), (10, (1.0, 2.0, 3.0))]


def tasks(clock: Clock, *seconds: float) -> list[Task]:
    return [
        Task(name="t", at={"rows": index}, unit="FLOP/s", work=cost, body=clock.work(cost, str(index)))
        for index, cost in enumerate(seconds)
    ]


def test_tasks_share_the_budget() -> None:
    clock, noise = Clock(), random.Random(1)
    made = [
        Task(name=str(index), at={}, unit="FLOP/s", work=1.0, body=clock.work(lambda: noise.uniform(0.1, 0.3)))
        for index in range(4)
    ]
    found = time_tasks(made, 4, timer=timer(clock), budget_s=40.0, previous=Results())
    assert clock.now_s == pytest.approx(40.0, abs=1.5)
    assert [len(r.samples) for r in found] == pytest.approx([50] * 4, abs=12)


def test_a_task_that_would_overrun_is_left_out() -> None:
    clock = Clock()
    found = time_tasks(tasks(clock, 0.1, 0.2, 50.0), 3, timer=timer(clock), budget_s=10.0, previous=Results())
    assert [dict(r.at)["rows"] for r in found] == [0, 1]
    assert clock.now_s < 10.0


def test_the_first_of_a_name_is_measured_once_at_any_cost() -> None:
    clock, results = Clock(), Results()
    results.add(time_tasks(tasks(clock, 50.0), 1, timer=timer(clock), budget_s=1.0, previous=results))
    assert clock.now_s == 50.0
    assert time_tasks(tasks(clock, 50.0), 1, timer=timer(clock), budget_s=1.0, previous=results) == []


@dataclass
class FakeProbe:
    clock: Clock
    title: str
    weight: float
    cost_s: float | None = None
    budgets: list[float] = field(default_factory=list)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        self.budgets.append(budget_s)
        self.clock.now_s += budget_s if self.cost_s is None else self.cost_s
        return [reading(self.title, budget_s)]


def test_rounds_use_the_whole_budget_by_weight() -> None:
    clock, told = Clock(), []
    probes = [FakeProbe(clock, "one", 1.0), FakeProbe(clock, "three", 3.0)]
    results = run_rounds(probes, timer=timer(clock), budget_s=80.0, rounds=2, progress=told.append)
    assert clock.now_s == pytest.approx(80.0)
    assert [probe.budgets for probe in probes] == [pytest.approx([10.0, 10.0]), pytest.approx([30.0, 30.0])]
    assert told == ["one", "three", "one", "three"]
    assert len(results.select("three")[0].samples) == 2


def test_what_one_probe_overruns_is_taken_from_the_others() -> None:
    clock = Clock()
    probes = [FakeProbe(clock, "slow", 1.0, cost_s=40.0), FakeProbe(clock, "rest", 1.0)]
    run_rounds(probes, timer=timer(clock), budget_s=120.0, rounds=2, progress=lambda title: None)
    assert clock.now_s == pytest.approx(120.0)
    assert probes[0].budgets == pytest.approx([30.0, 80.0 * 2 / 3 / 2])
    assert probes[1].budgets == pytest.approx([80.0 / 3, 120.0 - 40.0 - 80.0 / 3 - 40.0])


def test_a_probe_that_no_longer_fits_is_skipped_after_the_first_round() -> None:
    clock = Clock()
    probes = [FakeProbe(clock, "slow", 1.0, cost_s=40.0), FakeProbe(clock, "rest", 1.0)]
    run_rounds(probes, timer=timer(clock), budget_s=100.0, rounds=2, progress=lambda title: None)
    assert clock.now_s == pytest.approx(100.0)
    assert [len(probe.budgets) for probe in probes] == [1, 2]
