"""Search results over cases: where everything lives, prompts and memory, prices and certificates."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MultipleLocator, NullFormatter

from costmodel import words
from costmodel.figures.dots import downwards, draw_dots
from costmodel.figures.style import COLUMN, GREY, INK, LEGEND, MARKS, PAGE, SMALL, dress, paper_figure
from costmodel.policy import TIERS

KINDS = ("weights", "cache")


# ------------------------------------------------------------------ where everything lives


def placement_figure(table: pd.DataFrame) -> Figure:
    """Throughput and placement of every case; ``table`` is a ``result_table``."""
    figure = paper_figure(PAGE, 0.85 + 0.17 * len(table))
    speed, weights, cache = figure.subplots(1, 3, sharey=True, width_ratios=(1.25, 1, 1))
    draw_speed(speed, table)
    draw_split(weights, table, "weights")
    draw_split(cache, table, "cache")
    figure.legend(
        handles=[_tier_patch(tier) for tier in TIERS], loc="outside lower center", ncols=3, **LEGEND
    )  # fmt: skip
    return figure


def draw_speed(axes: Axes, table: pd.DataFrame) -> Axes:
    """Throughput of every case (log scale), labelled with the batch shape."""
    speeds = table["throughput_tok_per_s"].to_numpy(dtype=float)
    shapes = [f"  ({shape})" if shape else "" for shape in _batches(table)]
    texts = [
        "does not fit" if np.isnan(speed) else f"{words.number(speed)}{shape}"
        for speed, shape in zip(speeds, shapes, strict=True)
    ]
    draw_dots(axes, speeds, texts, [MARKS[0]] * len(table), room=4.0)
    dress(axes, title="Throughput  (prompts × batches)", x="token/s (log scale)", grid=False)
    axes.set_yticks(downwards(len(table)), table["case"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    return axes


def draw_split(axes: Axes, table: pd.DataFrame, kind: str) -> Axes:
    """Stacked bars: the percentages of one kind on GPU, CPU and disk; a "4" marks 4-bit storage."""
    places = np.array(downwards(len(table)))
    left = np.zeros(len(table))
    for tier, mark in zip(TIERS, MARKS, strict=False):
        width = table[f"{kind}_{tier}_percent"].fillna(0.0).to_numpy(dtype=float)
        axes.barh(places, width, left=left, height=0.66, **mark.bar())
        left += width
    switch = "compress_weights" if kind == "weights" else "compress_cache"
    for place in places[table[switch].eq(True).to_numpy()]:
        axes.annotate(
            "4", (100, place), xytext=(3, 0), textcoords="offset points", va="center_baseline", fontsize=SMALL - 1
        )
    name = "KV cache" if kind == "cache" else kind
    dress(axes, title=f"{name.capitalize() if kind == 'weights' else name}  (4: in 4 bits)", x="%", grid=False)
    axes.set_xlim(0, 106)
    axes.xaxis.set_major_locator(MultipleLocator(25))
    axes.tick_params(axis="y", length=0)
    return axes


# ------------------------------------------------------------------ prompts and memory


def prompts_figure(table: pd.DataFrame) -> Figure:
    """Throughput over the prompt length, one line a model; ``table`` is an ``over_prompts`` table."""
    figure = paper_figure(COLUMN, 2.6)
    axes = figure.subplots()
    for mark, (model, part) in zip(MARKS, table.groupby("case", sort=False), strict=False):
        axes.plot(part["prompt_len"], part["throughput_tok_per_s"], label=model, **mark.line())
    dress(axes, x="prompt (tokens)", y="token/s (log scale)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(top=float(table["throughput_tok_per_s"].max()) * 6)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="upper right", ncols=2, **LEGEND)
    return figure


def memory_figure(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """Throughput over GPU memory, one line for each CPU memory, a panel for each (title, ``over_memory`` table)."""
    figure = paper_figure(PAGE, 2.7)
    many = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    highest = max(float(table["throughput_tok_per_s"].max()) for table in panels.values())
    for axes, (title, table) in zip(many, panels.items(), strict=True):
        for mark, (size, part) in zip(MARKS, table.groupby("cpu_gib", sort=False), strict=False):
            axes.plot(part["gpu_gib"], part["throughput_tok_per_s"], label=f"{size:g} GiB of CPU memory", **mark.line())
        dress(axes, title=title, x="GPU memory (GiB)", y="token/s" if axes is many[0] else "")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(0, highest * 1.06)
    handles, labels = many[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, **LEGEND)
    return figure


def prices_figure(panels: Mapping[str, pd.DataFrame]) -> Figure:
    """What more of each resource brings, a marker a case, a panel for each (title, ``price_table``)."""
    together = pd.concat(panels.values())
    order = together.groupby("what")["gain"].max().sort_values().index
    cases = together["case"].drop_duplicates().tolist()
    figure = paper_figure(PAGE, 1.1 + 0.2 * len(order))
    many = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    places = np.arange(len(order))
    for axes, (title, table) in zip(many, panels.items(), strict=True):
        gains = table.pivot(index="what", columns="case", values="gain").reindex(order) * 100
        for mark, offset, case in zip(MARKS, np.linspace(0.24, -0.24, len(cases)), cases, strict=False):
            style = {**mark.line(), "linestyle": "none", "markersize": 4.2}
            axes.plot(gains[case], places + offset, label=case, clip_on=False, zorder=3, **style)
        dress(axes, title=title, x="more throughput (%)")
        axes.set_yticks(places, order.tolist(), fontsize=SMALL)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(left=0)
        axes.set_ylim(-0.5, len(order) - 0.5)
    handles, labels = many[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(cases), **LEGEND)
    return figure


def certificates_figure(table: pd.DataFrame, gap: float) -> Figure:
    """Gap of every search against its linear programs; the line is the gap at which a search stops."""
    figure = paper_figure(COLUMN, 2.2)
    axes = figure.subplots()
    shown = table.dropna(subset=["gap"])
    style = {**MARKS[0].line(), "linestyle": "none", "alpha": 0.8}
    axes.plot(shown["linear_programs"], shown["gap"] * 100, **style)
    axes.axhline(gap * 100, color=GREY, linewidth=1.0, linestyle=(0, (4, 2)))
    axes.annotate(
        "stops here", (1.0, gap * 100), xycoords=("axes fraction", "data"), xytext=(0, 3),
        textcoords="offset points", ha="right", fontsize=SMALL, color=INK,
    )  # fmt: skip
    dress(axes, x="linear programs solved (log scale)", y="proven gap (%)")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, gap * 125)
    return figure


def _tier_patch(tier: str) -> Patch:
    mark = MARKS[TIERS.index(tier)]
    return Patch(label=words.memory_name(tier), facecolor=mark.colour, hatch=mark.hatch, edgecolor="white")


def _batches(table: pd.DataFrame) -> list[str]:
    return [
        "" if pd.isna(size) else f"{int(size)} × {int(number)}"
        for size, number in zip(table["gpu_batch_size"], table["num_gpu_batches"], strict=True)
    ]
