"""Say what one fixed policy costs on a machine, whether it fits or not."""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from costmodel import records
from costmodel.commands import arguments, outcome, output, parsing, report, terminal
from costmodel.errors import InputError
from costmodel.estimate import Estimate, estimate
from costmodel.formulations import get
from costmodel.formulations.base import SWITCHES, Switches
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import Policy
from costmodel.uncertainty import intervals
from costmodel.workload import Workload

SCHEMA = "tierwise.estimate/1"

EPILOG = """\
examples:
  %(prog)s --percent 20 80 0 100 0 100 --gpu-batch-size 48 --num-gpu-batches 3
      FlexGen's six numbers: a fifth of the weights on the GPU, all else in CPU memory
  %(prog)s --policy policy.json --disk-read 500MB/s
      a policy saved by search, on a slower disk
  %(prog)s --gpu t4-flexgen --formulation flexgen --percent 20 80 0 100 100 0 \\
      --gpu-batch-size 48 --num-gpu-batches 3 --usable-fraction 1
      what the published cost model says

A policy that does not fit is estimated all the same: the report names what is exceeded.
exit codes: 0 estimated, whether it fits or not; 2 bad input
"""

_LIKELY = {"compress_weights": False, "compress_cache": False, "cpu_attention": False, "overlap": True}


@dataclass(frozen=True, kw_only=True)
class EstimatedPolicy:
    """A policy, its estimate and what it was computed for."""

    policy: Policy
    estimate: Estimate
    hardware: Hardware
    model: ModelSpec
    workload: Workload
    formulation: str
    usable_fraction: float
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "policy": self.policy.to_dict(),
            "estimate": self.estimate.to_dict(),
            "notes": list(self.notes),
            "formulation": self.formulation,
            "usable_fraction": self.usable_fraction,
            "workload": records.to_dict(self.workload),
            "model": self.model.to_dict(),
            "hardware": self.hardware.to_dict(),
        }


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise estimate") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage=arguments.USAGE,
        description="Predict the time, throughput and memory of one fixed policy, and say what limits it.",
        epilog=EPILOG,
    )
    arguments.add_machine(parser)
    arguments.add_work(parser)
    group = arguments.add_policy(
        parser,
        title="the policy",
        about="A file, or --percent with both batch sizes. A switch at auto is as the file says;\n"
        "without a file nothing is compressed, copies overlap computing, and attention\n"
        "runs on the GPU where the cost model knows that.",
    )
    group.add_argument(
        "--policy", metavar="FILE", help="a policy file (search --save-policy) or a whole result (--json)"
    )
    arguments.add_output(parser, figure="where everything lives and what is busy", policy=True)
    return parser


def _run(args: argparse.Namespace) -> int:
    arguments.check_files(args)
    hardware, model, workload = arguments.machine(args), arguments.model(args), arguments.workload(args)
    policy = _policy(args, hardware)
    formulation = get(args.formulation)
    answer = EstimatedPolicy(
        policy=policy,
        estimate=estimate(
            policy,
            hardware=hardware,
            model=model,
            workload=workload,
            formulation=args.formulation,
            usable_fraction=args.usable_fraction,
        ),
        hardware=hardware,
        model=model,
        workload=workload,
        formulation=args.formulation,
        usable_fraction=formulation.default_usable_fraction if args.usable_fraction is None else args.usable_fraction,
        notes=formulation.notes(hardware) + _made_for_another(args, hardware, model, workload),
    )
    uncertain = intervals([policy], hardware=hardware, model=model, workload=workload, formulation=args.formulation)
    data = answer.to_dict() | ({} if uncertain is None else {"uncertainty": uncertain.to_dict()})
    written = output.write(args, data=data, policy=policy)
    if args.plot is not None:
        from costmodel import figures

        written.append(output.draw(figures.policy_figure(answer), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*report.estimate_report(answer, uncertain=uncertain, notes=answer.notes, written=written))
    return 0


def _policy(args: argparse.Namespace, hardware: Hardware) -> Policy:
    """The policy that the flags fix; contradictions and gaps are errors."""
    shape = {"--gpu-batch-size": args.gpu_batch_size, "--num-gpu-batches": args.num_gpu_batches}
    fixed = {"--percent": args.percent, **shape}
    if args.policy is not None:
        for flag, value in fixed.items():
            if value is not None:
                raise InputError(f"{flag} is not allowed together with --policy, which already fixes it")
        return _from_file(args)
    missing = [flag for flag, value in fixed.items() if value is None]
    if len(missing) == len(fixed):
        raise InputError(
            "estimate needs a policy: --policy FILE, or --percent with --gpu-batch-size and --num-gpu-batches"
        )
    if missing:
        given = next(flag for flag, value in fixed.items() if value is not None)
        raise InputError(f"{given} needs {' and '.join(missing)} as well: together they make a policy")
    return Policy.from_percent(
        tuple(args.percent),
        gpu_batch_size=args.gpu_batch_size,
        num_gpu_batches=args.num_gpu_batches,
        **_determinate(args, hardware),
    )


def _from_file(args: argparse.Namespace) -> Policy:
    policy = Policy.from_file(args.policy)
    for name, wanted in arguments.switches(args).items():
        if getattr(policy, name) != wanted:
            flag, state = f"--{name.replace('_', '-')}", "on" if wanted else "off"
            raise InputError(
                f"{flag} {state} contradicts --policy {args.policy}, where {name} is {'off' if wanted else 'on'}"
            )
    return policy


def _determinate(args: argparse.Namespace, hardware: Hardware) -> dict[str, bool]:
    """Values for all switches: what is given, else the likeliest that the cost model accepts."""
    given, formulation = arguments.switches(args), get(args.formulation)
    choices = [(given[name],) if name in given else (_LIKELY[name], not _LIKELY[name]) for name in SWITCHES]
    for values in itertools.product(*choices):
        found = dict(zip(SWITCHES, values, strict=True))
        if formulation.refusal(Switches(**found), hardware) is None:
            return found
    return {**_LIKELY, **given}  # the estimate says why not


def _made_for_another(
    args: argparse.Namespace, hardware: Hardware, model: ModelSpec, workload: Workload
) -> tuple[str, ...]:
    """A note where the policy file is a whole result for another machine, model or workload."""
    whole = {} if args.policy is None else records.read_json(args.policy)
    here = {
        ("hardware", "name"): hardware.name,
        ("model", "name"): model.name,
        ("workload", "prompt_len"): workload.prompt_len,
        ("workload", "gen_len"): workload.gen_len,
    }
    others = []
    for (section, field), used in here.items():
        meant = whole.get(section)
        if isinstance(meant, dict) and meant.get(field, used) != used:
            others.append(f"{section if field == 'name' else field} {meant[field]}, not {used}")
    return (f"{args.policy} was computed for {'; '.join(others)}",) if others else ()
