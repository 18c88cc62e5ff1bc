"""Ends from outside: Ctrl-C, SIGTERM and SIGHUP end a command tidily once it runs, and at once while it is imported.

Imported before anything that takes long: in a process that is one of our commands, this module sees to signals from
then on. It is the standard library's only, and in other processes it changes nothing until a command is called.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

INTERRUPTED = 130
"""The exit code: 128 and the number of SIGINT, by which all three count as an interrupt."""

INTERRUPTED_MESSAGE = "interrupted"

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PACKAGES = ("costmodel", "runtime", "profiler")
_SCRIPT = "tierwise"

_Handler = Callable[[int, FrameType | None], object]


class Terminated(KeyboardInterrupt):
    """The process is to end: unlike Ctrl-C, which may mean less than that."""


@contextmanager
def as_exceptions() -> Iterator[None]:
    """Ctrl-C raises :class:`KeyboardInterrupt` in the main thread, SIGTERM and SIGHUP :class:`Terminated`."""
    with _handled({signal.SIGINT: signal.default_int_handler, signal.SIGTERM: _terminate, signal.SIGHUP: _terminate}):
        yield


@contextmanager
def at_once() -> Iterator[None]:
    """All three end the process, in one sentence: for imports, where an exception may come out as another one.

    Only for moments at which there is nothing to tidy up.
    """
    with _handled(dict.fromkeys(_NUMBERS, _end)):
        yield


@contextmanager
def _handled(handlers: dict[signal.Signals, _Handler]) -> Iterator[None]:
    old = _install(handlers)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _install(handlers: dict[signal.Signals, _Handler]) -> dict[signal.Signals, _Handler | int | None]:
    """Set handlers and return the old ones; ignored signals stay so (``nohup``), and other threads can set none."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    old = {number: signal.getsignal(number) for number in handlers}
    old = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}
    for number in old:
        signal.signal(number, handlers[number])
    return old


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, f"error: {INTERRUPTED_MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    """Whether this process was started as ``python -m`` one of our packages, or as the console script."""
    first = sys.argv[0] if sys.argv else ""
    if first == "-m":  # Python looks for the module, for which it imports the packages above it
        return any(part.partition(".")[0] in _PACKAGES for part in sys.orig_argv)
    return Path(first).name == _SCRIPT


if _is_command():
    _install(dict.fromkeys(_NUMBERS, _end))
