"""Predicted against measured: one marker a policy, coloured by its bottleneck, and a band of ±10 %."""

import math

import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

from costmodel import words
from costmodel.figures.style import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    INK,
    LEGEND,
    NORMAL,
    ORANGE,
    PAGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    paper_figure,
    plain_frame,
)
from costmodel.formulations.base import RESOURCES
from costmodel.units import GiB

REGIMES: dict[str, tuple[str, str]] = {
    resource: (colour, marker)
    for resource, colour, marker in zip(
        RESOURCES, (BLUE, PURPLE, ORANGE, GREEN, VERMILION, SKY), ("o", "s", "^", "v", "D", "X"), strict=True
    )
}

CLOSE = 0.1
"""The grey band: predictions within 10 % of the measurement."""


def agreement_figure(table: pd.DataFrame) -> Figure:
    """One panel a quantity of a :func:`costmodel.studies.validation.pairs_table`, three in a row."""
    table = _drawable(table)
    quantities = list(table["quantity"].drop_duplicates())
    rows = math.ceil(len(quantities) / 3)
    figure = paper_figure(PAGE, 0.35 + 2.35 * rows)
    panels = list(figure.subplots(rows, 3, squeeze=False).flat)
    for axes, quantity in zip(panels, quantities, strict=False):
        draw_agreement(axes, table[table["quantity"] == quantity])
        axes.set_title(_title(quantity), fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    for empty in panels[len(quantities) :]:
        empty.set_axis_off()
    found: dict[str, Artist] = {}
    for axes in panels[: len(quantities)]:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=len(found), **LEGEND)
    return figure


def draw_agreement(axes: Axes, table: pd.DataFrame, *, counts: bool = False) -> Axes:
    """``predicted`` over ``measured`` of one quantity by ``regime``, on equal logarithmic axes.

    ``counts`` adds the number of runs to each label of the legend. A run that has nothing of it is left out. A bar
    goes from the ``least`` to the ``most`` that was measured, where a policy ran more than once.
    """
    table = _drawable(table)
    unit, scale = _unit(table)
    seen = table[["measured", "predicted", "least", "most"]] / scale
    measured, predicted = seen["measured"], seen["predicted"]
    low, high = float(seen[seen > 0].min().min()) / 1.3, float(seen.max().max()) * 1.3
    axes.fill_between(
        [low, high], [low * (1 - CLOSE), high * (1 - CLOSE)], [low * (1 + CLOSE), high * (1 + CLOSE)], color="#EFEFEF"
    )
    axes.plot([low, high], [low, high], color=GREY, linewidth=1, linestyle=DASHES)
    ran_again = bool((seen["least"] < seen["most"]).any())
    if ran_again:
        axes.hlines(predicted, seen["least"].clip(lower=low), seen["most"], color=GREY, linewidth=1.2)
    for resource, (colour, marker) in REGIMES.items():
        those = table["regime"] == resource
        if those.any():
            axes.plot(
                measured[those],
                predicted[those],
                linestyle="none",
                marker=marker,
                color=colour,
                markersize=5,
                markeredgecolor="white",
                markeredgewidth=0.4,
                label=words.resource_name(resource) + (f" ({those.sum()})" if counts else ""),
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(_few_ticks(high / low))
        axis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value)))
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel(f"measured ({unit}{'; bar: its runs' if ran_again else ''})", fontsize=NORMAL)
    axes.set_ylabel(f"predicted ({unit})", fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    plain_frame(axes)
    return axes


def _few_ticks(span: float) -> Locator:
    """Three round numbers or so on an axis that is a third of a page wide, whose ends differ by this factor."""
    if span < 4:
        return MaxNLocator(3, steps=[1, 2, 2.5, 5, 10])
    return LogLocator(subs=(1.0, 2.0, 5.0) if span < 100 else (1.0, 3.0) if span < 500 else (1.0,))


def _drawable(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["measured"] > 0) & (table["predicted"] > 0)]


def _title(quantity: str) -> str:
    name = words.quantity_name(quantity)
    return name[0].upper() + name[1:]


def _unit(table: pd.DataFrame) -> tuple[str, float]:
    """What the axes count, and how much of the table's unit that is."""
    quantity = str(table["quantity"].iloc[0])
    if not quantity.startswith("peak"):
        return ("token/s" if quantity == "throughput" else "s"), 1.0
    return ("GiB", GiB) if table["measured"].median() >= 2 * GiB else ("MiB", GiB / 1024)
