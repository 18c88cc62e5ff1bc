"""A policy at a glance: where everything lives, and what is busy."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator

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
    SKY,
    SMALL,
    VERMILION,
    add_titles,
    paper_figure,
    plain_frame,
    workload_text,
)
from costmodel.formulations.base import RESOURCES
from costmodel.policy import TIERS
from costmodel.residency import KINDS, Plan, residency
from costmodel.units import format_bytes, format_seconds

KIND_COLOURS = {"weights": BLUE, "cache": ORANGE, "activations": GREEN, "buffers": GREY}
HATCHES = {"weights": "", "cache": "////", "activations": "....", "buffers": "xxxx"}
PHASE_COLOURS = {"prefill": SKY, "decode": VERMILION}
_ON = {"weights": "white", "cache": INK, "activations": "white", "buffers": INK, "prefill": INK, "decode": "white"}

FULLEST_SHOWN = 6.0
"""A tier fuller than this is cut off, so that the others stay readable; its label tells how full."""


def policy_figure(plan: Plan) -> Figure:
    """Where everything lives, and what is busy: a search result or an estimate at a glance."""
    figure = paper_figure(PAGE, 3.7)
    left, right = figure.subplots(1, 2)
    draw_memory(left, plan)
    draw_busy(right, plan)
    cost = plan.estimate
    fits = "" if cost.feasible else " (does not fit)"
    title = f"{plan.model.name} on {plan.hardware.name}: {words.number(cost.throughput_tok_per_s)} token/s{fits}"
    below = f"{workload_text(plan)}\n{words.batches(plan.policy)}\n{', '.join(words.switches(plan.policy))}"
    add_titles(figure, title, below, colour=INK if cost.feasible else VERMILION)
    return figure


def draw_memory(axes: Axes, plan: Plan) -> Axes:
    """Stacked bars: the share of each tier's usable bytes that every kind takes at the fullest moment.

    Tiers differ by orders of magnitude, so the axis is a share and the labels say how many bytes.
    """
    cost, held = plan.estimate, residency(plan)
    fullest = max(_share(cost.peak_bytes[tier], cost.limit_bytes[tier]) for tier in TIERS)
    most = min(max(1.0, fullest), FULLEST_SHOWN)
    for place, tier in zip(_downwards(TIERS), TIERS, strict=True):
        peak, limit = cost.peak_bytes[tier], cost.limit_bytes[tier]
        left = 0.0
        for kind in KINDS:
            width = min(_share(held[tier][kind], limit or peak / most), most - left)
            axes.barh(place, width, left=left, height=0.5, **_bar(kind, KIND_COLOURS[kind]))
            if width > 0.19 * most:
                size = format_bytes(held[tier][kind])
                label = _label(kind, KIND_COLOURS[kind])
                axes.text(left + width / 2, place, size, ha="center", va="center", fontsize=SMALL, **label)
            left += width
        if limit > 0:
            axes.vlines(1.0, place - 0.33, place + 0.28, color=INK, linewidth=1.0, linestyle=DASHES)
        if limit == 0 < peak or _share(peak, limit) > most:
            axes.plot(most, place, marker=">", color=INK, markersize=5.5, clip_on=False)
        colour, weight = (VERMILION, "bold") if tier in cost.violations else (INK, "normal")
        text = f"{words.memory_name(tier)}: {_of(peak, limit)}"
        axes.text(0, place + 0.3, text, ha="left", va="bottom", fontsize=NORMAL, color=colour, fontweight=weight)
    _legend_below(axes, {words.KINDS[kind]: _bar(kind, colour) for kind, colour in KIND_COLOURS.items()})
    axes.set_yticks([])
    axes.set_ylim(-0.4, len(TIERS) - 0.3)
    _share_axis(axes, most, "share of the usable memory, at its fullest moment")
    axes.set_title("Where everything lives", fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    return axes


def draw_busy(axes: Axes, plan: Plan) -> Axes:
    """Bars: the share of each phase for which every resource is busy; the labels say how many seconds."""
    cost = plan.estimate
    lasting = {"prefill": cost.prefill_s, "decode": cost.decode_s}
    phases = {phase: seconds for phase, seconds in lasting.items() if seconds > 0}
    height = 0.8 / len(phases)
    places = _downwards(RESOURCES)
    for i, phase in enumerate(phases):
        shares, busiest = cost.busy_share(phase), cost.bottleneck[phase]
        for place, resource in zip(places, RESOURCES, strict=True):
            share, y = shares[resource], place + 0.4 - height * (i + 0.5)
            axes.barh(y, share, height=height * 0.9, **_bar(phase, PHASE_COLOURS[phase]))
            if share > 0:
                inside = share > 0.3
                axes.text(
                    share + (-0.012 if inside else 0.012),
                    y,
                    format_seconds(cost.busy_s[phase][resource]),
                    va="center_baseline",
                    ha="right" if inside else "left",
                    fontsize=SMALL,
                    color=_ON[phase] if inside else INK,
                    fontweight="bold" if resource == busiest else "normal",
                )
    axes.axvline(1.0, color=INK, linewidth=1.0, linestyle=DASHES)
    lengths = {
        f"{phase}, {format_seconds(seconds)} a block": _bar(phase, PHASE_COLOURS[phase])
        for phase, seconds in phases.items()
    }
    _legend_below(axes, lengths)
    axes.set_yticks(places, [words.resource_name(resource) for resource in RESOURCES], fontsize=NORMAL)
    axes.tick_params(axis="y", length=0)
    _share_axis(axes, 1.0, "share of the phase for which it is busy")
    axes.set_title("What is busy (bold: the bottleneck)", fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    return axes


def _bar(kind: str, colour: str) -> dict[str, Any]:
    """Keywords of a bar: what the colour says, the hatch says too."""
    return {"facecolor": colour, "edgecolor": "white", "linewidth": 0.6, "hatch": HATCHES.get(kind, "")}


def _label(kind: str, colour: str) -> dict[str, Any]:
    """Keywords of a text inside a bar, on a patch without a hatch."""
    patch = {"facecolor": colour, "edgecolor": "none", "boxstyle": "square,pad=0.15"}
    return {"color": _ON[kind], "bbox": patch if HATCHES.get(kind) else None}


def _legend_below(axes: Axes, looks: dict[str, dict[str, Any]]) -> None:
    handles = [Patch(label=label, **look) for label, look in looks.items()]
    below = (0.5, -0.15)
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=below, ncols=len(handles), **LEGEND)


def _downwards(items: Sequence[str]) -> list[int]:
    """Places on the y axis, the first item on top."""
    return list(reversed(range(len(items))))


def _share(part: float, whole: float) -> float:
    """The part as a share; something on a tier of size 0 is off the scale."""
    if whole > 0:
        return part / whole
    return math.inf if part > 0 else 0.0


def _of(peak: float, limit: float) -> str:
    if limit == 0 and peak == 0:
        return "none"
    if limit == 0:
        return f"{format_bytes(peak)} needed, none there"
    return f"{format_bytes(peak)} of {format_bytes(limit)} usable" if peak else f"unused ({format_bytes(limit)} usable)"


def _share_axis(axes: Axes, most: float, label: str) -> None:
    axes.set_xlim(0, most * 1.03)
    step = 0.25 if most < 1.5 else 0.5 if most < 3 else 1.0
    axes.xaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * 100:.0f} %"))
    axes.tick_params(axis="x", labelsize=SMALL)
    axes.set_xlabel(label, fontsize=NORMAL)
    plain_frame(axes)
