"""Looking whether this machine's cores share a cache."""

import os
import time

import pytest

from runtime.shared_cache import PERIOD_S, SharedWrite, Watch

linux = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two cores and a say in them"
)


@linux
def test_a_look_finds_a_rate_that_memory_can_have_and_leaves_the_thread_free() -> None:
    before = os.sched_getaffinity(0)
    rate = SharedWrite().rate()
    assert rate is not None
    assert 1e8 < rate < 1e12
    assert os.sched_getaffinity(0) == before


def test_one_core_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert SharedWrite().rate() is None


@linux
def test_cores_that_are_taken_away_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    write = SharedWrite()
    before = os.sched_getaffinity(0)

    def gone(pid: int, cores: set[int]) -> None:
        raise OSError("no such core")

    monkeypatch.setattr(os, "sched_setaffinity", gone)
    assert write.rate() is None
    monkeypatch.undo()
    assert write.rate() is not None
    assert os.sched_getaffinity(0) == before


@linux
def test_a_thread_that_was_bound_meanwhile_stays_bound() -> None:
    write, before = SharedWrite(), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert write.rate() is None
        assert os.sched_getaffinity(0) == {min(before)}
    finally:
        os.sched_setaffinity(0, before)


@linux
def test_a_watch_tells_what_it_saw_within_a_time_and_ends() -> None:
    with Watch() as watch:
        began = time.monotonic()
        time.sleep(3.5 * PERIOD_S)
        first = watch.between(began, time.monotonic())
        time.sleep(1.5 * PERIOD_S)
        assert watch.between(began - 10.0, began) == []
    assert 2 <= len(first) <= 4
    assert not watch._thread.is_alive()
