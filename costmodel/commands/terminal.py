"""Printing for people: at most 100 columns, coloured only where a terminal shows it (NO_COLOR is respected)."""

import sys

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from costmodel.commands import outcome

WIDTH = 100

Renderable = RenderableType

LABEL, GOOD, BAD, FAINT = "bold", "bold green", "bold red", "dim"


def show(*parts: Renderable) -> None:
    """Print to standard output."""
    console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False)
    console.width = min(console.width, WIDTH)
    with console.capture() as captured:
        console.print(Group(*parts))
    # rich pads cells with blanks, which would be left over in files and copies.
    outcome.say("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))


def table(*headings: str) -> Table:
    """A table without frame; a heading that starts with ``>`` is right-aligned."""
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style=LABEL)
    for heading in headings:
        to_right = heading.startswith(">")
        made.add_column(Text(heading.removeprefix(">")), justify="right" if to_right else "left", no_wrap=True)
    return made


def facts(*rows: tuple[str, str | Text | Renderable]) -> Table:
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
