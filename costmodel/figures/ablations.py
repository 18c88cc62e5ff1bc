"""Ablations: throughput with one thing taken away, published and predicted."""

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from costmodel.figures.style import INK, LEGEND, MARKS, PAGE, SMALL, add_titles, dress, paper_figure

SERIES = {
    "published_tok_per_s": "FlexGen, published",
    "predicted_tok_per_s": "FlexGen, predicted",
    "ours_tok_per_s": "Tierwise's engine, predicted, all else searched again",
}


def ablations_figure(table: pd.DataFrame) -> Figure:
    """One panel a model of a :func:`costmodel.studies.ablations.ablations_table`."""
    models = list(table["model"].drop_duplicates())
    figure = paper_figure(PAGE, 3.4)
    panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for axes, model in zip(panels, models, strict=True):
        draw_ablations(axes, table[table["model"] == model].reset_index(drop=True))
        dress(axes, title=model, x="token/s")
        axes.grid(visible=False, axis="y")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, **LEGEND)
    add_titles(figure, "What each part is worth", "prompts of 512 tokens on one T4, weights and KV cache in 16 bits")
    return figure


def draw_ablations(axes: Axes, table: pd.DataFrame) -> Axes:
    """A group of bars a variant, from the top; where memory does not suffice a bar's place says so."""
    height = 0.8 / len(SERIES)
    most = float(table[list(SERIES)].max().max())
    for number, (column, label) in enumerate(SERIES.items()):
        places = table.index.max() - table.index.to_numpy() + 0.4 - height * (number + 0.5)
        axes.barh(places, table[column].fillna(0), height=height * 0.94, label=label, **MARKS[number].bar())
        for place, value in zip(places, table[column], strict=True):
            text = "does not fit" if math.isnan(value) else f"{value:.2f}"
            end = 0.0 if math.isnan(value) else value
            axes.text(end + most * 0.015, place, text, va="center_baseline", fontsize=SMALL, color=INK)
    axes.set_yticks(table.index.max() - table.index.to_numpy(), table["variant"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, most * 1.14)
    return axes
