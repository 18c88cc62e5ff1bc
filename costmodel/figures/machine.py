"""A machine: what a profile measured of its products, links, attention and overlap; and the catalogue's ridges."""

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

from costmodel import words
from costmodel.figures.style import (
    COLUMN,
    GREY,
    INK,
    LARGE,
    LEGEND,
    MARKS,
    PAGE,
    SMALL,
    THREAD,
    dress,
    paper_figure,
)
from costmodel.hardware import Hardware
from costmodel.studies.machine import link_table, measured_table, processor, select
from costmodel.units import GB, format_bytes

_PRODUCTS = (
    ("matmul", "layer"),
    ("lm_head", "LM head"),
    ("linear_4bit", "layer, 4-bit weights"),
)


def profile_figure(machine: Hardware) -> Figure:
    """Products over rows, links over transfer size, attention over context: a profile at a glance."""
    figure = paper_figure(PAGE, 2.7)
    products, links, attention = figure.subplots(1, 3)
    draw_products(products, machine)
    draw_links(links, machine)
    draw_attention(attention, machine)
    record = machine.measured or {}
    when = record.get("environment", {}).get("date", "")
    title = f"{machine.gpu.name}: {record.get('effort', '')} profile, {when}"
    figure.suptitle(title, fontsize=LARGE, fontweight="bold", color=INK)
    return figure


def products_figure(machine: Hardware) -> Figure:
    """Matrix products and attention as rooflines, side by side."""
    figure = paper_figure(PAGE, 2.6)
    left, right = figure.subplots(1, 2)
    draw_products(left, machine)
    draw_attention(right, machine)
    return figure


def links_figure(machine: Hardware) -> Figure:
    """Bandwidth of every link over the size of a transfer, with the fitted line."""
    figure = paper_figure(COLUMN, 2.5)
    draw_links(figure.subplots(), machine)
    return figure


def draw_products(axes: Axes, machine: Hardware) -> Axes:
    """Measured rates over rows, and the roofline min(peak, rows × bandwidth) that the file's constants draw."""
    table, device = measured_table(machine), processor(machine)
    dtype = (machine.measured or {}).get("compute_dtype")
    place = 0
    for name, label in _PRODUCTS:
        curve = select(table, name, device=device, dtype=dtype)
        if len(curve):
            _curve(axes, curve, "rows", mark=MARKS[place], label=label)
            place += 1
    for other in select(table, "matmul", device=device)["dtype"].drop_duplicates():
        if other != dtype:
            curve = select(table, "matmul", device=device, dtype=other)
            _curve(axes, curve, "rows", mark=MARKS[place], label=f"layer, {other}")
            place += 1
    rows = select(table, "matmul", device=device, dtype=dtype)["rows"]
    peak, bandwidth = machine.gpu.matmul_flops_per_s.value, machine.gpu.memory_bytes_per_s.value
    knots = sorted({float(rows.min()), peak / bandwidth, float(rows.max())})
    roof = [min(peak, knot * bandwidth) / GB for knot in knots]  # 2 FLOP a row for each 2-byte weight
    axes.plot(knots, roof, color=GREY, linewidth=3.0, alpha=0.45, zorder=1, label="roofline of the file")
    dress(axes, title=f"Matrix products ({dtype})", x="rows of the product", y="GFLOP/s")
    _log(axes, plain_x=True)
    axes.legend(loc="lower right", **LEGEND)
    return axes


def draw_links(axes: Axes, machine: Hardware) -> Axes:
    """Measured bandwidth over bytes, and the line seconds = latency + bytes / bandwidth (grey) fitted to each."""
    table = link_table(machine)
    for mark, (name, curve) in zip(MARKS, table.groupby("link", sort=False), strict=False):
        axes.plot(curve["bytes"], curve["fitted_bytes_per_s"] / GB, color=GREY, linewidth=3.0, alpha=0.45, zorder=1)
        _curve(axes, curve, "bytes", mark=mark, label=_link_name(machine, str(name)))
    dress(axes, title="Links (grey: the fitted lines)", x="bytes of a transfer", y="GB/s")
    _log(axes, plain_x=False)
    axes.xaxis.set_major_locator(FixedLocator([2**12, 2**17, 2**22, 2**27]))
    axes.legend(loc="lower right", **LEGEND)
    return axes


