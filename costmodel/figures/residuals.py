"""Residuals of a validation: which resource took longer than predicted, in each run and over all of them."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from costmodel import words
from costmodel.figures.agreement import CLOSE
from costmodel.figures.style import (
    DASHES,
    GREY,
    INK,
    LEGEND,
    MARKS,
    NORMAL,
    PAGE,
    SMALL,
    dress,
    paper_figure,
)
from costmodel.validation.statistics import COMPARED, WAITING

CAUSES = dict(zip((*COMPARED, WAITING), MARKS, strict=False))
_PHASES = {"prefill": -0.16, "decode": 0.16}


def residuals_figure(table: pd.DataFrame) -> Figure:
    """A :func:`costmodel.studies.validation.residuals_table`: the gap of every run, and how true each rate is."""
    figure = paper_figure(PAGE, 3.2)
    left, right = figure.subplots(1, 2, width_ratios=(5, 4))
    draw_gaps(left, table)
    draw_busy_ratios(right, table)
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, **LEGEND)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=2, **LEGEND)
    return figure


def draw_gaps(axes: Axes, table: pd.DataFrame) -> Axes:
    """A stacked bar a run: measured − predicted time by cause, both phases together, in percent of measured time."""
    shares = table.pivot_table(index="run", columns="resource", values="gap_share", aggfunc="sum", fill_value=0.0) * 100
    shares = shares.loc[shares.sum(axis=1).sort_values().index]
    above, below = (pd.Series(0.0, index=shares.index) for _ in range(2))
    for cause, mark in CAUSES.items():
        if cause not in shares or not shares[cause].any():
            continue
        part = shares[cause]
        base = above.where(part >= 0, below)
        axes.bar(range(len(shares)), part, bottom=base, width=0.82, label=_name(cause), **mark.bar())
        above, below = above + part.clip(lower=0), below + part.clip(upper=0)
    total = shares.sum(axis=1)
    axes.plot(range(len(shares)), total, linestyle="none", marker="_", markersize=7, color=INK, label="together")
    axes.axhline(0, color=INK, linewidth=0.8)
    dress(axes, title="What took longer (+) or shorter", x="runs, by total", y="% of the measured time")
    axes.grid(visible=False, axis="x")
    axes.set_xticks([])
    axes.set_xlim(-0.6, len(shares) - 0.4)
    return axes


def draw_busy_ratios(axes: Axes, table: pd.DataFrame) -> Axes:
    """A line a resource: measured / predicted busy seconds of every run (log scale), and the median of each phase."""
    known = table[table["ratio"].notna() & (table["ratio"] > 0)]
    shown: list[str] = [resource for resource in reversed(COMPARED) if (known["resource"] == resource).any()]
    axes.axvspan(1 / (1 + CLOSE), 1 + CLOSE, color="#EFEFEF", zorder=0)
    axes.axvline(1, color=GREY, linewidth=1, linestyle=DASHES, zorder=0)
    for mark, (phase, offset) in zip(MARKS, _PHASES.items(), strict=False):
        those = known[known["phase"] == phase]
        places = those["resource"].map(shown.index) - offset
        style = {**mark.line(), "linestyle": "none", "alpha": 0.75}
        axes.plot(those["ratio"], places, label=f"{phase} (line: median)", **style)
        for resource, ratios in those.groupby("resource")["ratio"]:
            place = shown.index(str(resource)) - offset
            axes.vlines(float(ratios.median()), place - 0.15, place + 0.15, color=INK, linewidth=1.4, zorder=4)
    axes.set_xscale("log")
    low, high = min(known["ratio"].min(), 0.8) / 1.1, max(known["ratio"].max(), 1.25) * 1.1
    axes.set_xlim(low, high)
    dress(axes, title="How true each rate is (shaded: ±10 %)", x="measured / predicted busy seconds")
    axes.xaxis.set_major_locator(LogLocator(subs=_steps(high / low)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(range(len(shown)), [_name(name) for name in shown], fontsize=NORMAL)
    axes.tick_params(axis="y", length=0, labelsize=SMALL)
    axes.set_ylim(-0.5, len(shown) - 0.5)
    axes.grid(visible=False, axis="y")
    return axes


def _steps(span: float) -> tuple[float, ...]:
    """Where ticks lie in a decade, so that their labels do not touch where the axis' ends differ by this factor."""
    if span > 200:
        return (1.0,)
    return (1.0, 2.0, 5.0) if span > 8 else (0.5, 0.8, 1.0, 1.25, 2.0)


def _name(cause: str) -> str:
    return "not hidden" if cause == WAITING else words.compared_name(cause)
