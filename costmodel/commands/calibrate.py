"""Refit the constants of the paper's machine to the published runs, and show every error."""

import argparse
from collections.abc import Sequence

from costmodel import records
from costmodel.calibrate import Calibration, Row, calibrate, mean_error, worst_error
from costmodel.commands import outcome, output, parsing, terminal
from costmodel.hardware import Hardware

EPILOG = """\
examples:
  %(prog)s
      fit the seven constants, leave each run out in turn, predict what was never fitted
  %(prog)s --plot errors.png --json calibration.json
      the same as a figure and for machines
  %(prog)s --save refitted.json
      a hardware file with the fitted constants, for search --hardware

exit codes: 0 done, 2 bad input
"""


def main(argv: Sequence[str] | None = None, *, prog: str = "tierwise calibrate") -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv)))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        description=(
            "Fit the roofline constants of t4-flexgen, the FlexGen paper's machine, to its 12 published\n"
            "runs; report each error in sample and left out, and predict decode rates and ablations."
        ),
        epilog=EPILOG,
    )
    parser.usage = "%(prog)s [flags]"
    group = parser.add_argument_group("output")
    group.add_argument("--plot", metavar="FILE", type=parsing.figure_file, help="draw the errors: png, pdf or svg")
    group.add_argument(
        "--save", metavar="FILE", type=parsing.output_file, help="write the fitted machine as a hardware file"
    )
    group.add_argument(
        "--json", metavar="FILE|-", type=parsing.json_file, help="write JSON to a file, or to standard output"
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    parsing.check_distinct({"--json": args.json, "--plot": args.plot, "--save": args.save})
    with terminal.progress("fitting") as progress:
        found = calibrate(Hardware.from_catalog("t4-flexgen"), progress=progress)
    written = output.write(args, data=found.to_dict(), policy=None)
    if args.save is not None:
        records.write_json(found.hardware.to_dict(), args.save)
        written.append(str(args.save))
    if args.plot is not None:
        from costmodel.figures.calibration import calibration_figure

        written.append(output.draw(calibration_figure(found), args.plot))
    if args.json != parsing.STANDARD_OUTPUT:
        terminal.show(*_report(found, written))
    return 0


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
            *(_percent(row.error) for row in (fitted, left_out, flexgen)),
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
    return _percent(row.error)


def _percent(error: float) -> str:
    return f"{error * 100:+.1f} %"
