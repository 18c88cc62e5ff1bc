"""Waiting for cores that share a cache, on machines whose rates the tests make up."""

from collections.abc import Iterator
from itertools import chain, repeat

import pytest

from profiler.steadiness import ATTEMPTS, LOOKS, Steadiness
from profiler.timing import Timer

TOGETHER, APART = 18e9, 2.5e9


class Machine:
    """Time passes by waiting and by measuring; ``rates`` is what each look finds."""

    def __init__(self, rates: Iterator[float], *, first: float = TOGETHER) -> None:
        self.now_s, self.measured, self._rates = 0.0, 0, chain(repeat(first, LOOKS), rates)

    def steadiness(self, patience_s: float) -> Steadiness:
        return Steadiness(lambda: next(self._rates), patience_s=patience_s, now=lambda: self.now_s, sleep=self._pass)

    def _pass(self, seconds: float) -> None:
        self.now_s += seconds

    def measure(self) -> int:
        self.now_s += 1.0
        self.measured += 1
        return self.measured


def test_a_steady_machine_is_measured_once_and_nothing_is_lost() -> None:
    machine = Machine(repeat(TOGETHER))
    steadiness = machine.steadiness(10.0)
    assert [steadiness.steadily(machine.measure) for _ in range(3)] == [1, 2, 3]
    assert steadiness.spent_s == 0.0


def test_what_was_found_apart_is_measured_again_when_the_cores_are_together() -> None:
    # After the first figure they are apart for four more looks.
    machine = Machine(chain([APART] * 5, repeat(TOGETHER)))
    steadiness = machine.steadiness(10.0)
    assert steadiness.steadily(machine.measure) == 2
    assert steadiness.spent_s == pytest.approx(1.0 + 4 * 0.05)
    assert machine.now_s == pytest.approx(2.0 + 4 * 0.05)


def test_nothing_is_begun_apart() -> None:
    machine = Machine(chain([TOGETHER], [APART] * 3, repeat(TOGETHER)))
    steadiness = machine.steadiness(10.0)
    assert steadiness.steadily(machine.measure) == 1
    assert steadiness.steadily(machine.measure) == 2
    assert steadiness.spent_s == pytest.approx(3 * 0.05)


def test_patience_ends_and_the_last_figure_counts() -> None:
    machine = Machine(repeat(APART))
    steadiness = machine.steadiness(3.0)
    for _ in range(5):
        steadiness.steadily(machine.measure)
    assert 5 <= machine.measured <= 5 + ATTEMPTS
    assert steadiness.spent_s <= 3.0 + 1.0  # and what was being measured when it ended
    assert steadiness.kept_apart == 5


def test_however_long_it_waits_it_expects_no_less() -> None:
    machine = Machine(chain([APART] * 500, repeat(TOGETHER)))
    steadiness = machine.steadiness(60.0)
    assert steadiness.steadily(machine.measure) == 2
    assert steadiness.kept_apart == 0
    assert steadiness.spent_s == pytest.approx(1.0 + 499 * 0.05)


def test_a_machine_that_begins_apart_is_measured_as_it_is_until_it_was_seen_together() -> None:
    machine = Machine(chain([APART] * 4, [TOGETHER] * 20, [APART] * 3, repeat(TOGETHER)), first=APART)
    steadiness = machine.steadiness(60.0)
    assert [steadiness.steadily(machine.measure) for _ in range(2)] == [1, 2]
    for _ in range(9):
        steadiness.steadily(machine.measure)
    before = machine.measured
    for _ in range(3):
        steadiness.steadily(machine.measure)
    assert machine.measured == before + 3 + 1
    assert steadiness.spent_s == pytest.approx(1.0 + 2 * 0.05)


def test_a_machine_that_cannot_be_looked_at_is_measured_once() -> None:
    steadiness, machine = Steadiness(lambda: None, patience_s=10.0), Machine(repeat(APART))
    assert steadiness.steadily(machine.measure) == 1
    assert steadiness.spent_s == 0.0


def test_a_timer_takes_samples_while_the_machine_is_steady() -> None:
    machine = Machine(chain([APART] * 2, repeat(TOGETHER)))
    steadiness = machine.steadiness(60.0)
    timer = Timer(now=lambda: machine.now_s - steadiness.spent_s, steadiness=steadiness)
    seconds = iter(chain([3.0] * 6, repeat(1.0)))
    samples = timer.samples(lambda: machine._pass(next(seconds)), budget_s=100.0)
    assert samples == pytest.approx([1.0] * 5)
