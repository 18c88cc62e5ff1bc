"""Check the cost model on this machine: predict policies across the space, run each, and say by how much it fails."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodel import words
from costmodel.commands import arguments, outcome, output, parsing, signals, terminal
from costmodel.errors import InfeasibleError, InputError, TierwiseError
from costmodel.hardware import Hardware
from costmodel.overrides import with_overrides
from costmodel.policy import Policy
from costmodel.validation import Space, Validation, draw
from costmodel.workload import Workload
from runtime import engine_flags, progress_bar

if TYPE_CHECKING:
    from runtime.llm import LLM

EPILOG = """\
Policies are drawn from the seed: what the search picks, policies one decision away from it, and a
sample spread over tiers, batch shapes, switches and bottlenecks; all fit the budgets. The file is
written after every run, so that a kill loses one run at most.

examples:
  %(prog)s --hardware my-machine.json
      24 policies of OPT-125M with random weights, each predicted to take at most 10 s
  %(prog)s --hardware my-machine.json --gpu-memory 200MiB --cpu-memory 100MiB --plot errors.png
      so little memory that all three tiers are used, and predicted against measured as a figure
  %(prog)s --hardware my-machine.json --repeats 3
      every policy three times: the errors of its middle run, and how well the machine repeats itself
  %(prog)s --hardware my-machine.json --out validation.json --resume
      go on where a validation ended, however it ended
  %(prog)s --hardware my-machine.json --compress-weights off --compress-cache off --fail-above 10
      without 4-bit storage, for CI: an error where the median error of throughput is above 10 %%

