"""The paper's machine: predicted against published throughput, and what was never fitted."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from costmodel.calibrate import Calibration, Row, mean_error
from costmodel.figures.style import (
    BLUE,
    DASHES,
    GREY,
    INK,
    LEGEND,
    NORMAL,
    PAGE,
    SKY,
    SMALL,
    VERMILION,
    add_titles,
    paper_figure,
    plain_frame,
)


def calibration_figure(found: Calibration) -> Figure:
    """Errors of the fitted runs beside the published model's, and of the predictions without refitting."""
    figure = paper_figure(PAGE, 3.7)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_errors(left, found)
    draw_predictions(right, found)
    ours, theirs = mean_error(found.left_out), mean_error(found.flexgen)
    title = f"FlexGen on one T4: mean error {ours:.1%} of runs left out, {theirs:.0%} of the published model"
    add_titles(
        figure, title, "12 published runs (arXiv 2303.06865); each left-out run is predicted by a fit to the others"
    )
    return figure


def draw_errors(axes: Axes, found: Calibration) -> Axes:
    """One line a run: the error in sample, left out, and of the published model."""
    names = [row.name for row in found.in_sample]
    places = list(reversed(range(len(names))))
    axes.axvspan(-10, 10, color="#EFEFEF", zorder=0)
    for rows, label, colour, marker, filled in (
        (found.flexgen, "published model", VERMILION, "D", True),
        (found.left_out, "ours, left out of the fit", SKY, "o", False),
        (found.in_sample, "ours, fitted", BLUE, "o", True),
    ):
        axes.plot(
            [row.error * 100 for row in rows],
            places,
            linestyle="none",
            marker=marker,
            markersize=4.2,
            color=colour,
            markerfacecolor=colour if filled else "white",
            markeredgewidth=1.1,
            label=label,
        )
    axes.set_yticks(places, names, fontsize=SMALL)
    _error_axis(axes)
    axes.set_xlabel("error of the predicted throughput (%; shaded: ±10 %)", fontsize=NORMAL)
    axes.legend(loc="upper center", bbox_to_anchor=(0.3, -0.13), ncols=3, **LEGEND)
    return axes


def draw_predictions(axes: Axes, found: Calibration) -> Axes:
    """Bars for decode rates and ablations: errors without refitting; 0.01 token/s is too coarse to show."""
    named: list[tuple[str, Row]] = [(f"{row.name}, decode", row) for row in found.decode]
    named += [(row.name, row) for row in found.ablations if row.published_tok_per_s > 0.05]
    places = list(reversed(range(len(named))))
    errors = [row.error * 100 for _, row in named]
    axes.barh(places, errors, color=[SKY] * len(found.decode) + [BLUE] * (len(named) - len(found.decode)), height=0.62)
    for place, error in zip(places, errors, strict=True):
        axes.annotate(
            f"{error:+.0f} %",
            (error, place),
            xytext=(4 if error >= 0 else -4, 0),
            textcoords="offset points",
            ha="left" if error >= 0 else "right",
            va="center",
            fontsize=SMALL,
            color=INK,
        )
    axes.set_yticks(places, [name for name, _ in named], fontsize=SMALL)
    axes.margins(x=0.6)
    _error_axis(axes)
    axes.set_xlabel("error, never fitted (%)", fontsize=NORMAL)
    return axes


def _error_axis(axes: Axes) -> None:
    axes.axvline(0, color=GREY, linewidth=1, linestyle=DASHES, zorder=0)
    axes.tick_params(axis="x", labelsize=SMALL)
    plain_frame(axes)
