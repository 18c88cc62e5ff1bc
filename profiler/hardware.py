"""A profile as a hardware file: each field from the figure that stands for it, its spread and its origin."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import torch

import costmodel
from costmodel import words
from costmodel.errors import TierwiseError
from costmodel.hardware import Cpu, Disk, Engine, Gpu, Hardware, Link, Links
from costmodel.model import BYTES_PER_VALUE
from costmodel.quantity import Quantity, Rate, Source
from profiler import engine, hidden_loads
from profiler.compute import dtype_name
from profiler.fit import Line, fit_line, unhidden_share
from profiler.layers import CARRIED_TOKENS, FUSED_BLOCK
from profiler.session import Profile
from profiler.timing import LEAST_REPEATS, Figure, quartiles, spread_of
from runtime.execute import PREFILL_ROWS
from runtime.quantization import INT4_KERNEL_ROWS

MEASURED = "profile"
BUDGET = "budget"
ENGINE = "engine"

MEASURED_SCHEMA = "tierwise.measured/1"


def hardware(found: Profile, *, name: str) -> Hardware:
    """The hardware file of a profile."""
    record = found.environment
    cpu, gpu = record["cpu"], record["gpu"]
    cores = f"{cpu['name']}, {words.counted(cpu['cores_usable'], 'core')}"
    return Hardware(
        name=name,
        description=_description(found),
        gpu=_gpu(found, cores if gpu is None else gpu["name"]),
        cpu=_cpu(found, cores),
        disk=Disk(name=_disk_name(record["file_system"]), memory_bytes=_plain(found.capacity.disk_bytes)),
        links=Links(
            cpu_to_gpu=link(_copies(found, "cpu_to_gpu")),
            gpu_to_cpu=link(_copies(found, "gpu_to_cpu")),
            disk_read=link(disk_curve(found, "disk_read")),
            disk_write=link(disk_curve(found, "disk_write")),
        ),
        engine=_engine(found),
        sources=_sources(found),
        measured=_measured(found),
    )


def _gpu(found: Profile, name: str) -> Gpu:
    results, device = found.results, found.device.type
    on = {"device": device}
    decode = results.select("decode_attention", **on)
    return Gpu(
        name=name,
        kind=("rocm" if torch.version.hip else "cuda") if device == "cuda" else "cpu",
        memory_bytes=_plain(found.capacity.gpu_bytes, BUDGET),
        # What planning uses it for is mostly reading the cache; products have their own curve.
        memory_bytes_per_s=_middle(decode),
        matmul_flops_per_s=_curve(products(found), "rows"),
        attention_flops_per_s=_curve(results.select("prefill_attention", **on), "tokens"),
        dequantize_values_per_s=_expansion(found, found.device.type),
        layer_launch_s=_middle(_engine_layers(found, engine.STAYS)),
        compressed_matmul_flops_per_s=_in_blocks(_curve(results.select("linear_4bit", **on), "rows"), device),
        compressed_call_s=_beyond(found, engine.COMPRESSED),
        carried_call_s=_beyond(found, engine.CARRIED),
        part_call_s=_beyond(found, engine.PARTS, less=engine.CARRIED),
        compressed_part_call_s=_beyond(found, engine.COMPRESSED_PARTS, engine.COMPRESSED, less=engine.CARRIED),
        gather_bytes_per_s=_gathering(found),
        quantize_values_per_s=_middle(results.select("quantize", **on)),
        compressed_launch_share=_launch_share(found),
    )


def _cpu(found: Profile, name: str) -> Cpu:
    on = found.results.select("decode_attention", device="cpu")
    call_s = found.results.select("attention_call", device="cpu")
    return Cpu(
        name=name,
        memory_bytes=_plain(found.capacity.cpu_bytes, BUDGET),
        attention_bytes_per_s=_middle(on),
        attention_call_s=_middle(call_s) if call_s else None,
        dequantize_values_per_s=_expansion(found, "cpu"),
    )


def products(found: Profile) -> list[Figure]:
    """The matrix products in the runtime's dtype, by rows."""
    return found.results.select("matmul", device=found.device.type, dtype=dtype_name(found.dtype))


def disk_curve(found: Profile, name: str) -> list[Figure]:
    """Reads or writes as the runtime makes them, by size."""
    return found.results.select(name, method="direct" if found.offload["direct"] else "buffered")


def _copies(found: Profile, name: str) -> list[Figure]:
    return found.results.select(name, memory="pinned" if found.device.type == "cuda" else "host")


def line(figures: Sequence[Figure]) -> Line:
    """Latency and bandwidth of a curve over bytes."""
    return fit_line([figure.number("bytes") for figure in figures], [figure.seconds for figure in figures])


