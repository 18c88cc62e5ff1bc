"""What all figures share: colours and marks, print sizes, titles, frames, and how they become files.

Figures are drawn at the size at which a two-column paper prints them, so nothing is scaled and the sizes of
the text are those on paper. What a colour says, a marker, a line style or a hatch says too.
"""

import io
from dataclasses import dataclass
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
SURFACE, THREAD = "#EFEFEF", "#CFCFCF"
"""Behind data: bands, and lines that join what belongs together."""

SMALL, NORMAL, LARGE = 7.0, 8.0, 9.0
DASHES = (0, (4, 2))
DOTS_PER_INCH = 220

COLUMN, PAGE = 3.35, 7.0
"""Inches: the width of one column of a two-column paper, and of both."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """How one series looks: with any two of these told apart, a print without colour is legible."""

    colour: str
    marker: str
    dashes: Any
    hatch: str

    def line(self) -> dict[str, Any]:
        """Keywords of ``Axes.plot``."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "linestyle": self.dashes,
            "linewidth": 1.3,
            "markersize": 4.0,
            "markeredgecolor": "white",
            "markeredgewidth": 0.4,
        }

    def bar(self) -> dict[str, Any]:
        """Keywords of ``Axes.bar`` and ``barh``."""
        return {"color": self.colour, "hatch": self.hatch, "edgecolor": "white", "linewidth": 0.5}


MARKS = (
    Mark(colour=BLUE, marker="o", dashes="-", hatch=""),
    Mark(colour=ORANGE, marker="s", dashes=(0, (4, 1.5)), hatch="////"),
    Mark(colour=GREEN, marker="^", dashes=(0, (1, 1)), hatch="...."),
    Mark(colour=VERMILION, marker="D", dashes=(0, (6, 1.5, 1, 1.5)), hatch="xxxx"),
    Mark(colour=PURPLE, marker="v", dashes=(0, (3, 1, 1, 1, 1, 1)), hatch="----"),
    Mark(colour=SKY, marker="P", dashes=(0, (8, 2)), hatch="\\\\\\\\"),
    Mark(colour=INK, marker="X", dashes=(0, (2, 2)), hatch="||||"),
    Mark(colour=GREY, marker="*", dashes=(0, (5, 1, 1, 1, 1, 1)), hatch="++++"),
)
"""One mark a series, in this order."""


class PaperFigure(Figure):
    """A figure that a notebook shows as the very bytes that a file would hold."""

    def _repr_png_(self) -> bytes:
        return render(self, "png")

    def _repr_pdf_(self) -> bytes:
        return render(self, "pdf")


def paper_figure(width: float = PAGE, height: float = 2.6) -> PaperFigure:
    """An empty figure, ``width`` × ``height`` inches; ``COLUMN`` and ``PAGE`` are the widths to use."""
    return PaperFigure(figsize=(width, height), layout="constrained")


LEGEND: dict[str, Any] = {
    "fontsize": SMALL,
    "frameon": False,
    "handlelength": 1.2,
    "borderaxespad": 0.4,
    "columnspacing": 1.4,
    "handletextpad": 0.5,
    "labelspacing": 0.35,
}


def add_titles(figure: Figure, title: str, below: str, *, colour: str = INK) -> None:
    """A bold title and smaller lines under it; the title's empty lines reserve their room."""
    figure.suptitle(title + "\n" * (below.count("\n") + 1), fontsize=LARGE, fontweight="bold", color=colour)
    height = float(figure.get_size_inches()[1])
    top = 1.0 - 0.24 / height
    figure.text(0.5, top, below, ha="center", va="top", fontsize=SMALL, color=INK, linespacing=1.4)


def plain_frame(axes: Axes) -> None:
    """Two spines, grey."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GREY)


def dress(axes: Axes, *, title: str = "", x: str = "", y: str = "", grid: bool = True) -> Axes:
    """Labels, tick sizes, a plain frame and a faint grid: what every pair of axes wears."""
    axes.set_title(title, fontsize=NORMAL, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel(x, fontsize=NORMAL)
    axes.set_ylabel(y, fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL, color=GREY)
    axes.tick_params(which="minor", length=1.5, color=GREY)
    if grid:
        axes.grid(color="#E5E5E5", linewidth=0.5)
        axes.set_axisbelow(True)
    plain_frame(axes)
    return axes


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
    # Fixed identifiers, TrueType fonts (publishers refuse the others) and thin hatches; undone at once.
    with rc_context({"svg.hashsalt": "tierwise", "pdf.fonttype": 42, "hatch.linewidth": 0.5}):
        figure.savefig(content, format=file_format, dpi=DOTS_PER_INCH, metadata=undated, facecolor="white")
    return content.getvalue()
