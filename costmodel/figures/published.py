"""The published runs: where each second goes, and both cost models against what was measured."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from costmodel.figures.style import COLUMN, GREY, INK, LEGEND, MARKS, PAGE, SMALL, SURFACE, THREAD, dress, paper_figure
from costmodel.formulations.base import RESOURCES

LABELS = {"flexgen": "FlexGen's cost model", "roofline": "our cost model"}

_SHORT: dict[str, str] = {
    "gpu_compute": "GPU",
    "cpu_compute": "CPU",
    "cpu_to_gpu": "CPU→\nGPU",
    "gpu_to_cpu": "GPU→\nCPU",
    "disk_read": "disk\nread",
    "disk_write": "disk\nwrite",
}

_SHADES = LinearSegmentedColormap.from_list("busy", ["#FFFFFF", "#0072B2"])
"""White to blue: monotonous in lightness, so that a grey print shows the same order."""


def errors_figure(table: pd.DataFrame) -> Figure:
    """Relative errors of both cost models by run; ``table`` is an ``error_table``."""
    figure = paper_figure(PAGE, 0.75 + 0.19 * len(table))
    draw_errors(figure.subplots(), table)
    return figure


def draw_errors(axes: Axes, table: pd.DataFrame) -> Axes:
    """One row a run, a marker for each cost model, joined; the band is ±10 %."""
    places = range(len(table))[::-1]
    axes.axvspan(-10, 10, color=SURFACE, zorder=0)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.hlines(
        places, table["flexgen_error"] * 100, table["roofline_error"] * 100, color=THREAD, linewidth=1.0, zorder=1
    )
    for mark, name in zip((MARKS[3], MARKS[0]), ("flexgen", "roofline"), strict=True):
        style = {**mark.line(), "linestyle": "none", "markersize": 5.0}
        axes.plot(table[f"{name}_error"] * 100, places, label=LABELS[name], **style)
    dress(axes, x="predicted / published throughput − 1 (%; band: ±10 %)")
    axes.grid(visible=False, axis="y")
    axes.set_yticks(places, table["run"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.legend(loc="lower right", **LEGEND)
    return axes


def agreement_figure(table: pd.DataFrame) -> Figure:
    """Predicted against published throughput; ``table`` is an ``error_table``."""
    figure = paper_figure(COLUMN, 3.3)
    draw_agreement(figure.subplots(), table)
    return figure


def draw_agreement(axes: Axes, table: pd.DataFrame) -> Axes:
    """Both cost models on equal logarithmic axes; the line is agreement, the band ±10 %."""
    columns = ["published_tok_per_s", "flexgen_tok_per_s", "roofline_tok_per_s"]
    low, high = table[columns].min().min() / 1.4, table[columns].max().max() * 1.4
    axes.fill_between([low, high], [low * 0.9, high * 0.9], [low * 1.1, high * 1.1], color=SURFACE, zorder=0)
    axes.plot([low, high], [low, high], color=GREY, linewidth=0.8)
    for mark, name in zip((MARKS[3], MARKS[0]), ("flexgen", "roofline"), strict=True):
        style = {**mark.line(), "linestyle": "none", "markersize": 5.0}
        axes.plot(table["published_tok_per_s"], table[f"{name}_tok_per_s"], label=LABELS[name], **style)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_tick_params(which="both", labelsize=SMALL)
    axes.set_xscale("log")
    axes.set_yscale("log")
    dress(axes, x="published throughput (token/s)", y="predicted (token/s)")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_aspect("equal")
    axes.legend(loc="upper left", **LEGEND)
    return axes


def seconds_figure(table: pd.DataFrame) -> Figure:
    """Where each second of both phases goes; ``table`` is a ``seconds_table``."""
    runs = table["run"].nunique()
    figure = paper_figure(PAGE, 1.15 + 0.19 * runs)
    left, right = figure.subplots(1, 2)
    draw_seconds(left, table, "prefill")
    draw_seconds(right, table, "decode").set_yticklabels([])
    return figure


def draw_seconds(axes: Axes, table: pd.DataFrame, phase: str) -> Axes:
    """One row a run, one column a resource: the share of the phase for which it is busy (bold: the bottleneck)."""
    part = table[table["phase"] == phase]
    runs = part["run"].drop_duplicates().tolist()
    by_run = part.pivot(index="run", columns="resource").reindex(runs)
    shares = by_run["busy_share"][list(RESOURCES)].to_numpy(dtype=float)
    limiting = by_run["bottleneck"][list(RESOURCES)].to_numpy(dtype=bool)
    lengths = part.groupby("run", sort=False)["phase_share"].first().to_numpy(dtype=float)
    axes.pcolormesh(shares, cmap=_SHADES, vmin=0, vmax=1, edgecolors="white", linewidth=1.0)
    centred: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL}
    for (row, column), share in np.ndenumerate(shares):
        if share >= 0.005:
            weight = "bold" if limiting[row, column] else "normal"
            colour = "white" if share > 0.55 else INK
            axes.text(column + 0.5, row + 0.5, f"{share * 100:.0f}", color=colour, fontweight=weight, **centred)
    for row, length in enumerate(lengths):
        axes.text(len(RESOURCES) + 0.5, row + 0.5, f"{length * 100:.0f}", **centred)
    dress(axes, title=f"{phase.capitalize()}: % of the time that each is busy", grid=False)
    axes.set_yticks([row + 0.5 for row in range(len(runs))], runs, fontsize=SMALL)
    columns = [*(_SHORT[resource] for resource in RESOURCES), "of the\nblock"]
    axes.set_xticks([column + 0.5 for column in range(len(columns))], columns, fontsize=SMALL - 1)
    axes.tick_params(length=0)
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(runs), 0)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return axes
