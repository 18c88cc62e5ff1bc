"""What a validation found, for people: errors, regimes, causes, the ranking, and three sentences."""

from collections.abc import Mapping, Sequence

from rich.text import Text

from costmodel import units, words
from costmodel.commands import terminal
from costmodel.validation import Cause, Errors, Summary, Validation
from costmodel.validation.statistics import WAITING

_CAUSES_SHOWN = 8

_FEW_RUNS = 10
"""Of fewer runs the worst is told: what holds nine times in ten cannot be seen in them."""


def report(found: Validation, *, written: Sequence[str]) -> list[terminal.Renderable]:
    """Tables, then the sentences; for a validation with at least one run."""
    summary = found.summary()
    runs = words.counted(summary.runs, "run") + (", the middle one of each policy" if found.several else "")
    return [
        terminal.heading(f"Errors of {runs}: predicted / measured − 1"),
        _errors({words.quantity_name(name): errors for name, errors in summary.errors.items()}, "quantity"),
        terminal.heading("Throughput by measured bottleneck"),
        _errors(
            {words.resource_name(name): errors["throughput"] for name, errors in summary.regimes.items()}, "busiest"
        ),
        terminal.heading(f"What took longer or shorter than predicted (busy seconds of {_told(found)})"),
        _causes(summary),
        Text(),
        terminal.facts(*_facts(found, written)),
        terminal.heading("In short"),
        *(Text(sentence) for sentence in sentences(found)),
    ]


def sentences(found: Validation) -> tuple[str, str, str]:
    """What was run, how far the predictions were off and why, and what following them costs."""
    return _what_ran(found), _how_far_off(found), _what_following_costs(found)


def _what_ran(found: Validation) -> str:
    first, runs = found.measurements[0], len(found.measurements)
    held = found.hardware.capacity_bytes
    names = {"gpu": "memory", "cpu": "a second tier of memory"}
    if not found.hardware.gpu.is_host_memory:
        names = {tier: words.memory_name(tier) for tier in names}
    sizes = " and ".join(f"{units.format_bytes(held[tier])} of {name}" for tier, name in names.items() if held[tier])
    reading = sum(one.measured.bytes_moved["disk_read"] > 0 for one in found.measurements)
    offloaded = f"{reading} of them" if reading < runs else "each"
    streamed = f"; {offloaded} streamed what did not fit from disk" if reading else ""
    policies = words.counted(runs, "policy", "policies")
    were = "was" if runs == 1 else "were"
    at = "up to " if found.left else "at least " if len(found.runs) > found.asked else ""
    times = f" {at}{found.repeats} times each" if found.repeats > 1 else ""
    return f"{policies} for {first.model.name} {were} predicted, then run{times} in {sizes}{streamed}."


def _how_far_off(found: Validation) -> str:
    summary, signed = found.summary(), [one.throughput_error for one in found.measurements]
    errors = summary.errors["throughput"]
    text = f"Predicted throughput is off by {_size(errors.median)}"
    if summary.runs >= _FEW_RUNS:
        text += f" in the median, nine times in ten by less than {_size(errors.p90)}"
    elif summary.runs > 1:
        text += f" in the median and by {_size(abs(errors.worst))} at the most"
    if min(signed) > 0 or max(signed) < 0:
        text += f",{' always' if summary.runs > 1 else ''} too {'high' if signed[0] > 0 else 'low'}"
    if summary.repeatability is not None:
        text += f" (run again, the same policy differs by {_size(summary.repeatability.median)}"
        text += " in the median)" if summary.repeatability.runs > 1 else ")"
    worst = summary.causes[0] if summary.causes else None
    if worst is None or abs(worst.gap_s) < 1e-3:
        return f"{text}."
    took = f"{units.format_seconds(abs(worst.gap_s))} {'more' if worst.gap_s > 0 else 'less'} than predicted"
    text += f"; the largest difference is {_cause_name(worst)} in {worst.phase}"
    return f"{text}: {took} in {_told(found)} together."