def draw_attention(axes: Axes, machine: Hardware) -> Axes:
    """Bytes of KV cache that decode attention reads in a second, over the context."""
    table = measured_table(machine)
    curves = list(select(table, "decode_attention").groupby("device", sort=False))
    for mark, (device, curve) in zip(MARKS, curves, strict=False):
        _curve(axes, curve, "context", mark=mark, label="decode" if len(curves) == 1 else f"decode, {device}")
    planned = machine.gpu.memory_bytes_per_s.value / GB
    axes.axhline(planned, color=GREY, linewidth=3.0, alpha=0.45, zorder=1, label="the file's constant")
    dress(axes, title="Attention over the KV cache", x="tokens of context", y="GB/s of cache")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right", **LEGEND)
    return axes


def slowdown_figure(machine: Hardware) -> Figure:
    """How much slower each kind of work runs beside another."""
    figure = paper_figure(COLUMN, 2.9)
    draw_slowdowns(figure.subplots(), machine)
    return figure


def draw_slowdowns(axes: Axes, machine: Hardware) -> Axes:
    """Bars from 1 (undisturbed) to the measured slowdown; whiskers are quartiles."""
    table = select(measured_table(machine), "slowdown").iloc[::-1].reset_index(drop=True)
    below, above = table["median"] - table["low"], table["high"] - table["median"]
    names = [f"{_work(one)} beside {_work(other)}" for one, other in zip(table["work"], table["beside"], strict=True)]
    axes.barh(names, table["median"] - 1, left=1, height=0.62, **MARKS[0].bar())
    axes.errorbar(table["median"], names, xerr=(below, above), fmt="none", ecolor=INK, elinewidth=0.8, capsize=1.5)
    dress(axes, x="times as long as alone")
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.axvline(1, color=INK, linewidth=0.8)
    return axes


def sharing_figure(table: pd.DataFrame) -> Figure:
    """Prompts that must share a load on every machine; ``table`` is a ``sharing_table``."""
    figure = paper_figure(COLUMN, 0.55 + 0.165 * len(table))
    draw_sharing(figure.subplots(), table)
    return figure


def draw_sharing(axes: Axes, table: pd.DataFrame) -> Axes:
    """One line a machine, a marker for each tier that weights may come from (log scale)."""
    ordered = table.sort_values("cpu_prompts", ascending=False, na_position="first").reset_index(drop=True)
    reached = ordered[["gpu_prompts", "cpu_prompts", "disk_prompts"]]
    axes.hlines(range(len(ordered)), reached.min(axis=1), reached.max(axis=1), color=THREAD, linewidth=1.0, zorder=1)
    for mark, tier in zip(MARKS, ("gpu", "cpu", "disk"), strict=False):
        style: dict[str, Any] = {**mark.line(), "linestyle": "none", "markersize": 5.0}
        axes.plot(ordered[f"{tier}_prompts"], range(len(ordered)), label=words.memory_name(tier), **style)
    axes.set_xscale("log")
    dress(axes, x="prompts in a block (log scale)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_yticks(range(len(ordered)), ordered["machine"].tolist(), fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(ordered) - 0.4)
    axes.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=3, **LEGEND)
    return axes


def _link_name(machine: Hardware, link: str) -> str:
    """``"CPU→GPU link"``; a machine without a GPU copies between the tiers of its memory."""
    if machine.gpu.kind == "cpu" and not link.startswith("disk"):
        return {"cpu_to_gpu": "copy, tier 2 → 1", "gpu_to_cpu": "copy, tier 1 → 2"}[link]
    return words.resource_name(link)


def _work(name: str) -> str:
    return {"cpu_to_gpu": "copy", "disk_read": "disk read", "disk_write": "disk write"}.get(name, name)


def _curve(axes: Axes, curve: pd.DataFrame, key: str, *, mark: Any, label: str) -> None:
    """Medians with their interquartile range, in 10⁹ of their unit."""
    ordered = curve.sort_values(key)
    low, middle, high = (ordered[name] / GB for name in ("low", "median", "high"))
    axes.errorbar(
        ordered[key],
        middle,
        yerr=(middle - low, high - middle),
        label=label,
        capsize=1.5,
        elinewidth=0.8,
        **mark.line(),
    )


def _log(axes: Axes, *, plain_x: bool) -> None:
    """Logarithmic axes with plain numbers, bytes on the x axis or counts."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if plain_x else format_bytes(value).replace(".0", ""))
    )
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
