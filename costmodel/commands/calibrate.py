"""Refit a machine's constants to measured runs, or the paper's machine to the published ones; show every error."""

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from costmodel import records, words
from costmodel.calibrate import Calibration, Row, calibrate, mean_error, worst_error
from costmodel.calibrate.constants import MACHINE_CONSTANTS
from costmodel.commands import outcome, output, parsing, terminal
from costmodel.errors import InputError
from costmodel.hardware import Hardware

EPILOG = """\
examples:
  %(prog)s validation.json --save calibrated.json
      fit this machine's constants to the runs of a validation; plan with --hardware calibrated.json
  %(prog)s monday.json tuesday.json run.json --plot errors.png
      several validations, and a run that bench --json wrote; errors before and after as a figure
  %(prog)s run1.json run2.json ... --hardware my-machine.json
      runs alone, planned with that file
  %(prog)s validation.json --constants disk-read matmul
      fit these two, or say why the runs do not tell them
  %(prog)s
      the paper's machine: fit seven constants to 12 published runs, leave each run out in turn,
      predict what was never fitted

Without --constants, those that the runs do not identify keep the number of the file, and the report
names the run that would tell. The names:
{names}

exit codes: 0 done, 2 bad input, or runs that identify no constant (or not one that was named)
"""

_NAMES = textwrap.fill(", ".join(MACHINE_CONSTANTS), width=96, break_on_hyphens=False)

_NEEDS_FILES = ("hardware", "constants", "seed")


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise calibrate") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage="%(prog)s [FILE ...] [flags]",
        description=(
            "Fit the constants of a machine to measured runs of it, by robust least squares within physical\n"
            "bounds, and report by how much runs that were not fitted to are predicted better. Without FILE:\n"
            "the same for t4-flexgen, the FlexGen paper's machine, and its 12 published runs."
        ),
        epilog=EPILOG.replace("{names}", _NAMES),
    )
    parser.add_argument(
        "files", metavar="FILE", nargs="*", help="validations (tierwise validate) or measurements (bench --json)"
    )
    group = parser.add_argument_group("fit (with FILE)")
    group.add_argument("--hardware", metavar="FILE", help="the hardware file that measurements were planned with")
    group.add_argument(
        "--constants", metavar="NAME", nargs="+", help="what to fit (default: all that the runs identify)"
    )
    group.add_argument(
        "--seed", metavar="N", type=parsing.whole_number(0), help="of the folds and the draws (default: 0)"
    )
    group = parser.add_argument_group("output", "Files are written whole or not at all.")
    group.add_argument("--plot", metavar="FILE", type=parsing.figure_file, help="draw the errors: png, pdf or svg")
    group.add_argument(
        "--save", metavar="FILE", type=parsing.output_file, help="write the fitted machine as a hardware file"
    )
    group.add_argument(
        "--json", metavar="FILE|-", type=parsing.json_file, help="write JSON to a file, or to standard output"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    writes = {"--json": args.json, "--plot": args.plot, "--save": args.save}
    parsing.check_distinct(writes, {"--hardware": args.hardware, **{name: name for name in args.files}})
    if args.files:
        return _run_measured(args)
    for name in _NEEDS_FILES:
        if getattr(args, name) is not None:
            raise InputError(f"--{name} needs FILE: without one, the paper's machine is fitted to its published runs")
    with terminal.progress("fitting") as progress:
        found = calibrate(Hardware.from_catalog("t4-flexgen"), progress=progress)
    written = _written(args, found.to_dict(), found.hardware)
    if args.plot is not None:
        from costmodel.figures.calibration import calibration_figure

        written.append(output.draw(calibration_figure(found), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*_report(found, written))
    return 0


def _run_measured(args: argparse.Namespace) -> int:
    from costmodel.calibrate.machine import recalibrate
    from costmodel.calibrate.observations import read
    from costmodel.commands import recalibration_report

    hardware, measurements = read(args.files, hardware=args.hardware)
    with terminal.progress("fitting") as progress:
        found = recalibrate(
            hardware,
            measurements,
            constants=args.constants,
            files=[Path(name).name for name in args.files],
            seed=args.seed or 0,
            progress=progress,
        )
    written = _written(args, found.to_dict(), found.hardware)
    if args.plot is not None:
        from costmodel.figures.recalibration import recalibration_figure

        written.append(output.draw(recalibration_figure(found), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*recalibration_report.report(found, written=written))
    return 0


def _written(args: argparse.Namespace, data: dict[str, Any], hardware: Hardware) -> list[str]:
    """Write the JSON and the hardware file that were asked for; their names."""
    written = output.write(args, data=data, policy=None)
    if args.save is not None:
        records.write_json(hardware.to_dict(), args.save)
        written.append(str(args.save))
    return written


def _report(found: Calibration, written: Sequence[str]) -> list[terminal.Renderable]:
    parts: list[terminal.Renderable] = [
        terminal.heading("Fitted constants of t4-flexgen (each below its physical bound)"),
        _constants(found),
        terminal.heading("Published runs in token/s: fitted, left out of the fit, and by the paper's own model"),
        _runs(found),
        terminal.heading("Predicted without refitting, token/s"),
        _predictions(found),
    ]
    if written:
        parts.append(terminal.facts(("\nWrote", f"\n{', '.join(written)}")))
    return parts


def _constants(found: Calibration) -> terminal.Renderable:
    table = terminal.table("constant", ">prior", ">fitted")
    for constant, value in found.constants:
        table.add_row(constant.name, f"{constant.prior:.3g}", f"{value:.3g}")
    return table


def _runs(found: Calibration) -> terminal.Renderable:
    table = terminal.table("run", ">paper", ">fitted", ">error", ">left out", ">its model")
    for fitted, left_out, flexgen in zip(found.in_sample, found.left_out, found.flexgen, strict=True):
        table.add_row(
            fitted.name,
            f"{fitted.published_tok_per_s:.4g}",
            f"{fitted.predicted_tok_per_s:.4g}",
            *(words.signed_percent(row.error) for row in (fitted, left_out, flexgen)),
        )
    tables = (found.in_sample, found.left_out, found.flexgen)
    table.add_section()
    table.add_row("mean of the errors' sizes", "", "", *(f"{mean_error(rows) * 100:.1f} %" for rows in tables))
    table.add_row("worst", "", "", *(f"{worst_error(rows) * 100:.1f} %" for rows in tables))
    return table


def _predictions(found: Calibration) -> terminal.Renderable:
    table = terminal.table("what", ">published", ">predicted", ">error")
    named = [(f"decode only, {row.name}", row) for row in found.decode]
    for name, row in [*named, *((row.name, row) for row in found.ablations)]:
        table.add_row(name, f"{row.published_tok_per_s:.4g}", f"{row.predicted_tok_per_s:.3g}", _error(row))
    return table


def _error(row: Row) -> str:
    """The error, or that the two agree to the digits that were published."""
    if round(row.predicted_tok_per_s, 2) == row.published_tok_per_s and row.published_tok_per_s < 0.1:
        return "same when rounded"
    return words.signed_percent(row.error)
