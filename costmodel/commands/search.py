"""Find the policy of highest throughput for a machine, a model and a workload, and prove it."""

import argparse
from collections.abc import Sequence

from costmodel.commands import arguments, outcome, output, parsing, report, terminal
from costmodel.search import search
from costmodel.uncertainty import intervals

EPILOG = """\
examples:
  %(prog)s
      where OPT-30B should live on a T4, and how fast it will be
  %(prog)s --gpu rtx3090 --model opt-66b --cpu-memory 64GiB --disk-read 3GB/s
      the same for your own machine: the catalogue's GPU, your memory and disk
  %(prog)s --model ./Llama-3-70B/config.json --num-prompts 1000 --max-latency 600
      any decoder-only model, a job of 1000 prompts, blocks of at most ten minutes
  %(prog)s --compress-weights off --compress-cache off --top 3
      without lossy compression; the best three combinations of switches
  %(prog)s --save-policy policy.json --plot policy.png --json - | jq .estimate
      keep the policy and a picture of it; everything as JSON

exit codes: 0 found, 2 bad input, 3 nothing fits (the message says what would), 4 solver failure
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise search") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage=arguments.USAGE,
        description=(
            "Find where weights, KV cache and activations should live (GPU, CPU memory, disk),\n"
            "the batch shape and the switches that generate the most tokens per second, and prove\n"
            "that no other choice does better."
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
        "--top",
        metavar="K",
        type=parsing.whole_number(1),
        default=1,
        help="also show the best policies with other switches, K in all (default: %(default)s)",
    )
    arguments.add_output(parser, figure="where everything lives and what is busy", policy=True)
    return parser


def _run(args: argparse.Namespace) -> int:
    arguments.check_files(args)
    with outcome.patience("still searching: some requests take half a minute (Ctrl-C gives up)"):
        result = search(**arguments.request(args), top=args.top)
    uncertain = intervals(
        [result.policy, *(policy for policy, _ in result.alternatives)],
        hardware=result.hardware,
        model=result.model,
        workload=result.workload,
        formulation=result.formulation,
    )
    data = result.to_dict() | ({} if uncertain is None else {"uncertainty": uncertain.to_dict()})
    written = output.write(args, data=data, policy=result.policy)
    if args.plot is not None:
        from costmodel import figures

        written.append(output.draw(figures.policy_figure(result), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*report.search_report(result, uncertain=uncertain, written=written))
    return 0
