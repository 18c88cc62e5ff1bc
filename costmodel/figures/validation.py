"""A validation: predicted against measured throughput by regime, and the errors of every quantity."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator

from costmodel import words
from costmodel.figures.agreement import CLOSE, REGIMES, draw_agreement
from costmodel.figures.style import (
    DASHES,
    GREY,
    INK,
    LEGEND,
    NORMAL,
    PAGE,
    SMALL,
    add_titles,
    paper_figure,
    plain_frame,
)
from costmodel.studies.validation import pairs_table
from costmodel.validation import Validation, frame
from costmodel.validation.statistics import QUANTITIES

MOST_SHOWN = 60.0
"""Errors beyond this many percent are drawn at the edge, with an arrow."""


def validation_figure(found: Validation) -> Figure:
    """Predicted against measured, and where the errors are; for a validation with at least one run."""
    figure = paper_figure(PAGE, 3.8)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    draw_throughput(left, found)
    draw_errors(right, found)
    summary, first = found.summary(), found.measurements[0]
    errors = summary.errors["throughput"]
    title = f"{first.model.name} on {found.hardware.name}: predicted throughput is off by "
    title += f"{errors.median * 100:,.1f} % in the median"
    workload = f"{first.workload.prompt_len:,} + {first.workload.gen_len:,} tokens"
    tau = "" if summary.ranking is None else f"; Kendall's tau {summary.ranking.tau:z.2f}"
    below = (
        f"{words.counted(summary.runs, 'policy', 'policies')}, {workload}; 90 % within {errors.p90 * 100:,.1f} %{tau}"
    )
    add_titles(figure, title, below)
    return figure


def draw_throughput(axes: Axes, found: Validation) -> Axes:
    """One marker a policy, coloured by the measured bottleneck, on equal logarithmic axes; the band is ±10 %.

    Where policies ran more than once, a bar goes from the least to the most that was measured.
    """
    table = pairs_table(found)
    draw_agreement(axes, table[table["quantity"] == "throughput"], counts=True)
    axes.legend(loc="best", title="busiest, as measured", title_fontsize=SMALL, **{**LEGEND, "handlelength": 0.8})
    axes.set_title("Throughput", fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    return axes


def draw_errors(axes: Axes, found: Validation) -> Axes:
    """One row a quantity, one marker a policy: how much too high (right) or too low the prediction was."""
    table = frame(found.measurements)
    shown = [name for name in QUANTITIES if table[_column(name)].notna().any()]
    axes.axvspan(-CLOSE * 100, CLOSE * 100, color="#EFEFEF", zorder=0)
    axes.axvline(0, color=GREY, linewidth=1, linestyle=DASHES, zorder=0)
    most = 12.0
    for place, name in enumerate(reversed(shown)):
        for number, (error, busiest) in enumerate(zip(table[_column(name)], table["regime"], strict=True)):
            if math.isnan(error):
                continue
            percent = max(-MOST_SHOWN, min(MOST_SHOWN, error * 100))
            most = max(most, abs(percent) * 1.08)
            colour, marker = REGIMES[str(busiest)]
            beyond = abs(error) * 100 > MOST_SHOWN
            axes.plot(
                percent,
                place + (number % 5 - 2) * 0.09,
                linestyle="none",
                marker=(">" if error > 0 else "<") if beyond else marker,
                color=colour,
                markersize=4.2,
                markeredgecolor="white",
                alpha=0.9,
                clip_on=False,
            )
        median = float(table[_column(name)].median()) * 100
        axes.vlines(max(-MOST_SHOWN, min(MOST_SHOWN, median)), place - 0.32, place + 0.32, color=INK, linewidth=1.2)
    axes.set_yticks(range(len(shown)), [words.quantity_name(name) for name in reversed(shown)], fontsize=NORMAL)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.set_xlim(-most, most)
    axes.xaxis.set_major_locator(MultipleLocator(5 if most < 15 else 10 if most < 45 else 20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.0f} %" if value else "0"))
    axes.set_xlabel("predicted / measured − 1 (line: median)", fontsize=NORMAL)
    plain_frame(axes)
    axes.set_title("Errors by quantity", fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    return axes


def _column(quantity: str) -> str:
    return f"{quantity.replace(' ', '_')}_error"