def link(figures: Sequence[Figure]) -> Link:
    """A link with the spreads that its smallest and largest transfers leave to latency and bandwidth."""
    if not figures:
        raise TierwiseError("no transfer was measured: the time was up before the first one")
    fitted = line(figures)
    largest = max(figures, key=lambda figure: figure.number("bytes"))
    smallest = min(figures, key=lambda figure: figure.number("bytes"))
    return Link(
        bytes_per_s=Quantity(value=fitted.bytes_per_s, source=MEASURED, spread=_spread(largest)),
        latency_s=Quantity(value=fitted.latency_s, source=MEASURED, spread=_spread(smallest)),
    )


def _curve(figures: Sequence[Figure], key: str) -> Rate:
    if not figures:
        raise TierwiseError(f"no rate over {key} was measured: the time was up before the first one")
    best = max(figures, key=lambda figure: figure.median)
    knots = tuple(sorted((float(figure.number(key)), figure.median) for figure in figures))
    return Rate(value=best.median, source=MEASURED, spread=_spread(best), curve=knots)


def _middle(figures: Sequence[Figure]) -> Quantity:
    """The middle of a curve that planning takes for a constant; its spread covers what differs along the curve."""
    if not figures:
        raise TierwiseError("a rate was not measured: the time was up before it")
    ordered = sorted(figures, key=lambda figure: figure.median)
    chosen = ordered[len(ordered) // 2]
    spread = _spread(chosen)
    if spread is not None and len(ordered) > 1:
        along = [value for figure in ordered for value in (*quartiles(figure.values), figure.median)]
        spread = max(spread, round(spread_of(along), 4))
    return Quantity(value=chosen.median, source=MEASURED, spread=spread)


def _expansion(found: Profile, device: str) -> Quantity:
    """Values/s of a 4-bit cache that attention expands: its time beyond that of attending to 16 bits.

    The expansion alone, timed over and over in the same memory, is several times as fast. Where attention to 4 bits is
    not the slower one, that is all there is to tell.
    """
    alone = _middle(found.results.select("dequantize", device=device))
    attended = found.results.select("compressed_attention", device=device)
    if not attended:
        return alone
    plain = _middle(found.results.select("decode_attention", device=device))
    beyond_s = 1 / attended[0].median - BYTES_PER_VALUE / plain.value
    if beyond_s <= 1 / alone.value:
        return alone
    return dataclasses.replace(alone, value=1 / beyond_s, spread=_spread(attended[0]))


def _engine_layers(found: Profile, cache: str, weights: str = engine.PLAIN_WEIGHTS) -> list[Figure]:
    return found.results.select("engine_layer", device=found.device.type, cache=cache, weights=weights)


def _launch_share(found: Profile) -> Quantity | None:
    """What 4-bit weights leave of a layer's launch; ``None`` where weights do not pass through the caches."""
    beside = _engine_layers(found, engine.STAYS, engine.COMPRESSED_WEIGHTS)
    if not beside:
        return None
    launch = _middle(beside)
    return dataclasses.replace(launch, value=launch.value / _middle(_engine_layers(found, engine.STAYS)).value)


def _beyond(found: Profile, cache: str, plain: str = engine.STAYS, *, less: str | None = None) -> Quantity:
    """What a layer with such a cache takes longer than one with a ``plain`` cache, ``less`` what that one does."""
    longer, shorter = _middle(_engine_layers(found, cache)), _middle(_engine_layers(found, plain)).value
    known = 0.0 if less is None else _beyond(found, less).value
    return dataclasses.replace(longer, value=max(0.0, longer.value - shorter - known))


def _in_blocks(measured: Rate, device: str) -> Rate:
    """The rate of products with 4-bit weights at the ends of each block of rows that the kernel on a CPU takes.

    A block that is partly filled takes as long as a full one; full ones were measured at some numbers of rows.
    """
    knots = dict(measured.curve or ())
    if device != "cpu" or not knots:
        return measured
    for full in range(2 * FUSED_BLOCK, min(INT4_KERNEL_ROWS, int(max(knots))) + 1, FUSED_BLOCK):
        first = full - FUSED_BLOCK + 1
        knots[full] = measured.at(full)
        knots[first] = measured.at(full) * first / full
    return dataclasses.replace(measured, curve=tuple(sorted(knots.items())))


def _gathering(found: Profile) -> Quantity | None:
    """Bytes/s at which single tokens become one piece: what attention to them takes longer, if it does."""
    figures = found.results.select("carried_attention", device=found.device.type)
    if len(figures) < 2:
        return None
    few, many = sorted(figures, key=lambda figure: figure.number("singles"))
    longer_s = many.seconds - few.seconds
    if longer_s <= 0 or many.work is None:
        return None
    more = many.number("singles") - few.number("singles")
    nbytes = many.work * more / (2 * CARRIED_TOKENS)
    return Quantity(value=nbytes / longer_s, source=MEASURED, spread=_spread(many))


def _engine(found: Profile) -> Engine:
    share, spread = overlap_share(found)
    return Engine(
        name="tierwise",
        unhidden_share=Quantity(value=share, source=MEASURED, spread=spread),
        stages="layer",
        weight_loads="spread",
        cache_loads="overlapped",
        prefill_logits="last",
        attention_scores="fused",
        attention_causal_share=Quantity(value=1.0, source=ENGINE),
        prefill_rows=PREFILL_ROWS[found.device.type],
        expanded="matrix" if found.device.type == "cuda" else "pieces",
        buffers="always",
    )


def overlap_share(found: Profile) -> tuple[float, float | None]:
    """The unhidden share of loads and compute by the middle of each kind of step, and its spread over their samples.

    Loads from the disk, and on a GPU those from host memory (on a CPU its cores make them, which planning knows),
    count alike.
    """
    figures = found.results.select("decode_step", device=found.device.type)
    steps: dict[str, dict[str, Figure]] = {}
    for figure in figures:
        steps.setdefault(str(figure.get("weights")), {})[str(figure.get("does"))] = figure
    kinds = (hidden_loads.BOTH, hidden_loads.COMPUTE, hidden_loads.LOAD)
    shares, samples = [], []
    for source in steps.values():
        shares.append(unhidden_share(*(source[kind].seconds for kind in kinds)))
        samples += [unhidden_share(*seconds) for seconds in zip(*(source[kind].samples for kind in kinds), strict=True)]
    if not shares:
        raise TierwiseError("overlap was not measured: the time was up before it")
    return statistics.fmean(shares), round(spread_of(samples), 4) if len(samples) >= LEAST_REPEATS else None


def _plain(value: float, source: str = MEASURED) -> Quantity:
    return Quantity(value=float(value), source=source)


def _spread(figure: Figure) -> float | None:
    return None if figure.stated_spread is None else round(figure.stated_spread, 4)


def _disk_name(record: dict[str, Any]) -> str:
    model = record.get("model", "unknown")
    return f"{record['device']} ({record['kind']})" + (f", {model}" if model != "unknown" else "")


def _description(found: Profile) -> str:
    kind = (
        "CUDA"
        if found.device.type == "cuda"
        else "no GPU: the first tier is a budget of host memory, and the CPU computes"
    )
    how = f"{found.effort.name}, {found.effort.rounds} rounds, {found.seconds:.0f} s"
    return f"Measured by tierwise profile ({how}); {kind}."


def _sources(found: Profile) -> dict[str, Source]:
    date, room = found.environment["date"], found.capacity
    version = f"tierwise {costmodel.__version__} at {found.environment['commit']}, torch {found.environment['torch']}"
    return {
        MEASURED: Source(
            title=f"Measured on this machine by tierwise profile ({version}): medians; details under 'measured'",
            date=date,
        ),
        BUDGET: Source(title=f"First tier: {room.gpu_origin}; second tier: {room.cpu_origin}", date=date),
        ENGINE: Source(
            title="Read in the runtime's source: rates of attention count the whole score matrix", date=date
        ),
    }


def _measured(found: Profile) -> dict[str, Any]:
    room, host = found.capacity, found.capacity.host
    return {
        "schema": MEASURED_SCHEMA,
        "effort": found.effort.name,
        "rounds": found.effort.rounds,
        "seconds": round(found.seconds, 1),
        "compute_dtype": dtype_name(found.dtype),
        "notes": found.notes,
        "environment": found.environment,
        "capacity": {
            "host_total_bytes": host.total_bytes,
            "host_available_bytes": host.available_bytes,
            "host_limited_by": host.limited_by,
            "pinnable_bytes": room.pinnable_bytes,
        },
        "disk": {**found.offload, "settings": found.disk_settings},
        "fits": {
            name: {
                "latency_s": fitted.latency_s,
                "bytes_per_s": fitted.bytes_per_s,
                "largest_miss": round(fitted.error, 4),
            }
            for name, fitted in (
                (name, line(curve))
                for name, curve in (
                    ("cpu_to_gpu", _copies(found, "cpu_to_gpu")),
                    ("gpu_to_cpu", _copies(found, "gpu_to_cpu")),
                    ("disk_read", disk_curve(found, "disk_read")),
                    ("disk_write", disk_curve(found, "disk_write")),
                )
            )
        },
        "figures": [_figure(figure) for figure in found.results.figures.values()],
    }


def _figure(figure: Figure) -> dict[str, Any]:
    first, third = quartiles(figure.values)
    return {
        "name": figure.name,
        **dict(figure.at),
        "unit": figure.unit,
        "median": _significant(figure.median),
        "interquartile_range": [_significant(first), _significant(third)],
        "repeats": len(figure.samples),
        **({"wide": True} if figure.wide else {}),
    }


def _significant(value: float) -> float:
    return float(f"{value:.5g}")
