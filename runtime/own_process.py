"""A call in a process of its own: what it measures is not what earlier ones left, and what it breaks is broken there.

Compiled kernels, scratch memory and the holes of the heap stay with a process. What is called second finds them there,
and takes less memory than it would alone.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import connection, forkserver
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from costmodel.commands import signals
from costmodel.errors import TierwiseError

_PRELOADED = ["runtime.trial"]
"""Imported once, by a server of which every process is a copy: torch takes seconds."""

_PATIENCE_S = 10.0
"""Time to tidy up in, for a process that is told to end."""

T = TypeVar("T")


def call(function: Callable[..., T], *arguments: Any) -> T:
    """``function(*arguments)`` there; all three are pickled, and so is what it returns or raises.

    The process ends with this one, and when this call is interrupted: told to, it may tidy up. Ctrl-C is not for it.

    Raises:
        TierwiseError: it ended without an answer (the kernel ends a process for want of memory).

    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    with _keyboard_held():
        forkserver.ensure_running()
    answer, end = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(end, function, arguments), daemon=True)
    process.start()
    end.close()
    try:
        returned, value = answer.recv()
        process.join(_PATIENCE_S)
    except EOFError:
        process.join(_PATIENCE_S)
        raise TierwiseError(_ended(process.exitcode)) from None
    finally:
        answer.close()
        _stop(process)
    if not returned:
        raise value
    found: T = value
    return found


@contextlib.contextmanager
def _keyboard_held() -> Iterator[None]:
    """What is started within gets no SIGINT and no SIGHUP, from its first moment on: this process acts on them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(end: connection.Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    """In the process: call, and send whether that returned, and what."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(signals.Terminated), signals.as_exceptions():
        try:
            result: tuple[bool, object] = True, function(*arguments)
        except Exception as error:
            if not isinstance(error, TierwiseError):
                error.add_note("".join(traceback.format_exception(error)))
            result = False, error
        end.send(result)


def _end_with_parent() -> None:
    """Leave at once when the process that called is gone, however it ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(signals.INTERRUPTED)


def _stop(process: BaseProcess) -> None:
    """See to it that the process is gone."""
    for stop in (process.terminate, process.kill):
        if process.is_alive():
            stop()
            process.join(_PATIENCE_S)


def _ended(exit_code: int | None) -> str:
    """What is known of a process that gave no answer."""
    if exit_code == -signal.SIGKILL:
        return "the run's process was killed: the system may have wanted its memory, so give it less or free some"
    how = f"signal {-exit_code}" if exit_code is not None and exit_code < 0 else f"exit code {exit_code}"
    return f"the run's process ended without a result ({how})"
