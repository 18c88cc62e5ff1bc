"""What overlaps with what: the parts of a pass joined into stages, with their weight loads and hidden states."""

from collections.abc import Callable, Mapping
from typing import Any

from costmodel.formulations.base import (
    LINKS,
    RESOURCES,
    Amounts,
    Case,
    Linear,
    PerTier,
    Resource,
    Stage,
    Track,
    add,
)
from costmodel.formulations.roofline.seconds import elementwise_s, head_s, matrix_params, products_s
from costmodel.hardware import Link
from costmodel.model import BYTES_PER_VALUE


def stages(
    case: Case,
    amounts: Amounts[Any],
    attention: dict[Resource, Linear],
    *,
    tokens: int,
    logits: int,
    blocking_load: Linear | None = None,
) -> list[Stage]:
    """Join the attention part with the products, the weight loads and the batches' hidden states.

    The engine decides what overlaps: one stage a layer, or attention and MLP in turn. Whichever it is,
    the weights that a stage loads are those of the next one: with a stage a layer, the last layer hides the head's,
    and the head those of the first layer. ``blocking_load`` are seconds of a cache load that the computation waits for.
    """
    model, layers = case.model, float(case.model.num_layers)
    attention_params, mlp_params = matrix_params(model)
    hidden, latency = _hidden_traffic(case, amounts, tokens), _latency(case, amounts)
    attention["gpu_compute"] = attention["gpu_compute"] + amounts.prompts * (
        products_s(case, attention_params, tokens) * layers
    )
    mlp = idle(amounts)
    mlp["gpu_compute"] = amounts.prompts * (
        (products_s(case, mlp_params, tokens) + elementwise_s(case, tokens)) * layers
    )
    head = idle(amounts)
    head["gpu_compute"] = amounts.prompts * head_s(case, logits)
    for resource in hidden:
        attention[resource] = attention[resource] + latency[resource]
        mlp[resource] = mlp[resource] + hidden[resource]
    layer_loads, head_loads = _weight_loads(case, amounts)
    waited = _hidden_waits(case, amounts, hidden)
    if case.hardware.engine.stages == "layer":
        merged = _sum(attention, mlp)
        if not case.switches.overlap:
            return [_stage(case, "pass", _sum(merged, head), _sum(layer_loads, head_loads), blocking_load, waited)]
        last = 1.0 / layers
        found = []
        for name, share, loads in (
            ("layers", 1.0 - last, _scaled(layer_loads, 1.0 - last)),
            ("last layer", last, head_loads),
        ):
            blocked, idle_s = (None if whole is None else whole * share for whole in (blocking_load, waited))
            found.append(_stage(case, name, _scaled(merged, share), loads, blocked, idle_s))
        return [*found, _stage(case, "head", head, _scaled(layer_loads, last), None, None)]
    loads = _sum(layer_loads, head_loads)
    weight_share = attention_params / (attention_params + mlp_params)
    return [
        _stage(case, "attention", attention, _scaled(loads, 1.0 - weight_share), blocking_load, None),
        _stage(case, "mlp", _sum(mlp, head), _scaled(loads, weight_share), None, waited),
    ]


def _stage(
    case: Case,
    name: str,
    seconds: dict[Resource, Linear],
    loads: Mapping[Resource, Linear],
    blocking_load: Linear | None,
    waited: Linear | None,
) -> Stage:
    """One stage with its weight loads.

    A batch waits for its CPU attention, so the processors take turns on one track; every link has a
    track of its own. Where both memory tiers are host memory, the processor copies between them itself, on its track
    too. ``waited`` are seconds in which the processors have nothing to do but to wait for a link. Without overlap all
    of it is one track.
    """
    engine, overlap = case.hardware.engine, case.switches.overlap
    moved = {r: seconds[r] + loads[r] if r in loads else seconds[r] for r in RESOURCES}
    busy = dict(moved)
    if blocking_load is not None:
        busy["cpu_to_gpu"] = busy["cpu_to_gpu"] + blocking_load
    if not overlap:
        return Stage(name, busy, (Track(RESOURCES, add(busy.values())),), case.shape)
    copies: tuple[Resource, ...] = ("cpu_to_gpu", "gpu_to_cpu") if disk_lands_on_gpu(case) else ()
    alone: list[tuple[Resource, ...]] = [(link,) for link in LINKS if link not in copies]
    tracks = []
    for resources in [("gpu_compute", "cpu_compute", *copies), *alone]:
        load = [loads[r] for r in resources if r in loads]
        work = add(seconds[r] for r in resources)
        waits = waited if "gpu_compute" in resources else None
        if engine.weight_loads == "spread":
            tracks.append(Track(resources, add([work, *load]), waited=waits))
        else:
            tracks.append(Track(resources, work, add(load) if load else None, waits))
    unhidden = engine.unhidden_share.effective
    return Stage(name, busy, tuple(tracks), case.shape, serial=blocking_load, unhidden_share=unhidden)


