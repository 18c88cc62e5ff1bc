"""Our cost model: every second is bytes over a bandwidth, FLOPs over a rate, or a latency.

Derivations and notation: docs/cost-model.md. Symbols of the paper stand in comments once: s prompt
tokens, n new tokens, l layers, b prompts of a GPU batch, k GPU batches of a block.
"""

from collections.abc import Mapping
from typing import Any

from costmodel.errors import InputError
from costmodel.formulations.base import (
    LINKS,
    RESOURCES,
    Amounts,
    Case,
    Formulation,
    Linear,
    Peak,
    PerTier,
    Resource,
    Stage,
    Switches,
    Track,
    add,
)
from costmodel.hardware import Hardware, Link
from costmodel.model import BYTES_PER_VALUE, ModelSpec
from costmodel.workload import Workload

STAGING_BUFFERS = 2
"""Double buffering: one buffer is filled while the other is used."""


HOST_MEMORY_KINDS = ("cpu", "metal")
"""Machines whose first tier is host memory."""


class Roofline(Formulation):
    """Seconds from measured rates; memory as the runtime allocates it."""

    name = "roofline"
    default_usable_fraction = 0.9
    activations_on_disk = True

    def check(self, hardware: Hardware, model: ModelSpec, workload: Workload) -> None:
        window = model.sliding_window
        if window is not None and window < workload.total_len:
            raise InputError(
                f"model {model.name!r} attends within a window of {window} tokens, shorter than prompt + generation = "
                f"{workload.total_len}: the roofline formulation counts full attention; shorten the prompt"
            )

    def refusal(self, switches: Switches, hardware: Hardware) -> str | None:
        cpu = hardware.cpu
        if switches.cpu_attention and hardware.gpu.kind in HOST_MEMORY_KINDS and not cpu.memory_bytes.effective:
            return (
                f"cpu_attention cannot be on: the first tier of hardware {hardware.name!r} is host memory and there "
                "is no second one, so the same processor attends either way"
            )
        if switches.cpu_attention and cpu.attention_bytes_per_s is None:
            return f"cpu_attention needs cpu.attention_bytes_per_s, which hardware {hardware.name!r} does not have"
        if switches.cpu_attention and switches.compress_cache and cpu.dequantize_values_per_s is None:
            return (
                f"cpu_attention over a compressed cache needs cpu.dequantize_values_per_s, which hardware "
                f"{hardware.name!r} does not have: its engine cannot attend to a 4-bit cache on the CPU"
            )
        return None

    # ---------------------------------------------------------------- time

    def prefill(self, case: Case, amounts: Amounts[Any]) -> list[Stage]:
        tokens = case.workload.prompt_len
        model, links, cache = case.model, case.hardware.links, amounts.cache
        new_cache = model.kv_bytes_per_token(compressed=case.switches.compress_cache) * tokens * model.num_layers
        attention = _idle(amounts)
        attention["gpu_compute"] = amounts.prompts * (
            (_prefill_attention_s(case, tokens) + _cache_quantize_s(case, tokens)) * model.num_layers
        )
        attention["gpu_to_cpu"] = _over_link(case, cache) * (new_cache / links.gpu_to_cpu.for_cache.effective)
        attention["disk_write"] = cache.disk * (new_cache / links.disk_write.for_cache.effective)
        logits = tokens if case.hardware.engine.prefill_logits == "all" else 1
        return _stages(case, amounts, attention, tokens=tokens, logits=logits)

    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        model, links, cache = case.model, case.hardware.links, amounts.cache
        token = model.kv_bytes_per_token(compressed=case.switches.compress_cache) * model.num_layers
        cached = token * context_len
        on_gpu = _gpu_attention_s(case, context_len) * model.num_layers
        attention = _idle(amounts)
        attention["gpu_compute"] = (
            amounts.prompts * (_cache_quantize_s(case, 1) * model.num_layers) + cache.gpu * on_gpu
        )
        attention["gpu_to_cpu"] = _over_link(case, cache) * (token / links.gpu_to_cpu.for_cache.effective)
        attention["disk_read"] = cache.disk * (cached / links.disk_read.for_cache.effective)
        attention["disk_write"] = cache.disk * (token / links.disk_write.for_cache.effective)
        if case.switches.cpu_attention:
            # The query goes down and the attention output comes back, one vector each.
            vector = 0 if _disk_lands_on_gpu(case) else model.num_heads * model.head_dim * BYTES_PER_VALUE
            vector *= model.num_layers
            attention["cpu_compute"] = cache.off_gpu * (_cpu_attention_s(case, context_len) * model.num_layers)
            if case.hardware.cpu.attention_call_s is not None:
                call_s = case.hardware.cpu.attention_call_s.effective * model.num_layers
                attention["cpu_compute"] = attention["cpu_compute"] + case.shape.batches(cache.off_gpu) * call_s
            attention["gpu_to_cpu"] = attention["gpu_to_cpu"] + cache.off_gpu * (
                vector / links.gpu_to_cpu.bytes_per_s.effective
            )
            attention["cpu_to_gpu"] = attention["cpu_to_gpu"] + cache.off_gpu * (
                vector / links.cpu_to_gpu.bytes_per_s.effective
            )
        else:
            attention["gpu_compute"] = attention["gpu_compute"] + cache.off_gpu * on_gpu
            if case.hardware.engine.cache_loads == "blocking":
                # The launching thread copies K, then V, to a pinned buffer; their transfers run beside what
                # follows, so only V's is not hidden by its own copies. The disk's threads do not block.
                waited = cache.cpu * (cached / links.cpu_to_gpu.for_cache.effective)
                pinned = (_over_link(case, cache) + cache.cpu * -0.5) * (
                    cached / links.cpu_to_gpu.bytes_per_s.effective
                )
                attention["cpu_to_gpu"] = attention["cpu_to_gpu"] + pinned
                return _stages(case, amounts, attention, tokens=1, logits=1, blocking_load=waited)
            attention["cpu_to_gpu"] = attention["cpu_to_gpu"] + _over_link(case, cache) * (
                cached / links.cpu_to_gpu.for_cache.effective
            )
        return _stages(case, amounts, attention, tokens=1, logits=1)

    # -------------------------------------------------------------- memory

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        model, workload, shape, switches = case.model, case.workload, case.shape, case.switches
        stored = model.layer_weight_bytes(compressed=switches.compress_weights) * model.num_layers
        stored += model.embedding_bytes + model.head_bytes
        cache = model.kv_bytes_per_token(compressed=switches.compress_cache) * workload.total_len
        hidden = model.hidden_size * BYTES_PER_VALUE
        batch_cache = shape.per_batch(amounts.cache.off_gpu) * (STAGING_BUFFERS * cache)
        batch_cache_disk = shape.per_batch(amounts.cache.disk) * (STAGING_BUFFERS * cache)
        layer = _largest_load_bytes(case) * STAGING_BUFFERS
        lands_on_gpu = _disk_lands_on_gpu(case)

        def resident(tier: str, hidden_tokens: int) -> Linear:
            return (
                getattr(amounts.weights, tier) * stored
                + getattr(amounts.cache, tier) * (cache * model.num_layers)
                + getattr(amounts.activations, tier) * (hidden * hidden_tokens)
            )

        found: list[Peak] = []
        for moment, tokens in (("prefill", workload.prompt_len), ("decode", 1)):
            batch_hidden = shape.per_batch(amounts.activations.off_gpu) * (STAGING_BUFFERS * hidden * tokens)
            gpu = resident("gpu", tokens) + amounts.weights.off_gpu * layer + batch_hidden
            gpu = gpu + amounts.blocks * (_at_once(case, tokens, shape.gpu_batch_low) * _workspace_bytes(case, moment))
            gpu = gpu + amounts.blocks * _dequantized_bytes(case)
            cpu = resident("cpu", tokens)
            if moment == "decode" or case.hardware.engine.buffers == "always":
                # Attention reads its cache from a staging buffer on the tier where it is computed.
                gpu = gpu + (batch_cache_disk * float(lands_on_gpu) if switches.cpu_attention else batch_cache)
            if not lands_on_gpu:
                cpu = cpu + amounts.weights.disk * layer + batch_cache_disk
                cpu = cpu + shape.per_batch(amounts.activations.disk) * (STAGING_BUFFERS * hidden * tokens)
            found += [Peak("gpu", moment, gpu), Peak("cpu", moment, cpu)]
        found.append(Peak("disk", "whole run", resident("disk", workload.prompt_len)))
        return found


