"""The picture of a profile: the roofline of the products, and bandwidth over transfer size."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure as Canvas

from costmodel import units
from costmodel.hardware import Hardware
from profiler.compute import dtype_name
from profiler.fit import fit_line
from profiler.session import Profile
from profiler.timing import Figure, quartiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_GIGA = 1e9
_LABELS = {
    "cpu_to_gpu": "memory copy, tier 2 to 1",
    "gpu_to_cpu": "memory copy, tier 1 to 2",
    "disk_read": "disk read",
    "disk_write": "disk write",
}


def figure(found: Profile, machine: Hardware) -> Canvas:
    """Three panels: FLOP/s over rows, bytes/s of links over size, decode attention over context."""
    canvas = Canvas(figsize=(13, 4.6), layout="constrained")
    roofline, links, attention = canvas.subplots(1, 3)
    draw_products(roofline, found, machine)
    draw_links(links, found)
    draw_attention(attention, found)
    record = found.environment
    canvas.suptitle(f"{machine.name}: {machine.gpu.name} — {found.effort.name} profile, {record['date']}", fontsize=11)
    return canvas


def rendered(canvas: Canvas, file_format: str) -> bytes:
    """The picture as the content of a .png, .pdf or .svg file."""
    content = io.BytesIO()
    canvas.savefig(content, format=file_format, dpi=150)
    return content.getvalue()


def draw_products(axes: "Axes", found: Profile, machine: Hardware) -> None:
    """Measured products by dtype, over the roofline that planning draws: min(peak, rows × bandwidth)."""
    device = found.device.type
    figures = found.results.select("matmul", device=device)
    for index, dtype in enumerate(dict.fromkeys(str(item.get("dtype")) for item in figures)):
        curve = [item for item in figures if item.get("dtype") == dtype]
        _curve(axes, curve, "rows", label=dtype, color=f"C{index}", solid=dtype == dtype_name(found.dtype))
    rows = sorted({item.number("rows") for item in figures})
    peak, bandwidth = machine.gpu.matmul_flops_per_s.value, machine.gpu.memory_bytes_per_s.value
    roof = [min(peak, row * bandwidth) / _GIGA for row in rows]  # 2 FLOP a row for each 2-byte weight
    axes.plot(rows, roof, color="0.6", linestyle=":", label="roofline of the file", zorder=1)
    axes.set(xlabel="rows of the product", ylabel="GFLOP/s", title="Matrix products")
    _log(axes)


def draw_links(axes: "Axes", found: Profile) -> None:
    """Measured transfers over size, and the line fitted to each."""
    direct = "direct" if found.offload["direct"] else "buffered"
    memory = "pinned" if found.device.type == "cuda" else "host"
    places: dict[str, dict[str, str]] = {name: {"memory": memory} for name in ("cpu_to_gpu", "gpu_to_cpu")}
    places |= {name: {"method": direct} for name in ("disk_read", "disk_write")}
    for index, (name, place) in enumerate(places.items()):
        curve = found.results.select(name, **place)
        if not curve:
            continue
        color = f"C{index}"
        _curve(axes, curve, "bytes", label=_LABELS[name], color=color)
        sizes = [item.number("bytes") for item in curve]
        line = fit_line(sizes, [item.seconds for item in curve])
        axes.plot(sizes, [size / line.seconds(size) / _GIGA for size in sizes], color=color, linestyle=":", zorder=1)
    axes.set(xlabel="bytes of a transfer", ylabel="GB/s", title=f"Links (dotted: fit; disk: {direct} I/O)")
    _log(axes)
    axes.xaxis.set_major_formatter(lambda value, _: units.format_bytes(value))


def draw_attention(axes: "Axes", found: Profile) -> None:
    """Cache read per second of decode attention, and 4-bit products for comparison with plain ones."""
    figures = found.results.select("decode_attention")
    for index, device in enumerate(dict.fromkeys(str(item.get("device")) for item in figures)):
        curve = sorted(
            (item for item in figures if item.get("device") == device), key=lambda item: item.number("context")
        )
        _curve(axes, curve, "context", label=f"on {device}", color=f"C{index}")
    axes.set(xlabel="tokens of context", ylabel="GB/s", title="Decode attention")
    axes.set_ylim(bottom=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _curve(axes: "Axes", curve: Sequence[Figure], key: str, *, label: str, color: str, solid: bool = True) -> None:
    """Medians with their interquartile range."""
    ordered = sorted(curve, key=lambda item: item.number(key))
    middle = [item.median / _GIGA for item in ordered]
    ranges = [quartiles(item.values) for item in ordered]
    below = [value - low / _GIGA for value, (low, _) in zip(middle, ranges, strict=True)]
    above = [high / _GIGA - value for value, (_, high) in zip(middle, ranges, strict=True)]
    axes.errorbar(
        [item.number(key) for item in ordered],
        middle,
        yerr=(below, above),
        marker="o",
        markersize=4,
        capsize=2,
        linestyle="-" if solid else "--",
        label=label,
        color=color,
    )


def _log(axes: "Axes") -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
