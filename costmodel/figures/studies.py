"""Policies over cases, what more memory buys, certificates, and what a purchase brings."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter

from costmodel import words
from costmodel.figures.style import COLUMN, GREY, INK, LEGEND, MARKS, NORMAL, PAGE, SMALL, dress, paper_figure
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
    """Throughput of every case (log scale), labelled with the batch shape; nothing where nothing fits."""
    places = _downwards(table)
    speeds = table["throughput_tok_per_s"].to_numpy(dtype=float)
    axes.set_xscale("log")
    low = 10 ** np.floor(np.log10(np.nanmin(speeds)) - 0.001)
    axes.barh(places, np.nan_to_num(speeds - low), left=low, height=0.66, **MARKS[0].bar())
    for place, speed, shape in zip(places, speeds, _batches(table), strict=True):
        text = "does not fit" if np.isnan(speed) else f"{words.number(speed)}  ({shape})"
        axes.annotate(
            text,
            (low if np.isnan(speed) else speed, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=SMALL - 1,
            color=INK,
        )
    dress(axes, title="token/s  (prompts × batches)", x="token/s (log scale)", grid=False)
    axes.set_xlim(low, np.nanmax(speeds) * 60)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, table["case"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    return axes


def draw_split(axes: Axes, table: pd.DataFrame, kind: str) -> Axes:
    """Stacked bars: the percentages of one kind on GPU, CPU and disk; a "4" marks 4-bit storage."""
    places = np.array(_downwards(table))
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


def memory_figure(table: pd.DataFrame) -> Figure:
    """Throughput over GPU memory, one line for each CPU memory; ``table`` is an ``over_memory`` table."""
    figure = paper_figure(COLUMN, 2.6)
    axes = figure.subplots()
    for mark, (size, part) in zip(MARKS, table.groupby("cpu_gib", sort=False), strict=False):
        axes.plot(part["gpu_gib"], part["throughput_tok_per_s"], label=f"{size:g} GiB", **mark.line())
    dress(axes, x="GPU memory (GiB)", y="token/s")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(bottom=0)
    axes.legend(title="CPU memory", title_fontsize=SMALL, loc="upper left", **LEGEND)
    return figure


def prices_figure(table: pd.DataFrame) -> Figure:
    """What more of each resource brings, a marker a case; ``table`` is a ``price_table``."""
    gains = table.pivot(index="what", columns="case", values="gain")[table["case"].drop_duplicates().tolist()] * 100
    gains = gains.loc[gains.max(axis=1).sort_values().index]
    figure = paper_figure(COLUMN, 0.85 + 0.2 * len(gains))
    axes = figure.subplots()
    places = np.arange(len(gains))
    offsets = np.linspace(0.22, -0.22, gains.shape[1]) if gains.shape[1] > 1 else [0.0]
    for mark, offset, case in zip(MARKS, offsets, gains.columns, strict=False):
        style = {**mark.line(), "linestyle": "none", "markersize": 4.2}
        axes.plot(gains[case], places + offset, label=case, clip_on=False, zorder=3, **style)
    dress(axes, x="more throughput (%)")
    axes.set_yticks(places, gains.index.tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(left=0)
    axes.set_ylim(-0.5, len(gains) - 0.5)
    axes.legend(loc="lower right", **LEGEND)
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
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, gap * 125)
    return figure


# ------------------------------------------------------------------ what to buy

_BOUGHT, _RENTED = MARKS[0], MARKS[1]


def purchase_figure(table: pd.DataFrame) -> Figure:
    """Throughput, tokens for a dollar and for a kWh of one model, best first; ``table`` is a ``purchase_table``."""
    ordered = table.sort_values("tok_per_usd", ascending=False, na_position="last")
    figure = paper_figure(PAGE, 0.85 + 0.19 * len(ordered))
    panels = (
        ("throughput_tok_per_s", "token/s"),
        ("tok_per_usd", "tokens for a dollar"),
        ("tok_per_kwh", "tokens for a kWh"),
    )
    for axes, (column, title) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        draw_ranking(axes, ordered, column, title)
    handles = [
        Patch(label=name, facecolor=mark.colour, hatch=mark.hatch, edgecolor="white")
        for name, mark in (("bought", _BOUGHT), ("rented, by the hour", _RENTED))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, **LEGEND)
    return figure


def draw_ranking(axes: Axes, table: pd.DataFrame, column: str, title: str) -> Axes:
    """One bar a machine with its number (log scale); a dash where the inputs do not say."""
    places = np.array(_downwards(table))
    values = table[column].to_numpy(dtype=float)
    known = values[np.nan_to_num(values) > 0]
    low = 10 ** np.floor(np.log10(known.min()) - 0.001)
    axes.set_xscale("log")
    for paid, mark in (("bought", _BOUGHT), ("rented", _RENTED)):
        those = table["paid"].eq(paid).to_numpy() & (np.nan_to_num(values) > 0)
        axes.barh(places[those], values[those] - low, left=low, height=0.66, **mark.bar())
    for place, value in zip(places, values, strict=True):
        there = value > 0
        axes.annotate(
            words.number(_rounded(value)) if there else "–",
            (value if there else low, place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=SMALL - 1,
            color=INK,
        )
    dress(axes, title=title, grid=False)
    axes.set_xlim(low, known.max() * 8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e4 else f"{value:.0e}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(places, table["machine"].tolist(), fontsize=NORMAL - 0.5)
    axes.tick_params(axis="y", length=0)
    return axes


def use_figure(table: pd.DataFrame, machines: Sequence[str]) -> Figure:
    """Tokens for a dollar over utilisation, for a few machines; ``table`` is a ``use_table`` of one model."""
    figure = paper_figure(COLUMN, 2.6)
    axes = figure.subplots()
    for mark, machine in zip(MARKS, machines, strict=False):
        part = table[table["machine"] == machine]
        label = f"{machine}, {part['paid'].iloc[0]}"
        axes.plot(part["utilisation"] * 100, part["tok_per_usd"], label=label, **mark.line())
    dress(axes, x="time in use (%)", y="tokens for a dollar (log scale)")
    axes.set_yscale("log")
    axes.set_xlim(0, 102)
    axes.legend(loc="lower right", **LEGEND)
    return figure


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _tier_patch(tier: str) -> Patch:
    mark = MARKS[TIERS.index(tier)]
    return Patch(label=words.memory_name(tier), facecolor=mark.colour, hatch=mark.hatch, edgecolor="white")


def _batches(table: pd.DataFrame) -> list[str]:
    return [
        "" if pd.isna(size) else f"{int(size)} × {int(number)}"
        for size, number in zip(table["gpu_batch_size"], table["num_gpu_batches"], strict=True)
    ]


def _downwards(table: pd.DataFrame) -> list[int]:
    return list(reversed(range(len(table))))
