"""Published throughput of several systems, and predictions of one of them, one line a run."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from costmodel import words
from costmodel.figures.style import (
    BLUE,
    GREEN,
    INK,
    LEGEND,
    NORMAL,
    ORANGE,
    PAGE,
    PURPLE,
    SMALL,
    VERMILION,
    add_titles,
    dress,
    paper_figure,
)

_ABOVE, _ON, _BELOW = 0.27, 0.0, -0.27

# Column → label, marker, colour, place on the line. Hollow: predicted, filled: published.
SERIES: dict[str, tuple[str, str, str, float]] = {
    "accelerate_tok_per_s": ("Accelerate, published", "X", PURPLE, _ABOVE),
    "deepspeed_tok_per_s": ("DeepSpeed, published", "P", GREEN, _ON),
    "flexgen_tok_per_s": ("FlexGen, published", "o", BLUE, _ON),
    "predicted_tok_per_s": ("FlexGen's policy, predicted", "o", INK, _ON),
    "best_engine_tok_per_s": ("best policy, FlexGen's engine, predicted", "^", ORANGE, _BELOW),
    "best_ours_tok_per_s": ("best policy, Tierwise's engine, predicted", "D", VERMILION, _BELOW),
}
_PREDICTED = ("predicted_tok_per_s", "best_engine_tok_per_s", "best_ours_tok_per_s")


def systems_figure(table: pd.DataFrame) -> Figure:
    """One panel a prompt length of a :func:`costmodel.studies.paper.systems_table`, the longest first."""
    lengths = sorted(table["prompt_len"].unique(), reverse=True)
    figure = paper_figure(PAGE, 3.5)
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False, width_ratios=_widths(len(lengths)))[0]
    for axes, prompt_len in zip(panels, lengths, strict=True):
        draw_systems(axes, table[table["prompt_len"] == prompt_len].reset_index(drop=True))
        axes.set_title(f"Prompts of {prompt_len} tokens", fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **LEGEND)
    below = "filled: published; hollow: predicted by the roofline cost model"
    add_titles(figure, "Generation throughput on one T4", below)
    return figure


def draw_systems(axes: Axes, table: pd.DataFrame) -> Axes:
    """One line a run, one marker a system (log scale); what the data lack is left out."""
    places = table.index.max() - table.index.to_numpy()
    for column, (label, marker, colour, offset) in SERIES.items():
        hollow = column in _PREDICTED
        size = 7.5 if column == "predicted_tok_per_s" else 5.0
        style: dict[str, Any] = {
            "marker": marker,
            "markersize": size,
            "color": colour,
            "markerfacecolor": "none" if hollow else colour,
            "markeredgecolor": colour if hollow else "white",
            "markeredgewidth": 1.1 if hollow else 0.4,
        }
        axes.plot(table[column], places + offset, linestyle="none", label=label, zorder=3, **style)
    axes.set_xscale("log")
    dress(axes, x="token/s (log scale)")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_yticks(places, [f"{row['model']}, {row['kept']}" for _, row in table.iterrows()], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.5, len(table) - 0.5)
    for border in places[:-1] - 0.5:
        axes.axhline(border, color="#E5E5E5", linewidth=0.5)
    axes.grid(visible=False, axis="y")
    return axes


def _widths(panels: int) -> list[float]:
    """The first panel holds the other systems as well, over more decades."""
    return [1.5, *[1.0] * (panels - 1)]
