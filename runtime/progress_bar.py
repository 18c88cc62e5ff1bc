"""A bar on standard error with what is done, the pace and the time left, where a person is watching."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from costmodel import units


@contextmanager
def bar(title: str) -> Iterator[Callable[[float, str], None] | None]:
    """Call what this yields with the share that is done and what to say beside it; ``None``: nobody watches."""
    console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[beside]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=1.0, beside="")
        yield lambda share, beside: progress.update(task, completed=share, beside=beside)


@contextmanager
def tokens(title: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar of tokens; call what this yields with the new ones so far and the most there can be."""
    start = time.monotonic()
    with bar(title) as show:

        def report(done: int, at_most: int) -> None:
            seconds = time.monotonic() - start
            rate = done / seconds if seconds > 0 else 0.0
            if show is not None:
                show(done / max(1, at_most), pace(rate, (at_most - done) / rate if rate > 0 else None))

        yield None if show is None else report


class Conversions:
    """A bar of bytes that comes with the first of some and goes with the last; call it with what, done and total."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False, emoji=False, markup=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)

    def __call__(self, what: str, done: int, total: int) -> None:
        if not self._console.is_terminal:
            return
        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._task = self._progress.add_task(what, total=total)
            self._progress.start()
        self._progress.update(self._task, description=what, completed=done, total=total)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def pace(tokens_per_s: float, left_s: float | None) -> str:
    """``"12.3 token/s, 3 min 20 s left"``; the time only once it is known."""
    left = "" if left_s is None else f", {units.format_seconds(round(left_s))} left"
    return f"{tokens_per_s:.3g} token/s{left}"
