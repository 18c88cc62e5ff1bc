"""What a validation file says, as tables: every pair of figures, errors by regime, residuals, the ranking."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from costmodel import words
from costmodel.estimate import PHASES
from costmodel.measurement import Measurement
from costmodel.validation import Errors, Validation
from costmodel.validation.statistics import COMPARED, QUANTITIES, WAITING, busy_s, errors_of, gaps, regime, value_of

ALL = "all runs"


def pairs_table(found: Validation) -> pd.DataFrame:
    """One row a run and quantity: predicted and measured (token/s, seconds or bytes), ``error``, and the run's regime.

    Of a policy that ran more than once it is the middle run; ``least`` and ``most`` are of all its runs that count.
    Quantities that a run lacks (a phase without work, an unused tier) have no row.
    """
    return pd.DataFrame(
        {
            "run": number,
            "regime": regime(one.measured),
            "quantity": name,
            "predicted": value_of(one.predicted, name),
            "measured": value_of(one.measured, name),
            "least": min(value_of(other.measured, name) for other in runs),
            "most": max(value_of(other.measured, name) for other in runs),
            "error": error,
        }
        for number, (one, runs) in enumerate(zip(found.measurements, found.by_policy, strict=True))
        for name, error in errors_of(one).items()
    )


def errors_table(found: Validation) -> pd.DataFrame:
    """One row a regime (first: all runs) and quantity: ``runs``, ``median`` and ``p90`` of sizes, ``worst``, ``bias``.

    Regimes and quantities in words, for people.
    """
    summary = found.summary()
    by_regime: dict[str, dict[str, Errors]] = {ALL: summary.errors}
    by_regime |= {words.resource_name(name): errors for name, errors in summary.regimes.items()}
    rows = [
        {"regime": name, "quantity": words.quantity_name(quantity), **vars(errors[quantity])}
        for name, errors in by_regime.items()
        for quantity in QUANTITIES
        if quantity in errors
    ]
    return pd.DataFrame(rows)


def residuals_table(measurements: Sequence[Measurement]) -> pd.DataFrame:
    """One row a run, phase and compared resource (or waiting): busy seconds, their ``ratio``, and what they explain.

    ``gap_s`` are the seconds by which the phase took longer than predicted on this account, ``gap_share`` the same
    as a share of the run's measured time. Over a run they sum to measured − predicted time. ``ratio`` is
    measured / predicted, NaN where nothing was predicted and for waiting.
    """
    rows = []
    for number, one in enumerate(measurements):
        whole_s = one.measured.prefill_s + one.measured.decode_s
        for phase in PHASES:
            split = gaps(one, phase)
            for resource in (*COMPARED, WAITING):
                before, after = (busy_s(one, cost, phase, resource) for cost in (one.predicted, one.measured))
                if not (before or after):
                    continue
                gap_s = split.get(resource, 0.0)
                rows.append(
                    {
                        "run": number,
                        "regime": regime(one.measured),
                        "phase": phase,
                        "resource": resource,
                        "predicted_s": before,
                        "measured_s": after,
                        "ratio": after / before if before > 0 and resource != WAITING else float("nan"),
                        "gap_s": gap_s,
                        "gap_share": gap_s / whole_s,
                    }
                )
    return pd.DataFrame(rows)


def causes_table(found: Validation) -> pd.DataFrame:
    """One row a phase and cause, in words, the largest gap first; ``gap_s`` sums to the whole difference."""
    table = pd.DataFrame([vars(cause) for cause in found.summary().causes])
    names: dict[str, str] = {
        WAITING: "not hidden",
        **{resource: words.compared_name(resource) for resource in COMPARED},
    }
    return table.assign(resource=table["resource"].map(names))


def ranking_table(found: Validation) -> pd.DataFrame:
    """The runs, best predicted first: throughput (token/s), where each policy came from, and what following costs.

    ``of_best`` is the share of the best measured throughput that a run reached, ``best_so_far`` the share that
    running the policies in this order has reached by then: one minus the first is the ranking's regret.
    """
    rows = [
        {
            "origin": drawn.origin,
            "about": drawn.about,
            "predicted_tok_per_s": one.predicted.throughput_tok_per_s,
            "measured_tok_per_s": one.measured.throughput_tok_per_s,
        }
        for drawn, one in zip(found.drawn, found.measurements, strict=False)
    ]
    table = pd.DataFrame(rows).sort_values("predicted_tok_per_s", ascending=False, kind="stable", ignore_index=True)
    measured = table["measured_tok_per_s"]
    table["of_best"] = measured / measured.max()
    table["best_so_far"] = table["of_best"].cummax()
    table.insert(0, "place", range(1, len(table) + 1))
    return table


def files_table(paths: Iterable[Path]) -> pd.DataFrame:
    """One row a validation file: how far off throughput and peak memory are, and what following the model costs.

    ``peak_memory_median`` is over all tiers, errors are sizes except ``throughput_worst``. ``repeatability`` is how far
    further runs of the same policies were from their middle run, in the median; NaN where each ran once.
    """
    rows = []
    for path in paths:
        found = Validation.from_file(path)
        summary, pairs = found.summary(), pairs_table(found)
        peaks = pairs.loc[pairs["quantity"].str.startswith("peak"), "error"].abs()
        throughput, again = summary.errors["throughput"], summary.repeatability
        rows.append(
            {
                "file": path.name,
                "hardware": found.hardware.name,
                "runs": summary.runs,
                "throughput_median": throughput.median,
                "throughput_p90": throughput.p90,
                "throughput_worst": throughput.worst,
                "repeatability": float("nan") if again is None else again.median,
                "peak_memory_median": peaks.median(),
                "peak_memory_p90": peaks.quantile(0.9),
                "kendall_tau": float("nan") if summary.ranking is None else summary.ranking.tau,
                "regret": float("nan") if summary.ranking is None else summary.ranking.regret,
            }
        )
    return pd.DataFrame(rows)


def findings(found: Validation, close: float = 0.1) -> list[str]:
    """Two sentences: how many policies are within ``close``, and where the fastest stood in the predicted order."""
    pairs, order = pairs_table(found), ranking_table(found)
    throughput = pairs.loc[pairs["quantity"] == "throughput", "error"].abs()
    peaks = pairs.loc[pairs["quantity"].str.startswith("peak"), "error"].abs()
    fastest = order.nlargest(min(3, len(order)), "measured_tok_per_s")["place"]
    places = ", ".join(str(place) for place in sorted(fastest))
    return [
        f"Throughput is within {close:.0%} for {(throughput <= close).mean():.0%} of the policies; peak memory is off "
        f"by {peaks.median():.1%} in the median over all tiers.",
        f"The {words.counted(len(fastest), 'fastest policy', 'fastest policies')} stood at {places} of {len(order)} in "
        "the predicted order.",
    ]
