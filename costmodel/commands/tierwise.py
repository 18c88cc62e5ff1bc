"""The console script: ``tierwise COMMAND …`` finds the command by its entry point and imports only that one."""

import ast
import difflib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import costmodel
from costmodel.commands import outcome, signals
from costmodel.errors import InputError, TierwiseError

GROUP = "tierwise.commands"

BUILT_IN = ("search", "estimate", "frontier", "calibrate")
"""What a checkout offers even where the package is not installed, so that no entry points are registered."""

HELP = """\
usage: tierwise COMMAND [flags]
       tierwise COMMAND --help
       tierwise --version

Plan and run large language models that do not fit the GPU: place every tensor on GPU, CPU or disk.

commands:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sub-command that the first argument names; its exit code."""
    return outcome.ended(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(argv: list[str]) -> int:
    known = commands()
    if not argv:
        print(_help(known), file=sys.stderr)
        return InputError.exit_code
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        outcome.say(_help(known) + "\n")
        return 0
    if name == "--version":
        outcome.say(f"tierwise {costmodel.__version__}\n")
        return 0
    if name not in known:
        raise _unknown(name, known)
    return _load(known[name])(rest) or 0


def commands() -> dict[str, EntryPoint]:
    """Every sub-command by name: the registered ones, and those that come with this package."""
    built_in = [EntryPoint(name, f"costmodel.commands.{name}:main", GROUP) for name in BUILT_IN]
    return {point.name: point for point in (*built_in, *entry_points(group=GROUP))}


def _unknown(name: str, known: dict[str, EntryPoint]) -> InputError:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    what = "flag" if name.startswith("-") else "command"
    return InputError(f"unknown {what} {name!r}: {hint}commands: {', '.join(known)}")


def _load(point: EntryPoint) -> Callable[[list[str]], int | None]:
    try:
        with signals.at_once():
            loaded: Callable[[list[str]], int | None] = point.load()
    except (ImportError, AttributeError) as error:
        raise TierwiseError(f"the command {point.name!r} ({point.value}) cannot be loaded: {error}") from None
    return loaded


def _help(known: dict[str, EntryPoint]) -> str:
    lines = [f"  {name:<11}{_summary(point)}" for name, point in known.items()]
    return HELP + "\n".join(lines)


def _summary(point: EntryPoint) -> str:
    """The first line of the command's module, read without importing the module itself."""
    try:
        spec = importlib.util.find_spec(point.module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec is not None and spec.origin else ""
        text = ast.get_docstring(ast.parse(source)) or ""
    except (ImportError, OSError, SyntaxError, ValueError):
        text = ""
    return text.partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
