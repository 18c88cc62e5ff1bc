"""Work beside work: who is called, what is raised, and what is left."""

import contextlib
import threading
from collections.abc import Iterator, Sequence

import pytest

from profiler.overlap import LEAST_CALLS, Overlap, Work, beside
from profiler.timing import Results, Timer


class Counted:
    """Work that counts its calls and the threads that make them."""

    def __init__(self, name: str) -> None:
        self.calls = 0
        self.threads: set[str] = set()
        self.work = Work(name=name, call=self._call)

    def _call(self) -> None:
        self.calls += 1
        self.threads.add(threading.current_thread().name)


@contextlib.contextmanager
def pairs_of(*pairs: tuple[Work, Work]) -> Iterator[Sequence[tuple[Work, Work]]]:
    yield pairs


def test_both_run_alone_and_together_however_short_the_slice() -> None:
    one, other = Counted("one"), Counted("other")
    slowdowns = beside(one.work, other.work, timer=Timer(), slice_s=0.0)
    assert all(slowdown > 0 for slowdown in slowdowns)
    assert one.calls >= 2 * LEAST_CALLS
    assert other.calls >= 2 * LEAST_CALLS
    assert one.threads == {threading.current_thread().name}
    assert other.threads == {threading.current_thread().name, "tierwise-overlap"}


def test_slowdown_is_time_together_over_time_alone() -> None:
    """A clock that counts one second a call alone and three beside: exact, whatever the threads do."""

    class Clock:
        now_s = 0.0

    lock = threading.Lock()

    def call() -> None:
        together = any(thread.name == "tierwise-overlap" for thread in threading.enumerate())
        with lock:
            Clock.now_s += 3.0 if together else 1.0

    def call_other() -> None:
        if threading.current_thread().name == "tierwise-overlap":
            threading.Event().wait(0.001)
        else:
            Clock.now_s += 4.0

    one, other = Work(name="one", call=call), Work(name="other", call=call_other)
    slowdown, _ = beside(one, other, timer=Timer(now=lambda: Clock.now_s + 1e-9), slice_s=4.0)
    assert slowdown == pytest.approx(3.0)


def test_readings_name_both_sides() -> None:
    one, other, third = Counted("compute"), Counted("read"), Counted("copy")
    probe = Overlap(lambda: pairs_of((one.work, other.work), (other.work, third.work)), weight=1.0)
    found = probe.run(Timer(), 0.0, Results())
    assert [dict(reading.at) for reading in found] == [
        {"work": "compute", "beside": "read"},
        {"work": "read", "beside": "compute"},
        {"work": "read", "beside": "copy"},
        {"work": "copy", "beside": "read"},
    ]


def test_error_of_the_background_is_raised_in_the_caller() -> None:
    calls: list[str] = []

    def fail() -> None:
        calls.append(threading.current_thread().name)
        if calls[-1] == "tierwise-overlap":
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        beside(Counted("one").work, Work(name="other", call=fail), timer=Timer(), slice_s=0.0)
    assert "tierwise-overlap" not in {thread.name for thread in threading.enumerate()}


def test_error_of_the_foreground_ends_the_background() -> None:
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        if any(thread.name == "tierwise-overlap" for thread in threading.enumerate()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        beside(Work(name="one", call=fail), Counted("other").work, timer=Timer(), slice_s=0.0)
    assert "tierwise-overlap" not in {thread.name for thread in threading.enumerate()}
