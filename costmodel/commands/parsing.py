"""Reading flags: a parser whose every complaint is one sentence, and the kinds of values that flags take."""

import argparse
import difflib
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import costmodel
from costmodel import units
from costmodel.errors import InputError

FIGURE_FORMATS = ("png", "pdf", "svg")
STANDARD_OUTPUT = "-"

MOST_TOKENS = 1_000_000
"""Longest prompt or generation: every decode step is evaluated on its own."""

_LARGEST = {"bytes": 1e18, "bytes/s": 1e18}
_SMALLEST_RATE = 1e3  # bytes/s: slower than any link, and still within what the solver resolves
_NEGATIVE_NUMBER = re.compile(r"-\d+|-\d*\.\d+")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help for a terminal of up to 100 columns, line breaks of description and epilog kept."""

    def __init__(self, prog: str, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 100) - 2
        super().__init__(prog, **{"max_help_position": 30, "width": width, **options})


class Parser(argparse.ArgumentParser):
    """An argument parser that raises :class:`InputError` and suggests the nearest flag."""

    def __init__(self, *, prog: str, description: str, epilog: str, usage: str = "%(prog)s [flags]") -> None:
        super().__init__(
            prog=prog, usage=usage, description=description, epilog=epilog, formatter_class=_Help, allow_abbrev=False
        )
        self.add_argument("--version", action="version", version=f"tierwise {costmodel.__version__}")

    def error(self, message: str) -> NoReturn:
        """One sentence that begins with the flag."""
        text = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise InputError(text.replace("not allowed with argument", "not allowed together with"))

    def read(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """Parse ``argv`` (``None``: the process's own); an unknown flag is an error with a suggestion."""
        args, unknown = self.parse_known_args(_with_signs(sys.argv[1:] if argv is None else argv))
        if not unknown:
            return args
        first = unknown[0].split("=")[0]
        if not first.startswith("-"):
            raise InputError(
                f"unexpected argument {first!r}: every value follows its flag ({self.prog} --help lists them)"
            )
        flags = sorted(set(re.findall(r"--[a-z][a-z-]+", self.format_help())))
        close = difflib.get_close_matches(first, flags, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}?" if close else f"{self.prog} --help lists the flags"
        raise InputError(f"unknown flag {first}: {hint}")


def _with_signs(argv: Sequence[str]) -> list[str]:
    """Join ``--flag -5GiB`` to ``--flag=-5GiB``, which argparse would take for another flag."""
    joined: list[str] = []
    for text in argv:
        looks_negative = re.match(r"-\.?\d", text) and not _NEGATIVE_NUMBER.fullmatch(text)
        if looks_negative and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def quantity(dimension: units.Dimension, *, or_zero: bool = False) -> Callable[[str], float]:
    """A size or rate with its unit; ``or_zero`` where 0 means that there is none."""

    def read(text: str) -> float:
        value = _parsed(text, dimension)
        if value < 0 or (value == 0 and not or_zero):
            raise _wrong(text, f"it must be {'at least' if or_zero else 'greater than'} 0")
        if dimension == "bytes/s" and value < _SMALLEST_RATE:
            raise _wrong(text, f"it must be at least {units.format_rate(_SMALLEST_RATE, 'bytes/s')}")
        if value > _LARGEST[dimension]:
            raise _wrong(
                text, f"it must be at most {_LARGEST[dimension] / 1e15:,.0f} P{dimension[:1].upper()}{dimension[5:]}"
            )
        return value

    return read


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """An integer of at least ``least`` and at most ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise _wrong(text, "a whole number is expected") from None
        if value < least:
            raise _wrong(text, f"it must be at least {least}")
        if most is not None and value > most:
            raise _wrong(text, f"it must be at most {most:,}")
        return value

    return read


def fraction(text: str) -> float:
    """A number in (0, 1]."""
    value = _float(text)
    if not 0 < value <= 1:
        raise _wrong(text, "it must be greater than 0 and at most 1")
    return value


def percentage(text: str) -> float:
    """A number; the limits are checked where six of them make three splits."""
    return _float(text.removesuffix("%"))


def seconds(text: str) -> float:
    """Plain seconds, or a duration with a unit: ``90``, ``90s``, ``2h``."""
    try:
        value = float(text) if re.fullmatch(r"[-+.\deE]+", text) else units.parse(text, "s")
    except ValueError:  # InputError is one
        raise _wrong(text, "seconds are expected, such as 600, or a number with a unit, such as 10min") from None
    if not (value > 0 and math.isfinite(value)):
        raise _wrong(text, "it must be a positive number of seconds")
    return value


def output_file(text: str) -> Path:
    """A file that can be written: its folder exists and it is not a folder itself."""
    path = Path(text)
    if text in ("", STANDARD_OUTPUT) or "\0" in text:
        raise argparse.ArgumentTypeError(f"is {text!r}: the name of a file is expected")
    try:
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"is {text}: that is a folder, a file is expected")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"is {text}: there is no folder {str(path.parent)!r}")
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"is {text[:40]!r}: the name of a file is expected ({error})") from None
    return path


def json_file(text: str) -> Path | str:
    """A file that can be written, or ``-`` for standard output."""
    return STANDARD_OUTPUT if text == STANDARD_OUTPUT else output_file(text)


def figure_file(text: str) -> Path:
    """A file that can be written, with the suffix of a known format."""
    path = output_file(text)
    if figure_format(path) not in FIGURE_FORMATS:
        known = ", ".join(f".{name}" for name in FIGURE_FORMATS)
        raise argparse.ArgumentTypeError(f"is {text}: the name must end in one of {known}")
    return path


def figure_format(path: Path) -> str:
    """``"png"`` for ``figure.PNG``."""
    return path.suffix.removeprefix(".").lower()


def check_distinct(writes: Mapping[str, Path | str | None], reads: Mapping[str, str | None] | None = None) -> None:
    """Raise :class:`InputError` where two outputs share a file, or an output would replace an input; by flag."""
    taken: dict[Path, str] = {}
    for flag, path in writes.items():
        if not isinstance(path, Path) or (path.exists() and not path.is_file()):
            continue
        other = taken.setdefault(path.resolve(), flag)
        if other != flag:
            raise InputError(f"{flag} is {path}: that file is written by {other}; name another one")
        for source, name in (reads or {}).items():
            if name is not None and _is_file(path, name):
                raise InputError(f"{flag} is {path}: that file is read by {source}; name another one")


def _is_file(path: Path, name: str) -> bool:
    """True where ``name`` is the existing file at ``path``."""
    try:
        return path.samefile(name)
    except (OSError, ValueError):  # one of them is not there, or no file system takes the name
        return False


def _parsed(text: str, dimension: units.Dimension) -> float:
    try:
        return units.parse(text, dimension)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _wrong(text, "a number is expected") from None


def _wrong(text: str, expected: str) -> argparse.ArgumentTypeError:
    shown = text if len(text) <= 40 else text[:37] + "..."
    return argparse.ArgumentTypeError(f"is {shown}: {expected}")
