"""The ranking of a validation: measured throughput in the order in which the model would try the policies."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from costmodel.figures.style import BLUE, GREY, LEGEND, MARKS, PAGE, dress, paper_figure
from costmodel.validation.draw import DRAWN, NEIGHBOUR, SEARCHED

_ORIGINS = {
    SEARCHED: "found by the search",
    NEIGHBOUR: "one decision away from it",
    DRAWN: "drawn",
}


def ranking_figure(table: pd.DataFrame) -> Figure:
    """A :func:`costmodel.studies.validation.ranking_table`: the order, and what trying the first few reaches."""
    figure = paper_figure(PAGE, 2.9)
    left, right = figure.subplots(1, 2, width_ratios=(5, 3))
    draw_order(left, table)
    draw_regret(right, table)
    return figure


def draw_order(axes: Axes, table: pd.DataFrame) -> Axes:
    """Measured throughput by place in the predicted order, over the line of what was predicted."""
    axes.plot(
        table["place"], table["predicted_tok_per_s"], color=GREY, linewidth=2.5, alpha=0.5, label="predicted", zorder=1
    )
    for mark, (origin, label) in zip(MARKS, _ORIGINS.items(), strict=False):
        those = table[table["origin"] == origin]
        style = {**mark.line(), "linestyle": "none", "markersize": 5.0}
        axes.plot(those["place"], those["measured_tok_per_s"], label=f"measured, {label}", **style)
    dress(axes, title="In the predicted order", x="place, best predicted first", y="token/s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    axes.set_xlim(0.3, len(table) + 0.7)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, **LEGEND)
    return axes


def draw_regret(axes: Axes, table: pd.DataFrame) -> Axes:
    """The best measured throughput among the first policies tried, in percent of the best of all."""
    axes.step(table["place"], table["best_so_far"] * 100, where="post", label="in the predicted order", color=BLUE)
    dress(axes, title="What the first few reach", x="policies tried, best predicted first", y="% of the best measured")
    lowest = float(table["best_so_far"].min()) * 100
    axes.set_xlim(0.3, len(table) + 0.7)
    axes.set_ylim(min(90.0, lowest - 2), 101)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    return axes
