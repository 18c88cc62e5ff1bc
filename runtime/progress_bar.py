"""A bar on standard error with what is done, the pace and the time left, where a person is watching."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

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


def pace(tokens_per_s: float, left_s: float | None) -> str:
    """``"12.3 token/s, 3 min 20 s left"``; the time only once it is known."""
    left = "" if left_s is None else f", {units.format_seconds(round(left_s))} left"
    return f"{tokens_per_s:.3g} token/s{left}"
