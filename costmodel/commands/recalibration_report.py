"""What a calibration to measured runs found, for people: constants, held-out errors, and what was not identified."""

from collections.abc import Mapping, Sequence

from rich.text import Text

from costmodel import units, words
from costmodel.calibrate.held_out import Comparison
from costmodel.calibrate.machine import FittedConstant, Recalibration
from costmodel.commands import terminal
from costmodel.uncertainty import LEVEL
from costmodel.units import Dimension
from costmodel.validation import Errors

_NAMES = {"throughput": "throughput", "prefill": "prefill time", "decode": "decode time"}


def report(found: Recalibration, *, written: Sequence[str]) -> list[terminal.Renderable]:
    """Tables, then sentences."""
    runs = words.counted(len(found.rows), "run")
    parts: list[terminal.Renderable] = [
        terminal.heading(f"Constants of {found.hardware.name} that {runs} identify"),
        _constants(found.constants),
        terminal.heading("Errors of runs that were not fitted to (sizes of predicted / measured − 1)"),
        _errors({_NAMES[name]: pair for name, pair in _pairs(found.held_out).items()}, "quantity"),
    ]
    if found.regimes:
        regimes = {words.resource_name(name): Comparison.of(some) for name, some in found.regimes.items()}
        parts += [
            terminal.heading("Throughput of a measured bottleneck whose runs were all left out"),
            _errors({name: _pairs(one)["throughput"] for name, one in regimes.items()}, "busiest"),
        ]
    if found.kept:
        kept = terminal.facts(*((one.constant.name, f"{one.why}; {one.constant.run}") for one in found.kept))
        parts += [
            terminal.heading("Not identified by these runs, kept as the file has them; and a run that tells"),
            kept,
        ]
    parts += [terminal.heading("In short"), *(Text(sentence) for sentence in sentences(found))]
    if written:
        parts += [Text(), terminal.facts(("Wrote", ", ".join(written)))]
    return parts


def sentences(found: Recalibration) -> list[str]:
    """What the calibration is worth: the held-out error before and after, and the interval's coverage."""
    held_out = found.held_out
    before, after = held_out.before["throughput"], held_out.after["throughput"]
    change = f"from {_percent(before.median)} to {_percent(after.median)} in the median, nine times in ten below "
    change += f"{_percent(after.p90)} instead of {_percent(before.p90)}"
    if after.median < before.median:
        text = f"Calibration takes the error of throughput of runs that it has not seen {change}."
    else:
        text = f"Calibration does not help here: the error of throughput of runs that it has not seen goes {change}."
    inside = sum(row.inside for row in found.rows)
    cover = f"Of {words.counted(len(found.rows), 'held-out run')}, {inside} ({found.coverage * 100:.0f} %) lay within "
    cover += f"the interval stated for {LEVEL * 100:.0f} % of runs."
    bound = [one.constant.what for one in found.constants if one.at_bound]
    if not bound:
        return [text, cover]
    went = f"{' and '.join(bound)} went as far as the fit allows: look at what the runs do there before trusting it."
    return [text, cover, went[:1].upper() + went[1:]]


def _constants(constants: Sequence[FittedConstant]) -> terminal.Renderable:
    table = terminal.table("constant", ">file", ">fitted", f">{LEVEL * 100:.0f} % interval", ">factor", "")
    for one in constants:
        before, after, low, high = (_value(one, getattr(one, name)) for name in ("before", "after", "low", "high"))
        factor = "" if one.constant.is_share or not one.before else f"{one.after / one.before:.2f}"
        table.add_row(one.constant.name, before, after, f"{low} – {high}", factor, "bound" if one.at_bound else "")
    return table


def _value(one: FittedConstant, value: float) -> str:
    path = one.constant.path
    if one.constant.is_share:
        return f"{value:.2f}"
    if not path.endswith("_per_s"):
        return units.format_seconds(value)
    ends: tuple[tuple[str, Dimension], ...] = (
        ("bytes_per_s", "bytes/s"),
        ("flops_per_s", "FLOP/s"),
        ("values_per_s", "values/s"),
    )
    return units.format_rate(value, next(dimension for end, dimension in ends if path.endswith(end)))


def _pairs(found: Comparison) -> dict[str, tuple[Errors, Errors]]:
    return {name: (found.before[name], found.after[name]) for name in found.before}


def _errors(rows: Mapping[str, tuple[Errors, Errors]], label: str) -> terminal.Renderable:
    headings = [text for kind in ("median", "90th percentile", "worst") for text in (f">{kind}", ">fitted")]
    table = terminal.table(label, ">runs", *headings)
    for name, (before, after) in rows.items():
        sizes = [_percent(size) for size in (before.median, after.median, before.p90, after.p90)]
        table.add_row(name, str(before.runs), *sizes, *(words.signed_percent(one.worst, 0) for one in (before, after)))
    return table


def _percent(error: float) -> str:
    return f"{error * 100:,.1f} %"
