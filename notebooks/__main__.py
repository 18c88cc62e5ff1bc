"""Execute the notebooks and write what they show: one page (HTML) each, and every figure as PNG and PDF."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from costmodel import words
from notebooks.execution import ALL_LIMIT_S, Executed, NotebookError, execute, figures, paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 1 where a notebook fails, 2 for one that is not there."""
    parser = argparse.ArgumentParser(prog="python -m notebooks", description=__doc__)
    parser.add_argument("only", nargs="*", metavar="NAME", help="how the name begins: 01, 03-policy (default: all)")
    parser.add_argument("--out", type=Path, default=Path("build/notebooks"), metavar="DIR", help="default: %(default)s")
    args = parser.parse_args(argv)
    chosen = [path for path in paths() if not args.only or path.name.startswith(tuple(args.only))]
    if not chosen:
        print(f"no notebook begins with {' or '.join(args.only)}: there are {_names(paths())}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    total_s = 0.0
    for path in chosen:
        try:
            executed = execute(path)
        except NotebookError as error:
            print(error, file=sys.stderr)
            return 1
        total_s += executed.cpu_s
        written = [*_write_figures(executed, args.out), _write_page(executed, args.out)]
        print(f"{path.name}: {executed.cpu_s:.1f} s of processor time; {', '.join(written)}", flush=True)
    if total_s > ALL_LIMIT_S:
        print(f"all together took {total_s:.0f} s of processor time: the limit is {ALL_LIMIT_S:.0f} s", file=sys.stderr)
        return 1
    print(f"{words.counted(len(chosen), 'notebook')}, {total_s:.1f} s of processor time: {args.out}")
    return 0


def _write_figures(executed: Executed, folder: Path) -> list[str]:
    written = []
    for name, content in figures(executed):
        (folder / name).write_bytes(content)
        written.append(name)
    return written


def _write_page(executed: Executed, folder: Path) -> str:
    """The notebook as a page that any browser opens."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(embed_images=True).from_notebook_node(executed.node)
    name = f"{executed.name}.html"
    (folder / name).write_text(page, encoding="utf-8")
    return name


def _names(found: Sequence[Path]) -> str:
    return ", ".join(path.stem for path in found) or "none"


if __name__ == "__main__":
    sys.exit(main())