def _what_following_costs(found: Validation) -> str:
    ranking = found.summary().ranking
    if ranking is None:
        return "One policy has no ranking: give more --runs to see whether the policy predicted best is the best."
    followed = found.measurements[ranking.best_predicted].measured.throughput_tok_per_s
    best = found.measurements[ranking.best_measured].measured.throughput_tok_per_s
    order = f"(Kendall's tau {ranking.tau:z.2f}, where 1 is the same order)"
    if ranking.best_predicted == ranking.best_measured:
        return f"The policy predicted best was the fastest that was measured, {words.number(best)} token/s {order}."
    return (
        f"The policy predicted best ran at {words.number(followed)} token/s, {_size(ranking.regret)} below the fastest "
        f"that was measured, {words.number(best)} token/s {order}."
    )


def _errors(rows: Mapping[str, Errors], label: str) -> terminal.Renderable:
    table = terminal.table(label, ">runs", ">median size", ">90th percentile", ">worst", ">median")
    for name, one in rows.items():
        with_sign = (words.signed_percent(error) for error in (one.worst, one.bias))
        table.add_row(name, str(one.runs), _size(one.median), _size(one.p90), *with_sign)
    return table


def _causes(summary: Summary) -> terminal.Renderable:
    table = terminal.table("phase", "what", ">runs", ">predicted", ">measured", ">ratio", ">explains")
    for cause in summary.causes[:_CAUSES_SHOWN]:
        table.add_row(
            cause.phase,
            _cause_name(cause),
            str(cause.runs),
            _seconds(cause.predicted_s),
            _seconds(cause.measured_s),
            "" if cause.ratio is None or cause.resource == WAITING else f"{cause.ratio:.2f}",
            _seconds(cause.gap_s, signed=True),
        )
    return table


def _facts(found: Validation, written: Sequence[str]) -> list[terminal.Row]:
    summary = found.summary()
    rows: list[terminal.Row] = []
    if summary.repeatability is not None:
        rows.append(("Run again", _repeatability(summary.repeatability)))
    if summary.over_budget:
        many = words.counted(summary.over_budget, "run")
        rows.append(("Memory", f"{many} took more than the usable part of a budget, {_over(found)} at the most"))
    if summary.set_aside or summary.only_apart:
        many = words.counted(summary.set_aside, "run")
        why = "the cores shared no cache meanwhile, as the host of a virtual machine moves them"
        also = words.counted(summary.only_apart, "policy has", "policies have") + " no other run, and seem slower"
        rows.append(("Set aside", f"{many} of {len(found.runs)}: {why}" + (f"; {also}" if summary.only_apart else "")))
    if found.left:
        rows.append(("Unfinished", f"{words.counted(len(found.left), 'run')} still to be made (--resume)"))
    return [*rows, ("Measured", measured_on(found)), ("Wrote", ", ".join(written))]


def _repeatability(again: Errors) -> str:
    more = words.counted(again.runs, "more run")
    text = f"{more} of the same policies: throughput differs from the middle run's by {_size(again.median)}"
    return f"{text} in the median and by {_size(abs(again.worst))} at the most" if again.runs > 1 else text


def measured_on(found: Validation) -> str:
    """Type, processor, commit and date of the runs."""
    first = found.measurements[0]
    return f"{first.dtype} on {first.origin['cpu']['name']}, commit {first.origin['commit']}, {first.origin['date']}"


def _told(found: Validation) -> str:
    """The runs that statistics are of."""
    return "the middle runs" if found.several else "all runs"


def _over(found: Validation) -> str:
    """The largest excess over a limit, as a share of it."""
    pairs = [
        (one.measured.peak_bytes[tier], one.measured.limit_bytes[tier])
        for one in found.measurements
        for tier in one.measured.violations
    ]
    return _size(max(peak / limit - 1 if limit else 1.0 for peak, limit in pairs))


def _cause_name(cause: Cause) -> str:
    return "waiting, not hidden" if cause.resource == WAITING else words.compared_name(cause.resource)


def _seconds(value: float, *, signed: bool = False) -> str:
    """To the microsecond: what is left of a difference by rounding is no time, and 0 has no sign."""
    value = round(value, 6)
    sign = "−" if value < 0 else "+" if value > 0 and signed else ""
    return f"{sign}{units.format_seconds(abs(value))}"


def _size(error: float) -> str:
    return f"{error * 100:,.1f} %"