def idle(amounts: Amounts[Any]) -> dict[Resource, Linear]:
    """No work yet. Amounts are added by ``x = x + y``: arrays and expressions would change under ``+=``."""
    return dict.fromkeys(RESOURCES, amounts.prompts * 0.0)


def _sum(one: Mapping[Resource, Linear], other: Mapping[Resource, Linear]) -> dict[Resource, Linear]:
    """Seconds of both, which have the same resources."""
    return {resource: seconds + other[resource] for resource, seconds in one.items()}


def _scaled(whole: Mapping[Resource, Linear], share: float) -> dict[Resource, Linear]:
    """A share of the seconds of every resource."""
    return {resource: seconds * share for resource, seconds in whole.items()}


def _weight_loads(case: Case, amounts: Amounts[Any]) -> tuple[dict[Resource, Linear], dict[Resource, Linear]]:
    """Seconds to stream, once a pass, what the split leaves off the GPU: of every layer, and of the head."""
    links, layers = case.hardware.links, float(case.model.num_layers)
    streamed = case.model.layer_weight_bytes(compressed=case.switches.compress_weights) * layers

    def loads(seconds: Callable[[Link], float]) -> dict[Resource, Linear]:
        return {
            "cpu_to_gpu": over_link(case, amounts.weights) * seconds(links.cpu_to_gpu),
            "disk_read": amounts.weights.disk * seconds(links.disk_read),
        }

    return (
        loads(lambda link: streamed / link.bytes_per_s.effective + layers * link.latency_s.effective),
        loads(lambda link: case.model.head_load_bytes / link.bytes_per_s.effective),
    )


def _hidden_traffic(case: Case, amounts: Amounts[Any], tokens: int) -> dict[Resource, Linear]:
    """Seconds to load and store the hidden states of every batch, for every layer."""
    links, hidden = case.hardware.links, amounts.activations
    volume = tokens * case.model.hidden_size * BYTES_PER_VALUE * case.model.num_layers
    return {
        "cpu_to_gpu": over_link(case, hidden) * (volume / links.cpu_to_gpu.bytes_per_s.effective),
        "gpu_to_cpu": over_link(case, hidden) * (volume / links.gpu_to_cpu.bytes_per_s.effective),
        "disk_read": hidden.disk * (volume / links.disk_read.bytes_per_s.effective),
        "disk_write": hidden.disk * (volume / links.disk_write.bytes_per_s.effective),
    }


def _hidden_waits(case: Case, amounts: Amounts[Any], hidden: Mapping[Resource, Linear]) -> Linear | None:
    """Seconds in which the processors wait for hidden states, which leave one layer and come back for the next.

    Those of a block's only batch are stored and loaded while nothing else can be computed. Of two batches, our
    schedule stores one while the other is computed, and loads each when it is needed. Copies that the processor makes
    itself are its work already.
    """
    most = case.shape.batches_high
    if most > (2 if case.hardware.engine.weight_loads == "spread" else 1):
        return None
    calls = case.calls(amounts, "activations")
    moving: dict[Resource, Linear] = {"disk_read": calls.disk, "disk_write": calls.disk}
    if not disk_lands_on_gpu(case):
        moving |= {"cpu_to_gpu": calls.off_gpu, "gpu_to_cpu": calls.off_gpu}
    loads = ("disk_read", "cpu_to_gpu")
    return add(
        hidden[link] + _latency_s(case, calls, link) for link, calls in moving.items() if link in loads or most == 1
    )


def _latency(case: Case, amounts: Amounts[Any]) -> dict[Resource, Linear]:
    """Seconds of link latency: one transfer a layer, batch and part, for the cache and for the hidden states."""
    cache, hidden = case.calls(amounts, "cache"), case.calls(amounts, "activations")
    moving: dict[Resource, Linear] = {
        "cpu_to_gpu": cache_over_link(case, cache) + over_link(case, hidden),
        "gpu_to_cpu": cache_over_link(case, cache) + over_link(case, hidden),
        "disk_read": cache.disk + hidden.disk,
        "disk_write": cache.disk + hidden.disk,
    }
    return {resource: _latency_s(case, calls, resource) for resource, calls in moving.items()}


def _latency_s(case: Case, calls: Linear, link: Resource) -> Linear:
    """Seconds of a link's latency in a pass of so many calls a layer."""
    return calls * (float(case.model.num_layers) * getattr(case.hardware.links, link).latency_s.effective)


def over_link(case: Case, amount: PerTier[Any]) -> Linear:
    """What must cross the link between the memory tiers: where both are host memory, what is on disk does not."""
    return amount.cpu if disk_lands_on_gpu(case) else amount.off_gpu


def cache_over_link(case: Case, cache: PerTier[Any]) -> Linear:
    """What of the cache must cross it: where both are host memory, the CPU writes and attends to its part in place."""
    if case.switches.cpu_attention and disk_lands_on_gpu(case):
        return cache.cpu * 0.0
    return over_link(case, cache)


def disk_lands_on_gpu(case: Case) -> bool:
    """True where the first tier is host memory: disk reads need no hop through the second tier."""
    return case.hardware.gpu.is_host_memory
