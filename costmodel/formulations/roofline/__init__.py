"""Our cost model: every second is bytes over a bandwidth, FLOPs over a rate, or a latency.

Derivations and notation: docs/cost-model.md. Symbols of the paper stand in comments once: s prompt
tokens, n new tokens, l layers, b prompts of a GPU batch, k GPU batches of a block.
"""

from typing import Any

from costmodel.errors import InputError
from costmodel.formulations.base import Amounts, Case, Formulation, Linear, Peak, PerTier, Stage, Switches
from costmodel.formulations.roofline.seconds import (
    at_once,
    cache_quantize_s,
    cpu_attention_s,
    gather_s,
    gpu_attention_s,
    launch_share,
    prefill_attention_s,
)
from costmodel.formulations.roofline.stages import cache_over_link, disk_lands_on_gpu, idle, stages
from costmodel.formulations.roofline.working_memory import (
    dequantized_bytes,
    kernels_bytes,
    largest_load_bytes,
    workspace_bytes,
)
from costmodel.hardware import Hardware
from costmodel.model import BYTES_PER_VALUE, ModelSpec
from costmodel.workload import Workload

__all__ = ["Roofline"]

STAGING_BUFFERS = 2
"""Double buffering: one buffer is filled while the other is used."""


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
        if switches.cpu_attention and hardware.gpu.is_host_memory and not cpu.memory_bytes.effective:
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
        attention = idle(amounts)
        attention["gpu_compute"] = amounts.prompts * (
            (prefill_attention_s(case, tokens) + cache_quantize_s(case, tokens)) * model.num_layers
        )
        attention["gpu_to_cpu"] = cache_over_link(case, cache) * (new_cache / links.gpu_to_cpu.for_cache.effective)
        attention["disk_write"] = cache.disk * (new_cache / links.disk_write.for_cache.effective)
        logits = tokens if case.hardware.engine.prefill_logits == "all" else 1
        return stages(case, amounts, attention, tokens=tokens, logits=logits)

    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        model, links, cache = case.model, case.hardware.links, amounts.cache
        token = model.kv_bytes_per_token(compressed=case.switches.compress_cache) * model.num_layers
        cached = token * context_len
        on_gpu = gpu_attention_s(case, context_len) * model.num_layers
        attention = idle(amounts)
        attention["gpu_compute"] = amounts.prompts * (cache_quantize_s(case, 1) * model.num_layers) + cache.gpu * on_gpu
        attention["gpu_compute"] = attention["gpu_compute"] + _cache_handling(case, amounts, context_len)
        attention["gpu_to_cpu"] = cache_over_link(case, cache) * (token / links.gpu_to_cpu.for_cache.effective)
        attention["disk_read"] = cache.disk * (cached / links.disk_read.for_cache.effective)
        attention["disk_write"] = cache.disk * (token / links.disk_write.for_cache.effective)
        if case.switches.cpu_attention:
            # The query goes down and the attention output comes back, one vector each.
            vector = 0 if disk_lands_on_gpu(case) else model.num_heads * model.head_dim * BYTES_PER_VALUE
            vector *= model.num_layers
            attention["cpu_compute"] = cache.off_gpu * (cpu_attention_s(case, context_len) * model.num_layers)
            if case.hardware.cpu.attention_call_s is not None:
                call_s = case.hardware.cpu.attention_call_s.effective * model.num_layers
                attention["cpu_compute"] = attention["cpu_compute"] + case.calls(amounts, "cache").off_gpu * call_s
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
                pinned = (cache_over_link(case, cache) + cache.cpu * -0.5) * (
                    cached / links.cpu_to_gpu.bytes_per_s.effective
                )
                attention["cpu_to_gpu"] = attention["cpu_to_gpu"] + pinned
                return stages(case, amounts, attention, tokens=1, logits=1, blocking_load=waited)
            attention["cpu_to_gpu"] = attention["cpu_to_gpu"] + cache_over_link(case, cache) * (
                cached / links.cpu_to_gpu.for_cache.effective
            )
        return stages(case, amounts, attention, tokens=1, logits=1)

    # -------------------------------------------------------------- memory

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        model, workload, shape, switches = case.model, case.workload, case.shape, case.switches
        stored = model.layer_weight_bytes(compressed=switches.compress_weights) * model.num_layers
        stored += model.embedding_bytes + model.head_bytes
        cache = model.kv_bytes_per_token(compressed=switches.compress_cache) * workload.total_len
        hidden = model.hidden_size * BYTES_PER_VALUE
        batch_cache = shape.per_batch(amounts.cache.off_gpu) * (STAGING_BUFFERS * cache)
        batch_cache_disk = shape.per_batch(amounts.cache.disk) * (STAGING_BUFFERS * cache)
        layer = largest_load_bytes(case) * STAGING_BUFFERS
        lands_on_gpu = disk_lands_on_gpu(case)

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
            working = workspace_bytes(case, moment, at_once(case, tokens, shape.gpu_batch_low))
            gpu = gpu + amounts.blocks * (working + dequantized_bytes(case, tokens)) + kernels_bytes(case, amounts)
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


def _cache_handling(case: Case, amounts: Amounts[Any], context_len: Any) -> Linear:
    """Seconds that the first tier's processor takes of 4-bit and carried caches beyond reading and expanding them."""
    gpu, cache, layers = case.hardware.gpu, amounts.cache, float(case.model.num_layers)
    calls, called = case.calls(amounts, "cache"), layers * launch_share(case)
    elsewhere = case.switches.cpu_attention and not disk_lands_on_gpu(case)
    seconds = amounts.prompts * 0.0
    if case.switches.compress_cache and gpu.compressed_call_s is not None:
        attended = calls.gpu if elsewhere else case.shape.batches(amounts.prompts)
        seconds = seconds + attended * (gpu.compressed_call_s.effective * called)
    if elsewhere:
        return seconds
    part_call_s = gpu.compressed_part_call_s if case.switches.compress_cache else gpu.part_call_s
    if part_call_s is not None:
        further = float(case.further_parts("cache")) * called
        seconds = seconds + case.shape.batches(amounts.prompts) * (part_call_s.effective * further)

    def carried(held: PerTier[Any]) -> Linear:
        return held.disk if case.switches.cpu_attention else held.off_gpu  # the CPU attends in place to its own tier

    if gpu.carried_call_s is not None:
        seconds = seconds + carried(calls) * (gpu.carried_call_s.effective * called)
    return seconds + carried(cache) * (gather_s(case, context_len) * layers)
