"""Measure one policy on random prompts, beside what was predicted for it."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from costmodel import records, units, words
from costmodel.commands import arguments, outcome, parsing, terminal
from costmodel.errors import InputError
from costmodel.formulations.base import LINKS
from costmodel.policy import TIERS, splits_from_percent
from costmodel.validation.statistics import COMPARED, compared_s
from costmodel.workload import Workload
from runtime import engine_flags

if TYPE_CHECKING:
    from costmodel.measurement import Measurement

EPILOG = """\
examples:
  %(prog)s --model dummy:opt-1.3b --gpu-memory 3GiB
      the best policy for 512 + 32 tokens in 3 GiB, on random weights
  %(prog)s --model dummy:opt-6.7b --gpu-memory 4GiB --prompt-len 32 --gen-len 16 --compress-weights on
      the same with the weights in 4 bits
  %(prog)s --model dummy:opt-1.3b --percent 50 0 100 0 100 0 --gpu-batch-size 8 --num-gpu-batches 2 --json -
      half of the weights on disk, as a measurement file
  %(prog)s --model dummy:opt-1.3b --gpu-memory 3GiB --trace trace.json
      and a timeline of every load, compute and store (ui.perfetto.dev opens it)

exit codes: 0 done, 2 bad input, 3 nothing fits, 5 the disk failed, 130 interrupted
"""

_MOST_BLOCK_S = 600.0


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise bench") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage="%(prog)s --model MODEL [flags]",
        description=(
            "Run one block of random prompts (or --num-prompts) under a policy and print what was\n"
            "predicted beside what was measured. What happens only the first time is run before, not\n"
            "counted: all of a block that takes seconds, a batch of one that takes up to a minute."
        ),
        epilog=EPILOG,
    )
    engine_flags.add_engine(parser)
    tokens = parsing.whole_number(1, parsing.MOST_TOKENS)
    group = parser.add_argument_group("workload")
    group.add_argument("--prompt-len", metavar="TOKENS", type=tokens, default=512, help="(default: %(default)s)")
    group.add_argument("--gen-len", metavar="TOKENS", type=tokens, default=32, help="(default: %(default)s)")
    group.add_argument(
        "--num-prompts", metavar="N", type=parsing.whole_number(1), help="prompts to run (default: one block)"
    )
    group.add_argument(
        "--max-latency",
        metavar="TIME",
        type=parsing.seconds,
        help="the longest that a block may take by the prediction, where the policy is searched (default: 10min)",
    )
    group.add_argument(
        "--usable-fraction", metavar="SHARE", type=parsing.fraction, help="the share of each budget to plan with"
    )
    arguments.add_policy(
        parser,
        title="what is already decided of the policy",
        about="The rest is searched. A switch at auto is searched too, but nothing is compressed unless\n"
        "its switch is on.",
    )
    output = parser.add_argument_group("output", "Files are written whole or not at all.")
    output.add_argument(
        "--json", metavar="FILE|-", type=parsing.json_file, help="write the measurement; - is standard output"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    parsing.check_distinct({"--json": args.json, "--trace": args.trace}, engine_flags.files_read(args))
    engine_flags.check_engine(args)
    fixed = _fixed(args)
    measurement = _measure(args, fixed)
    if args.json == parsing.STANDARD_OUTPUT:
        outcome.say(json.dumps(measurement.to_dict(), indent=2, allow_nan=False) + "\n")
        return 0
    written = []
    if args.json is not None:
        records.write_json(measurement.to_dict(), args.json)
        written.append(str(args.json))
    if args.trace is not None:
        written.append(str(args.trace))
    show(measurement, written)
    return 0


def _fixed(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the search that the flags decide."""
    switches = arguments.switches(args)
    if args.policy != engine_flags.AUTO:
        searched = ("percent", "gpu_batch_size", "num_gpu_batches", "max_latency")
        given = [name for name in searched if getattr(args, name) is not None]
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in (*switches, *given))
        if flags:
            raise InputError(f"--policy is {args.policy}: it decides everything, so {flags} cannot take effect")
        return {}
    fixed: dict[str, Any] = {"switches": switches}
    if args.percent is not None:
        fixed["splits"] = splits_from_percent(tuple(args.percent))
    for name in ("gpu_batch_size", "num_gpu_batches"):
        if getattr(args, name) is not None:
            fixed[name] = getattr(args, name)
    return fixed


def _measure(args: argparse.Namespace, fixed: dict[str, Any]) -> "Measurement":
    engine_flags.require_torch()
    from runtime import trial
    from runtime.machine import USABLE_FRACTION

    workload = Workload(
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        num_prompts=args.num_prompts,
        max_latency_s=(args.max_latency or _MOST_BLOCK_S) if args.policy == engine_flags.AUTO else None,
    )
    fraction = args.usable_fraction or USABLE_FRACTION
    with engine_flags.load_engine(args, fixed=fixed, usable_fraction=fraction) as llm:
        return trial.measure(llm, workload, title="generating")


def show(measurement: "Measurement", written: Sequence[str]) -> None:
    """Predicted beside measured, for people."""
    predicted, measured = measurement.predicted, measurement.measured
    table = terminal.table("", ">predicted", ">measured", ">predicted / measured")

    def row(label: str, one: float | None, other: float | None, text: Any) -> None:
        if one is None or other is None or (not one and not other):
            return
        table.add_row(label, text(one), text(other), f"{one / other:.3f}" if other else "")

    row("prefill", predicted.prefill_s, measured.prefill_s, units.format_seconds)
    row("decode", predicted.decode_s, measured.decode_s, units.format_seconds)
    row("throughput (token/s)", predicted.throughput_tok_per_s, measured.throughput_tok_per_s, words.number)
    for tier in TIERS:
        label = f"peak {words.memory_name(tier)}"
        row(label, predicted.peak_bytes[tier], measured.peak_bytes[tier], units.format_bytes)
    for link in LINKS:
        label = f"bytes by {words.resource_name(link)}"
        row(label, predicted.bytes_moved[link], measured.bytes_moved[link], units.format_bytes)
    for phase in ("prefill", "decode"):
        expected_s, took_s = compared_s(predicted.busy_s[phase]), compared_s(measured.busy_s[phase])
        for resource in COMPARED:
            label = f"{phase}: {words.compared_name(resource)} busy"
            row(label, expected_s[resource], took_s[resource], units.format_seconds)
    origin = measurement.origin
    told = f"{measurement.model.name} in {measurement.dtype} on {origin['cpu']['name']}"
    lines = [Text(f"{told}, commit {origin['commit']}, {origin['date']}", terminal.FAINT)]
    lines += [Text(line, terminal.BAD) for line in overfull_lines(measurement)]
    facts = [terminal.facts(("Written", ", ".join(written)))] if written else []
    terminal.show(table, *lines, *facts)


def overfull_lines(measurement: "Measurement") -> list[str]:
    """A sentence for each tier that the run took more of than the plan may use."""
    own, limits = measurement.measured.peak_bytes, measurement.predicted.limit_bytes
    return [
        f"peak {words.memory_name(tier)} is {units.format_bytes(own[tier] - limits[tier])} above the "
        f"{units.format_bytes(limits[tier])} that the plan may use: a lower --usable-fraction leaves more room"
        for tier in measurement.measured.violations
    ]


if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.bench"))
