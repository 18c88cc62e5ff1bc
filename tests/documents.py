"""What a document shows to be typed: its command lines, what it says they print, its Python, by line number."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAMS = ("tierwise", "make", "python", "python3", "pip")
"""A line that begins with one of these, a path before it or not, is a command."""


@dataclass(frozen=True)
class Shown:
    """A piece of a document: ``kind`` is command, python, listing or other; ``output`` is what follows a command."""

    where: str
    kind: str
    text: str
    output: str = ""

    @property
    def words(self) -> list[str]:
        """A command as a shell would cut it, comments left out."""
        return shlex.split(self.text, comments=True)

    def __str__(self) -> str:
        return f"{self.where}: {shlex.join(self.words)}" if self.kind == "command" else f"{self.where}: {self.kind}"


def shown(path: Path) -> list[Shown]:
    """Every command, block of Python and listing of a Markdown document; ``other`` is what is none of these."""
    name = path.relative_to(ROOT).as_posix()
    found: list[Shown] = []
    for first, lines in _blocks(path.read_text(encoding="utf-8").splitlines()):
        found += _pieces(name, first, lines)
    return found


def _blocks(lines: list[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, lines without indentation) of fenced blocks, and of lines indented by four."""
    place = 0
    while place < len(lines):
        line = lines[place]
        first = place
        if line.startswith("```"):
            place += 1
            while place < len(lines) and not lines[place].startswith("```"):
                place += 1
            yield first + 2, lines[first + 1 : place]
            place += 1
        elif line.startswith("    ") and (place == 0 or not lines[place - 1].strip()):
            while place < len(lines) and (lines[place].startswith("    ") or not lines[place].strip()):
                place += 1
            block = [line[4:].rstrip() for line in lines[first:place]]
            while not block[-1]:
                block.pop()
            yield first + 1, block
        else:
            place += 1


def _pieces(name: str, first: int, lines: list[str]) -> Iterator[Shown]:
    """A block as commands with their outputs, or as one piece."""
    text = "\n".join(lines)
    if not is_command(lines[0]):
        kind = "python" if _is_python(lines) else "listing" if re.match(r"[\w/.-]+/\s{2,}\S", lines[0]) else "other"
        yield Shown(f"{name}:{first}", kind, text)
        return
    starts = [number for number, line in enumerate(lines) if is_command(line)]
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        yield Shown(f"{name}:{first + start}", "command", lines[start], "\n".join(lines[start + 1 : stop]).strip("\n"))


def is_command(line: str) -> bool:
    """Whether a line of a block is to be typed into a shell."""
    return re.match(rf"(?:\S*/)?(?:{'|'.join(PROGRAMS)})(?: |$)", line) is not None


def _is_python(lines: list[str]) -> bool:
    return re.match(r"(from|import) \w", lines[0]) is not None
