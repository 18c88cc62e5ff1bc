"""Trace the trade-off: the highest throughput for every latency that a block of prompts may take."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from costmodel.commands import arguments, output, outcome, parsing
from costmodel.frontier import frontier

EPILOG = """\
examples:
  %(prog)s --gpu t4 --model opt-30b
      how much throughput an earlier answer costs
  %(prog)s --points 24 --compress-weights off --compress-cache off --plot frontier.pdf
      a finer curve without lossy compression, as a figure
  %(prog)s --max-latency 10min --json - | jq '.points[] | [.latency_s, .throughput_tok_per_s]'
      only blocks of at most ten minutes, as JSON

exit codes: 0 traced, 2 bad input, 3 nothing fits (the message says what would), 4 solver failure
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise frontier") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        description=(
            "Trace the latency-throughput frontier: certified searches under ever looser limits on\n"
            "the time of a block, from the fastest one that any policy allows to no limit at all."
        ),
        epilog=EPILOG,
    )
    arguments.add_machine(parser)
    arguments.add_work(parser)
    arguments.add_latency(parser)
    group = arguments.add_policy(
        parser,
        title="what is already decided",
        about="Everything is searched, except what is given here.",
        auto="auto, the default, searches it",
    )
    group.add_argument(
        "--points",
        metavar="N",
        type=parsing.whole_number(2, 1000),
        default=12,
        help="latency limits to search under, evenly spaced in log(latency) (default: %(default)s)",
    )
    arguments.add_output(parser, figure="throughput against latency", policy=False)
    return parser


def _run(args: argparse.Namespace) -> int:
    arguments.check_files(args)
    with _progress_bar() as progress:
        found = frontier(**arguments.request(args), points=args.points, progress=progress)
    written = output.write(args, data=found.to_dict(), policy=None)
    if args.plot is not None:
        from costmodel import figures

        written.append(output.draw(figures.frontier_figure(found), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        from costmodel.commands import report, terminal

        terminal.show(*report.frontier_report(found, written=written))
    return 0


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None] | None]:
    """A bar on standard error while the searches run, if a person is watching there."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("searching", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
