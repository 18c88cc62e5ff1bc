"""How a command ends: its exit code, one line on standard error where something is wrong, never a traceback.

0 done   2 bad input   3 nothing fits   4 the solver failed   130 interrupted   141 the reader left
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

from costmodel.commands import signals
from costmodel.errors import TierwiseError

READER_LEFT = 141

_ASCII = str.maketrans({"→": ">", "×": "x", "·": ";", "–": "-", "−": "-", "…": "...", "≥": ">=", "µ": "u", "─": "-"})


def ended(body: Callable[[], int]) -> int:
    """Run a command and return its exit code."""
    try:
        with signals.as_exceptions():
            code = _code_of(body)
            sys.stdout.flush()
    except TierwiseError as error:
        say_error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        say_error(signals.INTERRUPTED_MESSAGE)
        return signals.INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        _leave_stdout()
        return READER_LEFT
    return code


def _code_of(body: Callable[[], int]) -> int:
    """What ``body`` returns, or the code that --help and --version leave with."""
    try:
        return body()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0


def say_error(message: str) -> None:
    """One line on standard error."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


@contextlib.contextmanager
def patience(message: str, *, after_s: float = 2.0) -> Iterator[None]:
    """Say ``message`` on standard error if the work takes long and a person is watching there."""
    if not sys.stderr.isatty():
        yield
        return
    timer = threading.Timer(after_s, lambda: print(message, file=sys.stderr))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def say(text: str) -> None:
    """Write text to standard output; what its encoding lacks is replaced."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        text = text.translate(_ASCII).encode(encoding, errors="replace").decode(encoding)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _leave_stdout()
        raise TierwiseError(f"standard output cannot be written: {error.strerror or error}") from None


def _leave_stdout() -> None:
    """Let the interpreter flush what is left into nothing when it shuts down."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