# ------------------------------------------------------------------ stages


def _stages(
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
    the weights that a stage loads are those of the next one. ``blocking_load`` are seconds of a cache
    load that the computation waits for.
    """
    model, layers = case.model, float(case.model.num_layers)
    attention_params, mlp_params = _matrix_params(model)
    hidden, latency = _hidden_traffic(case, amounts, tokens), _latency(case, amounts)
    attention["gpu_compute"] = attention["gpu_compute"] + amounts.prompts * (
        _products_s(case, attention_params, tokens) * layers
    )
    mlp = _idle(amounts)
    mlp["gpu_compute"] = amounts.prompts * (
        (_products_s(case, mlp_params, tokens) + _elementwise_s(case, tokens)) * layers + _head_s(case, logits)
    )
    for resource in hidden:
        attention[resource] = attention[resource] + latency[resource]
        mlp[resource] = mlp[resource] + hidden[resource]
    loads = _weight_loads(case, amounts)
    if case.hardware.engine.stages == "layer":
        merged = {resource: attention[resource] + mlp[resource] for resource in RESOURCES}
        return [_stage(case, "layers", merged, loads, 1.0, blocking_load)]
    weight_share = attention_params / (attention_params + mlp_params)
    return [
        _stage(case, "attention", attention, loads, 1.0 - weight_share, blocking_load),
        _stage(case, "mlp", mlp, loads, weight_share, None),
    ]


def _stage(
    case: Case,
    name: str,
    seconds: dict[Resource, Linear],
    loads: Mapping[Resource, Linear],
    share: float,
    blocking_load: Linear | None,
) -> Stage:
    """One stage with its ``share`` of the weight loads.

    A batch waits for its CPU attention, so the processors take turns on one track; every link has a
    track of its own. Without overlap all of it is one track.
    """
    engine, overlap = case.hardware.engine, case.switches.overlap
    moved = {r: seconds[r] + loads[r] * share if r in loads else seconds[r] for r in RESOURCES}
    busy = dict(moved)
    if blocking_load is not None:
        busy["cpu_to_gpu"] = busy["cpu_to_gpu"] + blocking_load
    if not overlap:
        return Stage(name, busy, (Track(RESOURCES, add(busy.values())),), case.shape)
    tracks = [Track(("gpu_compute", "cpu_compute"), seconds["gpu_compute"] + seconds["cpu_compute"])]
    if engine.weight_loads == "spread":
        tracks += [Track((r,), moved[r]) for r in LINKS]
    else:
        tracks += [Track((r,), seconds[r], loads[r] * share if r in loads else None) for r in LINKS]
    unhidden = engine.unhidden_share.effective
    return Stage(name, busy, tuple(tracks), case.shape, serial=blocking_load, unhidden_share=unhidden)


def _idle(amounts: Amounts[Any]) -> dict[Resource, Linear]:
    """No work yet. Amounts are added by ``x = x + y``: arrays and expressions would change under ``+=``."""
    return dict.fromkeys(RESOURCES, amounts.prompts * 0.0)


def _weight_loads(case: Case, amounts: Amounts[Any]) -> dict[Resource, Linear]:
    """Seconds to stream, once a pass, what the split leaves off the GPU: every layer and the head."""
    links, layers = case.hardware.links, float(case.model.num_layers)
    streamed = case.model.layer_weight_bytes(compressed=case.switches.compress_weights) * layers
    streamed += case.model.head_load_bytes

    def seconds(link: Link) -> float:
        return streamed / link.bytes_per_s.effective + layers * link.latency_s.effective

    return {
        "cpu_to_gpu": _over_link(case, amounts.weights) * seconds(links.cpu_to_gpu),
        "disk_read": amounts.weights.disk * seconds(links.disk_read),
    }


def _hidden_traffic(case: Case, amounts: Amounts[Any], tokens: int) -> dict[Resource, Linear]:
    """Seconds to load and store the hidden states of every batch, for every layer."""
    links, hidden = case.hardware.links, amounts.activations
    volume = tokens * case.model.hidden_size * BYTES_PER_VALUE * case.model.num_layers
    return {
        "cpu_to_gpu": _over_link(case, hidden) * (volume / links.cpu_to_gpu.bytes_per_s.effective),
        "gpu_to_cpu": _over_link(case, hidden) * (volume / links.gpu_to_cpu.bytes_per_s.effective),
        "disk_read": hidden.disk * (volume / links.disk_read.bytes_per_s.effective),
        "disk_write": hidden.disk * (volume / links.disk_write.bytes_per_s.effective),
    }


def _latency(case: Case, amounts: Amounts[Any]) -> dict[Resource, Linear]:
    """Seconds of link latency: one transfer a layer and batch for the cache and for the hidden states.

    A transfer is counted by the part of the batch that moves, which keeps the formula linear.
    """
    links, cache, hidden = case.hardware.links, amounts.cache, amounts.activations
    moving: dict[Resource, Linear] = {
        "cpu_to_gpu": _over_link(case, cache) + _over_link(case, hidden),
        "gpu_to_cpu": _over_link(case, cache) + _over_link(case, hidden),
        "disk_read": cache.disk + hidden.disk,
        "disk_write": cache.disk + hidden.disk,
    }
    layers = float(case.model.num_layers)
    return {
        resource: case.shape.batches(amount) * (layers * getattr(links, resource).latency_s.effective)
        for resource, amount in moving.items()
    }


def _over_link(case: Case, amount: PerTier[Any]) -> Linear:
    """What must cross the link between the memory tiers: where both are host memory, what is on disk does not."""
    return amount.cpu if _disk_lands_on_gpu(case) else amount.off_gpu


# ------------------------------------------------------------------ seconds of one layer and one prompt


def _matrix_params(model: ModelSpec) -> tuple[int, int]:
    """Parameters in the matrices of attention and of the MLP."""
    query = model.num_heads * model.head_dim
    attention = model.hidden_size * (2 * query + model.kv_values_per_token)
    return attention, model.layer_matrix_params - attention


def _products_s(case: Case, params: int, tokens: int) -> float:
    """Seconds to multiply one prompt's ``tokens`` by matrices of ``params`` parameters (half a layer).

    max(FLOPs / rate, weight bytes / bandwidth), plus half a layer's launches; what a batch does once
    (reading the weights, expanding 4-bit ones, launching) is shared by its prompts.
    """
    gpu, shape = case.hardware.gpu, case.shape
    fewest, most = (_at_once(case, tokens, prompts) for prompts in (shape.gpu_batch_low, shape.gpu_batch_high))
    rate = gpu.matmul_flops_per_s.best_between(fewest * tokens, most * tokens)
    read_s = params * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective / most
    once = gpu.layer_launch_s.effective / 2
    if case.switches.compress_weights:
        once += params / gpu.dequantize_values_per_s.effective
    return max(2 * params * tokens / rate, read_s) + once / most


def _at_once(case: Case, tokens: int, prompts: int) -> int:
    """Prompts of a batch that a layer computes at a time: all, unless the engine limits the tokens of prefill."""
    limit = case.hardware.engine.prefill_rows
    return prompts if limit is None or tokens == 1 else min(prompts, max(1, limit // tokens))


def _elementwise_s(case: Case, tokens: int) -> float:
    """Seconds of norms, residual additions (12 h values moved) and activation function (2 a unit)."""
    model = case.model
    values = 12 * model.hidden_size + 2 * model.ffn_size * (2 if model.gated_mlp else 1)
    return values * tokens * BYTES_PER_VALUE / case.hardware.gpu.memory_bytes_per_s.effective


def _prefill_attention_s(case: Case, tokens: int) -> float:
    """Seconds of one layer's attention among one prompt's tokens (products, mask and softmax)."""
    engine = case.hardware.engine
    flops = case.model.attention_flops(context_len=tokens) * tokens * engine.attention_causal_share.effective
    return flops / case.hardware.gpu.attention_flops_per_s.at(tokens)


def _cache_quantize_s(case: Case, tokens: int) -> float:
    """Seconds to write one layer's new cache entries of one prompt in 4 bits."""
    if not case.switches.compress_cache:
        return 0.0
    return case.model.kv_values_per_token * tokens / case.hardware.gpu.dequantize_values_per_s.effective


def _gpu_attention_s(case: Case, context_len: Any) -> Any:
    """Seconds of one layer's decode attention on the GPU for one prompt: the cache is read once."""
    model, gpu = case.model, case.hardware.gpu
    per_token = max(
        model.attention_flops(context_len=1) / gpu.matmul_flops_per_s.effective,
        model.kv_values_per_token * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective,
    )
    if case.switches.compress_cache:
        per_token += model.kv_values_per_token / gpu.dequantize_values_per_s.effective
    return per_token * context_len


def _cpu_attention_s(case: Case, context_len: Any) -> Any:
    """Seconds of one layer's decode attention on the CPU for one prompt."""
    model, cpu = case.model, case.hardware.cpu
    assert cpu.attention_bytes_per_s is not None  # Roofline.refusal has ruled this out
    per_token = model.kv_values_per_token * BYTES_PER_VALUE / cpu.attention_bytes_per_s.effective
    if case.switches.compress_cache:
        assert cpu.dequantize_values_per_s is not None
        per_token += model.kv_values_per_token / cpu.dequantize_values_per_s.effective
    return per_token * context_len


def _head_s(case: Case, rows: int) -> float:
    """Seconds of the LM head for one prompt: ``rows`` positions get logits."""
    model, gpu, shape = case.model, case.hardware.gpu, case.shape
    rate = gpu.matmul_flops_per_s.best_between(shape.gpu_batch_low * rows, shape.gpu_batch_high * rows)
    read_s = model.head_load_bytes / gpu.memory_bytes_per_s.effective / shape.gpu_batch_high
    write_s = rows * model.vocab_size * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective
    launch_s = gpu.layer_launch_s.effective / shape.gpu_batch_high
    return max(model.head_flops_per_token * rows / rate, read_s + write_s) + launch_s


# ------------------------------------------------------------------ parts, bytes


def _disk_lands_on_gpu(case: Case) -> bool:
    """True where the first tier is host memory: disk reads need no hop through the second tier."""
    return case.hardware.gpu.kind in HOST_MEMORY_KINDS


def _largest_load_bytes(case: Case) -> float:
    """Bytes of one staging buffer: the larger of a layer and the LM head."""
    layer = case.model.layer_weight_bytes(compressed=case.switches.compress_weights)
    return max(layer, case.model.head_load_bytes)


def _workspace_bytes(case: Case, moment: str) -> float:
    """GPU bytes that computing one prompt of a batch needs beside its inputs.

    The widest moment of a layer (attention: residual, norm, q, k, v, output; MLP: residual, norm and
    the intermediate), unfused scores where the engine materialises them, and the logits with an fp32
    copy of the last position's.
    """
    model, workload, engine = case.model, case.workload, case.hardware.engine
    prefill = moment == "prefill"
    tokens = workload.prompt_len if prefill else 1
    query = model.num_heads * model.head_dim
    attention = 2 * model.hidden_size + 2 * query + model.kv_values_per_token
    mlp = 2 * model.hidden_size + model.ffn_size * (2 if model.gated_mlp else 1)
    layer = max(attention, mlp) * tokens * BYTES_PER_VALUE
    if prefill and engine.attention_scores == "stored":
        layer += 2 * model.num_heads * tokens**2 * BYTES_PER_VALUE
    if case.switches.compress_cache and engine.expanded == "layer and cache":
        # The batch's cache in 16 bits: what prefill is about to store, what decode attends to.
        span = tokens if prefill else workload.total_len
        layer += model.kv_values_per_token * span * BYTES_PER_VALUE
    rows = tokens if prefill and engine.prefill_logits == "all" else 1
    logits = model.vocab_size * (rows * BYTES_PER_VALUE + 4)
    return max(layer, logits + model.hidden_size * tokens * BYTES_PER_VALUE)


def _dequantized_bytes(case: Case) -> float:
    """GPU bytes of the weights that lie expanded to 16 bits at a time."""
    model, extent = case.model, case.hardware.engine.expanded
    if not case.switches.compress_weights or extent == "pieces":
        return 0.0
    widest = max(model.num_heads * model.head_dim, model.ffn_size)
    return BYTES_PER_VALUE * float(
        model.layer_matrix_params if extent == "layer and cache" else model.hidden_size * widest
    )
