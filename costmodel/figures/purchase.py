"""What a purchase brings: throughput, tokens for a dollar and for a kWh."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from costmodel import words
from costmodel.figures.dots import downwards, draw_dots
from costmodel.figures.style import COLUMN, LEGEND, MARKS, PAGE, SMALL, dress, paper_figure

_PAID = {"bought": MARKS[0], "rented": MARKS[1]}


def purchase_figure(table: pd.DataFrame) -> Figure:
    """Throughput, tokens for a dollar and for a kWh of one model, best first; ``table`` is a ``purchase_table``."""
    ordered = table.sort_values("tok_per_usd", ascending=False, na_position="last")
    figure = paper_figure(PAGE, 0.85 + 0.19 * len(ordered))
    panels = (
        ("throughput_tok_per_s", "token/s"),
        ("tok_per_usd", "tokens for a dollar"),
        ("tok_per_kwh", "tokens for a kWh"),
    )
    for axes, (column, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        draw_ranking(axes, ordered, column, title)
    handles = [
        Line2D([], [], label=label, **{**_PAID[paid].line(), "linestyle": "none", "markersize": 5.0})
        for paid, label in (("bought", "bought"), ("rented", "rented, by the hour"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, **LEGEND)
    return figure


def draw_ranking(axes: Axes, table: pd.DataFrame, column: str, title: str) -> Axes:
    """One marker a machine with its number (log scale); a dash where the inputs do not say."""
    values = table[column].to_numpy(dtype=float)
    texts = ["–" if np.isnan(value) else words.number(float(f"{value:.3g}")) for value in values]
    draw_dots(axes, values, texts, [_PAID[paid] for paid in table["paid"]], room=2.5)
    dress(axes, title=title, grid=False)
    axes.set_yticks(downwards(len(table)), table["machine"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    return axes


def use_figure(table: pd.DataFrame, machines: Sequence[str]) -> Figure:
    """Tokens for a dollar over utilisation, for a few machines; ``table`` is a ``use_table`` of one model."""
    figure = paper_figure(COLUMN, 2.6)
    axes = figure.subplots()
    for mark, machine in zip(MARKS, machines, strict=False):
        part = table[table["machine"] == machine]
        label = f"{machine}, {part['paid'].iloc[0]}"
        axes.plot(part["utilisation"] * 100, part["tok_per_usd"], label=label, **mark.line())
    dress(axes, x="time in use (%)", y="tokens for a dollar (log scale)")
    axes.set_yscale("log")
    axes.set_xlim(0, 102)
    axes.legend(loc="lower right", **LEGEND)
    return figure
