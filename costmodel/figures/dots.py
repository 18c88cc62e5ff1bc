"""Dots on a logarithmic axis, each with a text: what differs by orders of magnitude and must be read as numbers."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from costmodel.estimate import FloatArray
from costmodel.figures.style import INK, SMALL, THREAD, Mark


def draw_dots(axes: Axes, values: FloatArray, texts: Sequence[str], marks: Sequence[Mark], *, room: float) -> None:
    """A marker and a text for each value from the top down (log scale); ``room`` for the texts, in text widths."""
    known = values[values > 0]
    low, high = float(known.min()) / 1.6, float(known.max())
    places = range(len(values))[::-1]
    axes.set_xscale("log")
    for place, value, text, mark in zip(places, values, texts, marks, strict=True):
        there = value > 0
        if there:
            axes.hlines(place, low, value, color=THREAD, linewidth=1.0, zorder=1)
            axes.plot(value, place, **{**mark.line(), "markersize": 5.0})
        axes.annotate(
            text,
            (value if there else low, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=SMALL,
            color=INK,
        )
    axes.set_xlim(low, high * (high / low) ** 0.5 * room)
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.xaxis.set_major_locator(LogLocator(numticks=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: power(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def power(value: float) -> str:
    """``"0.1"``, ``"1,000"``, and from a million on ``"10⁶"``."""
    if value < 1e6:
        return f"{value:,g}"
    return "10" + str(round(np.log10(value))).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def downwards(number: int) -> list[int]:
    """Places on the y axis, the first on top."""
    return list(reversed(range(number)))
