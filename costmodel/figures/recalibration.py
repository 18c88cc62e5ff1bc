"""A calibration to measured runs: held-out errors before and after, and how far each constant moved."""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from costmodel import words
from costmodel.calibrate.machine import Recalibration
from costmodel.figures.style import (
    BLUE,
    DASHES,
    GREY,
    LEGEND,
    NORMAL,
    PAGE,
    SMALL,
    VERMILION,
    add_titles,
    paper_figure,
    plain_frame,
)

MOST_SHOWN = 100.0
"""Errors beyond this many percent are drawn at the edge, as arrows that point to where they are."""

_APART = 0.22
"""How far from its row, up or down, an arrow lies: two in a row are both seen."""

_ROW_INCHES = 0.16


def recalibration_figure(found: Recalibration) -> Figure:
    """Every run's error of throughput by the file and by a fit that has not seen it; factors of the constants."""
    figure = paper_figure(PAGE, 1.5 + max(_ROW_INCHES * len(found.rows), 1.5))
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_errors(left, found)
    draw_factors(right, found)
    held_out = found.held_out
    before, after = held_out.before["throughput"].median, held_out.after["throughput"].median
    title = f"{found.hardware.name}: median error of held-out throughput {before:.1%} before, {after:.1%} after"
    below = f"{words.counted(len(found.rows), 'run')}, each predicted by a fit to others; {found.coverage:.0%} lay "
    below += "within the 95 % interval"
    errors = [each["throughput"] * 100 for row in found.rows for each in (row.before, row.after)]
    beyond = sum(abs(error) > MOST_SHOWN for error in errors)
    if beyond:
        below += f"\n{words.counted(beyond, 'error')} beyond ±{MOST_SHOWN:.0f} %, drawn as arrows at the edge"
    add_titles(figure, title, below)
    return figure


def draw_errors(axes: Axes, found: Recalibration) -> Axes:
    """One row a run, sorted by the file's error; what lies beyond the edge is an arrow on it."""
    rows = sorted(found.rows, key=lambda row: row.before["throughput"])
    axes.axvspan(-10, 10, color="#EFEFEF", zorder=0)
    for place, row in enumerate(rows):
        reach = row.relative * 100
        axes.plot([-reach, reach], [place, place], color=GREY, linewidth=3, alpha=0.3, solid_capstyle="butt", zorder=1)
    for name, label, colour, marker, shift in (
        ("before", "by the file", VERMILION, "D", _APART),
        ("after", "by a fit to other runs", BLUE, "o", -_APART),
    ):
        errors = [getattr(row, name)["throughput"] * 100 for row in rows]
        within = [place for place, error in enumerate(errors) if abs(error) <= MOST_SHOWN]
        style: dict[str, Any] = {
            "linestyle": "none",
            "color": colour,
            "markeredgecolor": "white",
            "markeredgewidth": 0.4,
        }
        axes.plot([errors[place] for place in within], within, marker=marker, markersize=4.5, label=label, **style)
        for place in set(range(len(rows))).difference(within):
            end, arrow = (MOST_SHOWN, ">") if errors[place] > 0 else (-MOST_SHOWN, "<")
            axes.plot([end], [place + shift], marker=arrow, markersize=5.5, clip_on=False, **style)
    axes.set_yticks(range(len(rows)), [words.resource_name(row.regime) for row in rows], fontsize=SMALL - 1)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.axvline(0, color=GREY, linewidth=1, linestyle=DASHES, zorder=0)
    axes.set_xlabel("error of predicted throughput (%; bars: 95 % interval)", fontsize=NORMAL)
    axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.11), ncols=2, **LEGEND)
    axes.tick_params(axis="x", labelsize=SMALL)
    plain_frame(axes)
    return axes


def draw_factors(axes: Axes, found: Recalibration) -> Axes:
    """Each fitted constant over the file's, with its interval; a share as it is, with the file's beside it."""
    factors = [one for one in found.constants if not one.constant.is_share and one.before]
    places = list(reversed(range(len(factors))))
    for place, one in zip(places, factors, strict=True):
        axes.plot([one.low / one.before, one.high / one.before], [place, place], color=BLUE, linewidth=1.6)
        axes.plot([one.after / one.before], [place], marker="o", markersize=6, color=BLUE)
    axes.set_yticks(places, [one.constant.what for one in factors], fontsize=SMALL)
    axes.set_xscale("log")
    ends = [end / one.before for one in factors for end in (one.low, one.high) if end > 0] or [1.0]
    reach = max(2.0, *(max(end, 1 / end) for end in ends)) * 1.05
    axes.set_xlim(1 / reach, reach)
    ticks = [2.0**power for power in range(-math.floor(math.log2(reach)), math.floor(math.log2(reach)) + 1)]
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.minorticks_off()
    axes.axvline(1, color=GREY, linewidth=1, linestyle=DASHES, zorder=0)
    axes.set_xlabel("fitted / the file's (95 % interval)", fontsize=NORMAL)
    axes.tick_params(axis="x", labelsize=SMALL)
    plain_frame(axes)
    return axes
