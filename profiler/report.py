"""What a profile looks like on screen."""

import re

from costmodel import units
from costmodel.commands import terminal
from costmodel.hardware import Hardware, catalog_names
from costmodel.quantity import Quantity
from profiler.session import Profile
from profiler.timing import WIDE_SPREAD

_NOT_A_MODEL = ("NVIDIA", "AMD", "GEFORCE", "TESLA", "INSTINCT", "GPU")

_ROWS = (
    ("memory copy, tier 2 to 1", "links.cpu_to_gpu.bytes_per_s", "bytes/s"),
    ("memory copy, tier 1 to 2", "links.gpu_to_cpu.bytes_per_s", "bytes/s"),
    ("disk read", "links.disk_read.bytes_per_s", "bytes/s"),
    ("  latency", "links.disk_read.latency_s", "s"),
    ("disk write", "links.disk_write.bytes_per_s", "bytes/s"),
    ("  latency", "links.disk_write.latency_s", "s"),
    ("matrix products, best", "gpu.matmul_flops_per_s", "FLOP/s"),
    ("prefill attention, best", "gpu.attention_flops_per_s", "FLOP/s"),
    ("decode attention, tier 1", "gpu.memory_bytes_per_s", "bytes/s"),
    ("decode attention, CPU", "cpu.attention_bytes_per_s", "bytes/s"),
    ("4-bit expansion", "gpu.dequantize_values_per_s", "values/s"),
    ("rounding to 4 bits", "gpu.quantize_values_per_s", "values/s"),
    ("launch of a layer", "gpu.layer_launch_s", "s"),
    ("  with a carried cache", "gpu.carried_call_s", "s"),
    ("  with a 4-bit cache", "gpu.compressed_call_s", "s"),
    ("  a tier more of cache", "gpu.part_call_s", "s"),
    ("  in 4 bits", "gpu.compressed_part_call_s", "s"),
    ("  share beside 4-bit weights", "gpu.compressed_launch_share", ""),
    ("gathering carried tokens", "gpu.gather_bytes_per_s", "bytes/s"),
    ("unhidden share of overlap", "engine.unhidden_share", ""),
)


def show(found: Profile, machine: Hardware, written: list[str]) -> None:
    """Print the summary."""
    known = datasheet(machine)
    heads = ("figure", ">measured", ">spread") + ((f">{known.name} datasheet", ">reached") if known else ())
    table = terminal.table(*heads)
    for label, path, dimension in _ROWS:
        quantity = at(machine, path)
        if quantity is None:
            continue
        cells = [label, _shown(quantity.value, dimension), _spread(quantity)]
        if known is not None:
            sheet = at(known, path)
            told = sheet is not None and dimension not in ("s", "") and path.startswith(("gpu.", "links."))
            cells += (
                [_shown(sheet.value, dimension), f"{quantity.value / sheet.value:.0%}"] if told and sheet else ["", ""]
            )
        table.add_row(*cells)
    room = found.capacity
    first = f"{units.format_bytes(room.gpu_bytes)} first tier ({room.gpu_origin})"
    second = (
        f"{units.format_bytes(room.cpu_bytes)} second tier ({room.cpu_origin})" if room.cpu_bytes else "no second tier"
    )
    disk = f"{machine.disk.name}: {units.format_bytes(room.disk_bytes)} free; {found.offload['method']}"
    facts = terminal.facts(
        ("machine", machine.gpu.name),
        ("profile", machine.description),
        ("memory", f"{first}; {second}"),
        ("disk", disk),
    )
    parts: list[terminal.Renderable] = [facts, terminal.heading("Measured"), table]
    for note in notes(found):
        parts.append(terminal.facts(("note", note)))
    if written:
        parts.append(terminal.facts(("written", ", ".join(written))))
    terminal.show(*parts)


def notes(found: Profile) -> list[str]:
    """What a reader of the figures must know: the session's notes, and how many spreads stayed wide."""
    wide, total = len(found.results.wide()), len(found.results.figures)
    told = list(found.notes)
    if wide:
        told.append(
            f"{wide} of {total} figures vary by more than {WIDE_SPREAD:.0%} between repeats (~) or had too few repeats "
            '(~?), "wide" in the file: measure again on an idle machine, or with --thorough'
        )
    return told


def at(machine: Hardware, path: str) -> Quantity | None:
    """The quantity at a dotted path; ``None`` where this machine has none."""
    node: object = machine
    for step in path.split("."):
        node = getattr(node, step)
    return node if isinstance(node, Quantity) else None


def datasheet(machine: Hardware) -> Hardware | None:
    """The catalogue's entry for this GPU, found by its name, and by its memory where there are several."""
    if machine.gpu.kind == "cpu":
        return None
    model = _model(machine.gpu.name)
    entries = [Hardware.from_catalog(name) for name in catalog_names() if not name.endswith("-flexgen")]
    same = [entry for entry in entries if entry.gpu.kind == machine.gpu.kind and _model(entry.gpu.name) == model]
    record = ((machine.measured or {}).get("environment") or {}).get("gpu") or {}
    nbytes = float(record.get("memory_bytes", machine.gpu.memory_bytes.value))
    return min(same, key=lambda entry: abs(entry.gpu.memory_bytes.value - nbytes), default=None)


def _model(name: str) -> frozenset[str]:
    """What tells one GPU from another: ``"NVIDIA A100-SXM4-80GB"`` is an A100; a PCIe card is not an SXM module."""
    plain = re.sub(r"\b\d+ ?GB\b", " ", name.upper().replace("-", " "))
    return frozenset(word for word in plain.split() if word not in _NOT_A_MODEL and not word.startswith(("SXM", "HBM")))


def _shown(value: float, dimension: str) -> str:
    if dimension == "":
        return f"{value:.2f}"
    if dimension == "s":
        return units.format_seconds(value)
    if dimension == "FLOP/s":
        return units.format_rate(value, "FLOP/s")
    return units.format_rate(value, "values/s" if dimension == "values/s" else "bytes/s")


def _spread(quantity: Quantity) -> str:
    if quantity.spread is None:
        return "~?"
    mark = "~" if quantity.spread > WIDE_SPREAD else ""
    return f"{mark}{quantity.spread:.0%}"
