"""Ends from outside: SIGTERM and SIGHUP tidy up as Ctrl-C does, and Ctrl-C can stop an answer without the program."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process is to end: unlike Ctrl-C, which may mean less than that."""


@contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`Terminated` in the main thread; elsewhere nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Terminated

    old = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Stopped(Exception):  # noqa: N818  it is no error
    """A person stopped what :func:`stoppable` surrounds."""


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """The first Ctrl-C only makes the function that this yields raise :class:`Stopped`; a second one interrupts.

    The engine calls that function between two steps, where it can stop without leaving transfers behind.
    """
    asked = threading.Event()

    def check() -> None:
        if asked.is_set():
            raise Stopped

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield check
        return
    old = signal.signal(signal.SIGINT, ask)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, old)
