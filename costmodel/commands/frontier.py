"""Trace the trade-off: the highest throughput for every latency that a block of prompts may take."""

import argparse
from collections.abc import Sequence

from costmodel.commands import arguments, outcome, output, parsing, report, terminal
from costmodel.frontier import frontier

EPILOG = """\
examples:
  %(prog)s --gpu t4 --model opt-30b
      how much throughput an earlier answer costs
  %(prog)s --points 24 --compress-weights off --plot frontier.pdf
      a finer curve, weights in 16 bits, as a figure
  %(prog)s --max-latency 10min --json - | jq '.points[].latency_s'
      only blocks of at most ten minutes, as JSON

exit codes: 0 traced, 2 bad input, 3 nothing fits (the message says what would), 4 solver failure
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise frontier") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage=arguments.USAGE,
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
        about="All of it is searched, except what is given; a switch at auto is searched too.",
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
    with terminal.progress("searching") as progress:
        found = frontier(**arguments.request(args), points=args.points, progress=progress)
    written = output.write(args, data=found.to_dict(), policy=None)
    if args.plot is not None:
        from costmodel import figures

        written.append(output.draw(figures.frontier_figure(found), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*report.frontier_report(found, written=written))
    return 0
