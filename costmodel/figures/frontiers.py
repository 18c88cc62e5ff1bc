"""Several frontiers on one pair of axes, with published runs among them."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from costmodel import words
from costmodel.figures.frontier import label_times
from costmodel.figures.style import (
    GREY,
    INK,
    LEGEND,
    MARKS,
    NORMAL,
    PAGE,
    add_titles,
    dress,
    paper_figure,
)

# System, what it kept in 16 or 4 bits, marker and its size.
_PUBLISHED = (
    ("FlexGen", "16-bit", "o", 7.0),
    ("FlexGen", "4-bit", "*", 10.0),
    ("DeepSpeed", "16-bit", "P", 7.0),
    ("Accelerate", "16-bit", "X", 7.0),
)


def frontiers_figure(curves: dict[str, pd.DataFrame], published: dict[str, pd.DataFrame]) -> Figure:
    """One panel a model: its :func:`~costmodel.studies.frontiers.frontiers` and published points."""
    figure = paper_figure(PAGE, 3.8)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (model, table) in zip(panels, curves.items(), strict=True):
        draw_frontiers(axes, table, published[model])
        axes.set_title(model, fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **LEGEND)
    below = "lines: the best policy under each latency limit, predicted; black: published runs (whiskers: rounding)"
    add_titles(figure, "Throughput against latency, prompts of 512 and 32 new tokens", below)
    return figure


def draw_frontiers(axes: Axes, table: pd.DataFrame, published: pd.DataFrame) -> Axes:
    """Step lines of ``curve`` over ``latency_s`` (both axes log), and the ``published`` systems' marks.

    Whiskers are what rounding of the published figures leaves open.
    """
    for mark, (name, points) in zip(MARKS, table.groupby("curve", sort=False), strict=False):
        ordered = points.sort_values("latency_s")
        axes.step(
            ordered["latency_s"],
            ordered["throughput_tok_per_s"],
            where="post",
            label=str(name),
            **{**mark.line(), "markersize": 3.0},
        )
    _draw_published(axes, published)
    axes.set_xscale("log")
    axes.set_yscale("log")
    dress(axes, x="time for one block (log scale)", y="throughput (token/s, log scale)")
    label_times(axes, most=6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: words.number(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    return axes


def _draw_published(axes: Axes, published: pd.DataFrame) -> None:
    compressed = published["kept"] != "16-bit"
    for system, kept, marker, size in _PUBLISHED:
        points = published[(published["system"] == system) & (compressed == (kept == "4-bit"))]
        rate, tokens = points["throughput_tok_per_s"], points["prompts"] * points["gen_len"]
        axes.errorbar(
            points["latency_s"],
            rate,
            xerr=(points["latency_s"] - tokens / points["high"], tokens / points["low"] - points["latency_s"]),
            yerr=(rate - points["low"], points["high"] - rate),
            marker=marker,
            markersize=size,
            color=INK,
            markeredgecolor="white",
            ecolor=GREY,
            elinewidth=0.8,
            linestyle="none",
            label=f"{system}, published" if system != "FlexGen" else f"{system}, {kept}, published",
            zorder=4,
        )
