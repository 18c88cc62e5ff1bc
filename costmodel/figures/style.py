"""What all figures share: colours, sizes, titles, frames, and how they become files."""

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from costmodel import words
from costmodel.residency import Plan
from costmodel.units import format_seconds

# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
GREY, INK = "#9A9A9A", "#222222"

SMALL, NORMAL, LARGE = 9.0, 10.0, 12.0
DASHES = (0, (4, 2))
DOTS_PER_INCH = 150

LEGEND: dict[str, Any] = {
    "fontsize": SMALL,
    "frameon": False,
    "handlelength": 1.2,
    "borderaxespad": 0.4,
    "columnspacing": 1.4,
}


def add_titles(figure: Figure, title: str, below: str, *, colour: str = INK) -> None:
    """A bold title and smaller lines under it; the title's empty lines reserve their room."""
    figure.suptitle(title + "\n" * (below.count("\n") + 1), fontsize=LARGE, fontweight="bold", color=colour)
    height = float(figure.get_size_inches()[1])
    top = 1.0 - 0.32 / height
    figure.text(0.5, top, below, ha="center", va="top", fontsize=SMALL, color=INK, linespacing=1.4)


def plain_frame(axes: Axes) -> None:
    """Two spines, grey."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def workload_text(plan: Plan, *, limit: bool = True) -> str:
    """The workload and the cost model in a line."""
    workload = plan.workload
    text = f"{workload.prompt_len:,} + {workload.gen_len:,} tokens"
    if workload.num_prompts is not None:
        text += f", {words.counted(workload.num_prompts, 'prompt')}"
    if limit and workload.max_latency_s is not None:
        text += f", at most {format_seconds(workload.max_latency_s)} a block"
    return f"{text}, {plan.formulation} cost model"


def render(figure: Figure, file_format: str) -> bytes:
    """The figure as a PNG, PDF or SVG file's bytes; the same figure gives the same bytes."""
    content = io.BytesIO()
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(file_format, {})
    with rc_context({"svg.hashsalt": "tierwise"}):  # fixes the identifiers, and is undone at once
        figure.savefig(content, format=file_format, dpi=DOTS_PER_INCH, metadata=undated, facecolor="white")
    return content.getvalue()
