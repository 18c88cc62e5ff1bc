"""The frontier: throughput against latency, one marker a policy."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from costmodel import words
from costmodel.figures.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    LEGEND,
    NORMAL,
    ORANGE,
    PURPLE,
    SKY,
    SMALL,
    VERMILION,
    add_titles,
    paper_figure,
    plain_frame,
    workload_text,
)
from costmodel.frontier import Frontier
from costmodel.policy import Policy

_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, INK, GREY)

_TIMES = tuple(
    seconds * unit
    for unit, steps in (
        (1e-3, (1, 2, 5, 10, 20, 50, 100, 200, 500)),
        (1, (1, 2, 5, 10, 20, 30)),
        (60, (1, 2, 5, 10, 20, 30)),
    )
    for seconds in steps
) + tuple(3600 * hours for hours in (1, 2, 5, 10, 24, 48, 120, 240, 480, 1200, 2400, 4800, 12000))


def frontier_figure(found: Frontier) -> Figure:
    """Throughput against latency, one marker a policy."""
    figure = paper_figure(5.2, 3.4)
    draw_frontier(figure.subplots(), found)
    below = f"{workload_text(found.points[-1], limit=False)}; the best policy under each of the limits tried"
    below += "\nlabels: prompts of a GPU batch × GPU batches"
    add_titles(figure, f"{found.model.name} on {found.hardware.name}: throughput against latency", below)
    return figure


def draw_frontier(axes: Axes, found: Frontier) -> Axes:
    """Throughput over the latency of a block (log), labelled with the batch shape, by switches."""
    latencies = [point.estimate.latency_s for point in found.points]
    throughputs = [point.estimate.throughput_tok_per_s for point in found.points]
    axes.step(latencies, throughputs, where="post", color=GREY, linewidth=1.0, zorder=1)
    series: dict[str, int] = {}
    for point, latency, throughput in zip(found.points, latencies, throughputs, strict=True):
        style = series.setdefault(_way(point.policy), len(series))
        axes.plot(
            latency,
            throughput,
            marker=_MARKERS[style % len(_MARKERS)],
            color=_SERIES[style % len(_SERIES)],
            markersize=5,
            markeredgecolor="white",
            linestyle="none",
            zorder=2,
        )
    axes.set_xscale("log")
    axes.set_xlim(*_around(latencies))
    axes.set_ylim(0, max(throughputs) * 1.12)
    _label_points(axes, found)
    handles = [
        Line2D(
            [],
            [],
            marker=_MARKERS[i % len(_MARKERS)],
            color=_SERIES[i % len(_SERIES)],
            linestyle="none",
            markersize=5,
            label=name,
        )
        for name, i in series.items()
    ]
    axes.legend(handles=handles, loc="lower right", **LEGEND)
    label_times(axes, most=9)
    axes.set_xlabel("time for one block of prompts (log scale)", fontsize=NORMAL)
    axes.set_ylabel("throughput (token/s)", fontsize=NORMAL)
    axes.tick_params(labelsize=SMALL)
    axes.grid(color="#E5E5E5", linewidth=0.6)
    axes.set_axisbelow(True)
    plain_frame(axes)
    return axes


def label_times(axes: Axes, *, most: int) -> None:
    """At most ``most`` round times on a logarithmic axis of seconds; its limits must be set."""
    first, last = axes.get_xlim()
    ticks = [time for time in _TIMES if first <= time <= last]
    axes.xaxis.set_major_locator(FixedLocator(ticks[:: max(1, -(-len(ticks) // most))] or [first]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _round_time(value)))


def _way(policy: Policy) -> str:
    """The switches of a point in a legend's words."""
    kept = {
        "both": "weights and KV cache in 4 bits",
        "weights": "weights in 4 bits",
        "cache": "KV cache in 4 bits",
        "–": "all in 16 bits",
    }
    text = f"{kept[words.compressed(policy)]}, attention on the {words.attention(policy)}"
    return text if policy.overlap else f"{text}, no overlap"


def _around(latencies: Sequence[float]) -> tuple[float, float]:
    """Limits of the latency axis: room for a label on the left."""
    return min(latencies) / 1.6, max(latencies) * 1.2


def _round_time(seconds: float) -> str:
    """``"90 s"``, ``"2 min"``, ``"5 h"`` for a tick."""
    for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0)):
        if seconds >= size * 0.999:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def _label_points(axes: Axes, found: Frontier) -> None:
    """Batch shapes beside the points, left out where they would run into one another."""
    placed: list[tuple[float, float]] = []
    for point in reversed(found.points):
        at = axes.transData.transform((point.estimate.latency_s, point.estimate.throughput_tok_per_s))
        x, y = float(at[0]), float(at[1])
        if any(abs(x - other) < 36 and abs(y - height) < 10 for other, height in placed):
            continue
        placed.append((x, y))
        axes.annotate(
            f"{point.policy.gpu_batch_size} × {point.policy.num_gpu_batches}",
            (point.estimate.latency_s, point.estimate.throughput_tok_per_s),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=SMALL,
            color=INK,
        )
