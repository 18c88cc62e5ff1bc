"""Ctrl-C that stops an answer without ending the program."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


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
