"""Printing for people: at most 100 columns, coloured only where a terminal shows it (NO_COLOR is respected)."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from costmodel.commands import outcome

WIDTH = 100

Renderable = RenderableType
Row = tuple[str, Renderable]
"""A label and what stands beside it."""

LABEL, GOOD, BAD, FAINT = "bold", "bold green", "bold red", "dim"


def show(*parts: Renderable) -> None:
    """Print to standard output."""
    there = Console(file=sys.stdout)
    text = io.StringIO()
    console = Console(
        file=text,
        width=min(there.width, WIDTH),
        force_terminal=there.is_terminal,
        color_system=there.color_system,  # type: ignore[arg-type]
        highlight=False,
        emoji=False,
        markup=False,
    )
    console.print(Group(*parts))
    # rich pads cells with blanks, which would be left over in files and copies.
    outcome.say("".join(f"{line.rstrip()}\n" for line in text.getvalue().splitlines()))


def table(*headings: str) -> Table:
    """A table without frame; a heading that starts with ``>`` is right-aligned."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style=LABEL)
    for heading in headings:
        to_right = heading.startswith(">")
        made.add_column(Text(heading.removeprefix(">")), justify="right" if to_right else "left", no_wrap=True)
    return made


def facts(*rows: Row) -> Table:
    """Labels on the left, sentences on the right, which wrap under themselves."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style=LABEL, no_wrap=True, min_width=11)
    made.add_column()
    for label, content in rows:
        made.add_row(label, Text(content) if isinstance(content, str) else content)
    return made


def heading(text: str, style: str = LABEL) -> Text:
    """A line above a section, after an empty one."""
    return Text(f"\n{text}", style=style)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error, if a person is watching there; call it with steps done and to do."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
