"""What a profile measured, and what the rates of a machine ask of a block."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.model import BYTES_PER_VALUE

LINKS = ("cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write")


def measured_table(hardware: Hardware) -> pd.DataFrame:
    """One row a measured figure: ``name``, where it was taken, ``median``, ``low``, ``high`` (quartiles), ``unit``.

    Raises :class:`InputError` for a machine that no profiler measured.
    """
    if hardware.measured is None or not hardware.measured.get("figures"):
        raise InputError(f"hardware {hardware.name!r} holds no measured figures: give a file that the profiler wrote")
    rows = []
    for figure in hardware.measured["figures"]:
        low, high = figure["interquartile_range"]
        kept = {key: value for key, value in figure.items() if key != "interquartile_range"}
        rows.append({**kept, "low": low, "high": high})
    table = pd.DataFrame(rows)
    table["wide"] = table["wide"].eq(True) if "wide" in table else False
    return table


def select(table: pd.DataFrame, name: str, **at: object) -> pd.DataFrame:
    """The figures of one name, at these places only; a place that no figure has selects none."""
    chosen = table["name"] == name
    for column, value in at.items():
        chosen &= table[column] == value if column in table else False
    return table[chosen]


def processor(hardware: Hardware) -> str:
    """The device of the first tier as the profiler calls it: ``"cuda"`` or ``"cpu"``."""
    return "cpu" if hardware.gpu.kind == "cpu" else "cuda"


def link_table(hardware: Hardware) -> pd.DataFrame:
    """Measured transfers of the kind that the runtime makes: ``link``, ``bytes``, quartiles and the fit (bytes/s)."""
    table = measured_table(hardware)
    found: dict[str, Any] = hardware.measured or {}
    direct = found.get("disk", {}).get("direct", True)
    copies: dict[str, object] = {"memory": "host" if hardware.gpu.kind == "cpu" else "pinned"}
    blocks: dict[str, object] = {"method": "direct" if direct else "buffered"}
    parts = []
    for name in LINKS:
        link = getattr(hardware.links, name)
        curve = select(table, name, **(blocks if name.startswith("disk") else copies)).sort_values("bytes")
        sizes = curve["bytes"]
        fitted = sizes / (link.latency_s.effective + sizes / link.bytes_per_s.effective)
        parts.append(curve.assign(link=name, fitted_bytes_per_s=fitted))
    columns = ["link", "bytes", "median", "low", "high", "fitted_bytes_per_s"]
    return pd.concat(parts, ignore_index=True)[columns]


def sharing_table(machines: Sequence[Hardware]) -> pd.DataFrame:
    """Prompts that must share a load of weights before computing, and not the load, takes longer in decode.

    A 16-bit weight takes 2 FLOPs for each prompt and 2 bytes for all of them, so the number is the matrix rate
    over the rate at which weights arrive: from GPU memory, over the link from CPU memory, from disk.
    """
    flops_per_byte = 2 / BYTES_PER_VALUE
    rows = []
    for machine in machines:
        rate = machine.gpu.matmul_flops_per_s.effective
        arriving = {"gpu": machine.gpu.memory_bytes_per_s, "disk": machine.links.disk_read.bytes_per_s}
        if machine.cpu.memory_bytes.effective > 0:
            arriving["cpu"] = machine.links.cpu_to_gpu.bytes_per_s
        rows.append(
            {
                "machine": machine.name,
                "processor": machine.gpu.name,
                "matmul_flops_per_s": rate,
                **{f"{tier}_prompts": rate / (flops_per_byte * speed.effective) for tier, speed in arriving.items()},
            }
        )
    return pd.DataFrame(rows, columns=["machine", "processor", "matmul_flops_per_s", *_PROMPTS])


_PROMPTS = ("gpu_prompts", "cpu_prompts", "disk_prompts")