exit codes: 0 done, 1 above --fail-above, 2 bad input, 3 nothing fits, 5 the disk failed,
75 stopped by --time-limit (--resume goes on), 130 interrupted
"""

MODEL = "dummy:opt-125m"

UNFINISHED = 75
"""The exit code where the time was up: call again (EX_TEMPFAIL of sysexits.h)."""

LIBRARY_BYTES = 2**30
"""What CUDA's libraries and kernels take of a GPU's memory once they are used, and the context of the process that
a run has to itself: it was free before the first run."""

BUSY = 0.5
"""Runnable programs a core above which measurements say more about the other programs."""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise validate") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        description=(
            "Predict policies that span the space, run each of them on this machine, and report the errors\n"
            "of time and memory, what caused them, and whether the policy predicted best is the best."
        ),
        epilog=EPILOG,
    )
    group = parser.add_argument_group("model and machine")
    engine_flags.add_model(group, default=MODEL)
    engine_flags.add_machine(group)
    group.add_argument(
        "--usable-fraction", metavar="SHARE", type=parsing.fraction, help="the share of each budget to plan with"
    )
    _add_runs(parser)
    arguments.add_switches(parser.add_argument_group("switches", "What is on or off is kept so; the others vary."))
    group = parser.add_argument_group("output", "Files are written whole or not at all.")
    group.add_argument(
        "--out",
        metavar="FILE",
        type=parsing.output_file,
        default=Path("validation.json"),
        help="where policies, measurements and summary are written (default: %(default)s)",
    )
    group.add_argument("--resume", action="store_true", help="keep the runs that --out has, and do the rest")
    group.add_argument(
        "--plot", metavar="FILE", type=parsing.figure_file, help="draw predicted against measured: .png, .pdf or .svg"
    )
    group.add_argument(
        "--fail-above",
        metavar="PERCENT",
        type=parsing.percentage,
        help="exit with 1 where the median error of throughput is above this",
    )
    parser.set_defaults(policy=engine_flags.AUTO)
    return parser


def _add_runs(parser: argparse.ArgumentParser) -> None:
    tokens = parsing.whole_number(1, parsing.MOST_TOKENS)
    group = parser.add_argument_group("runs")
    group.add_argument(
        "--runs", metavar="N", type=parsing.whole_number(1), default=24, help="policies to run (default: %(default)s)"
    )
    group.add_argument(
        "--repeats",
        metavar="N",
        type=parsing.whole_number(1),
        default=1,
        help=(
            "runs of each policy, in rounds (all policies, then all again); its middle run is reported, and how far "
            "the others are from it: no model can be nearer to a machine than it is to itself; where the cores of a "
            "virtual machine come apart meanwhile, up to as many runs more (default: %(default)s)"
        ),
    )
    group.add_argument(
        "--seed",
        metavar="N",
        type=parsing.whole_number(0),
        default=0,
        help="the same seed draws the same policies (default: %(default)s)",
    )
    group.add_argument("--prompt-len", metavar="TOKENS", type=tokens, default=64, help="(default: %(default)s)")
    group.add_argument("--gen-len", metavar="TOKENS", type=tokens, default=16, help="(default: %(default)s)")
    group.add_argument(
        "--max-seconds",
        metavar="TIME",
        type=parsing.seconds,
        default=10.0,
        help="the longest that a run may take by the prediction (default: 10 s)",
    )
    group.add_argument(
        "--time-limit",
        metavar="TIME",
        type=parsing.seconds,
        help="stop before a run that would end later than this after the start; --resume goes on (default: none)",
    )


def _run(args: argparse.Namespace) -> int:
    parsing.check_distinct({"--out": args.out, "--plot": args.plot}, engine_flags.files_read(args))
    engine_flags.check_engine(args)
    if args.fail_above is not None and args.fail_above <= 0:
        raise InputError(f"--fail-above is {args.fail_above:g}: it must be greater than 0")
    if args.out.exists() and not args.resume:
        raise InputError(f"--out is {args.out}: that file exists; --resume goes on with it, or name another one")
    found = _validated(args)
    if found.left:
        engine_flags.say(f"--time-limit is reached: {args.out} has {found.progress}; --resume goes on with them")
        return UNFINISHED
    written = [str(args.out)]
    if args.plot is not None:
        from costmodel.figures.validation import validation_figure

        written.append(output.draw(validation_figure(found), args.plot))
    from costmodel.commands import validation_report

    terminal.show(*validation_report.report(found, written=written))
    _check_limit(args.fail_above, found.summary().errors["throughput"].median * 100)
    return 0


def _check_limit(limit_percent: float | None, median_percent: float) -> None:
    if limit_percent is not None and median_percent > limit_percent:
        raise TierwiseError(
            f"the median error of throughput is {median_percent:.1f} %: --fail-above allows {limit_percent:g} %"
        )


def _validated(args: argparse.Namespace) -> Validation:
    engine_flags.require_torch()
    from runtime import environment
    from runtime.validation_runs import TimeLimit, run_all

    limit = None if args.time_limit is None else TimeLimit(args.time_limit)
    load = environment.load_per_core()
    if load > BUSY:
        engine_flags.say(
            f"note: this machine was busy over the last minute (load {load:.1f} a core): beside other programs runs "
            "take longer than predicted, and not for reasons that the model knows"
        )
    found = _begun(args)
    if found.left:
        engine_flags.say("a line a run: throughput, predicted / measured − 1, and where the policy comes from")
    try:
        found = run_all(
            found,
            partial(_engine, args, found.hardware),
            _workload(args),
            say=engine_flags.say,
            keep=lambda now: now.save(args.out),
            limit=limit,
        )
    except BaseException:
        if args.out.exists():
            engine_flags.say(f"the runs so far are in {args.out}: --resume goes on with them")
        raise
    if not args.out.exists():
        found.save(args.out)
    return found


def _begun(args: argparse.Namespace) -> Validation:
    """The validation to go on with: the one in the file, or a new one whose policies are drawn now."""
    request = _request(args)
    if args.resume and args.out.exists():
        found = Validation.from_file(args.out)
        _check_same(request, found, args)
        engine_flags.say(f"{args.out} has {found.progress}")
        return found
    with _engine(args) as llm:
        hardware, spec = llm.hardware, llm.spec
    if args.gpu_memory is None and not hardware.gpu.is_host_memory:
        hardware = with_overrides(hardware, gpu_memory=hardware.capacity_bytes["gpu"] - LIBRARY_BYTES)
    engine_flags.say(f"drawing {words.counted(args.runs, 'policy', 'policies')} for {spec.name} on {hardware.name}")
    space = Space(
        hardware=hardware,
        model=spec,
        workload=_workload(args),
        max_seconds=args.max_seconds,
        usable_fraction=_usable_fraction(args),
        switches=arguments.switches(args),
    )
    try:
        drawn = draw(space, count=args.runs, seed=args.seed)
    except InfeasibleError as error:  # which speaks of the search's flags
        message = str(error).replace("--max-latency", "--max-seconds")
        raise InfeasibleError(message, reason=error.reason) from None
    if len(drawn) < args.runs:
        different = words.counted(len(drawn), "policy", "different policies")
        engine_flags.say(f"found only {different} within the budgets and --max-seconds")
    return Validation(request=request, hardware=hardware, drawn=drawn, repeats=args.repeats)


@contextmanager
def _engine(
    args: argparse.Namespace, hardware: Hardware | None = None, policy: Policy | str = engine_flags.AUTO
) -> Iterator["LLM"]:
    """An engine with the flags' model; with the budgets of ``hardware``, where they have been settled already."""
    with signals.at_once():
        from runtime.llm import LLM

    sizes = {"gpu": args.gpu_memory, "cpu": args.cpu_memory} if hardware is None else hardware.capacity_bytes
    conversions = progress_bar.Conversions()
    try:
        with LLM(
            args.model,
            policy=policy,
            hardware=args.hardware if hardware is None else hardware,
            gpu_memory=sizes["gpu"],
            cpu_memory=sizes["cpu"],
            offload_dir=args.offload_dir,
            device=args.device,
            dtype=args.dtype,
            usable_fraction=_usable_fraction(args),
            say=engine_flags.say if hardware is None else lambda text: None,
            progress=conversions,
        ) as engine:
            yield engine
    finally:
        conversions.close()


def _workload(args: argparse.Namespace) -> Workload:
    return Workload(prompt_len=args.prompt_len, gen_len=args.gen_len)


def _usable_fraction(args: argparse.Namespace) -> float:
    from runtime.machine import USABLE_FRACTION

    return USABLE_FRACTION if args.usable_fraction is None else float(args.usable_fraction)


def _request(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that decide what is drawn and run."""
    names = ("model", "device", "dtype", "gpu_memory", "cpu_memory", "prompt_len", "gen_len", "max_seconds")
    found = {name: getattr(args, name) for name in (*names, "runs", "repeats", "seed", "usable_fraction")}
    return {**found, "switches": arguments.switches(args)}


def _check_same(request: dict[str, Any], found: Validation, args: argparse.Namespace) -> None:
    """Raise :class:`InputError` where the file was made by other flags or on another machine."""
    begun = {"repeats": 1, **found.request}  # a file may be older than that flag
    for name, value in request.items():
        if begun.get(name) != value:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} is {value}, but {args.out} was begun with {begun.get(name)}: give the same flags, "
                "or begin anew with another --out"
            )
    if args.hardware is not None and Hardware.from_file(args.hardware).rates != found.hardware.rates:
        raise InputError(
            f"--hardware is {args.hardware}, but {args.out} was begun with other rates: begin anew with another --out"
        )


if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.validate"))
