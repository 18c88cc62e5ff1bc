"""The published cost model (arXiv 2303.06865, appendix, and the released solver), reproduced exactly.

A baseline: it has no memory bandwidth, no embeddings, one average context, and always attends on the
CPU to what is not on the GPU. Symbols: wi weight bytes of a layer, s prompt, n new tokens, gbs prompts
of a GPU batch, bls of a block, h1 hidden, h2 FFN, nh heads.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from costmodel.errors import InputError
from costmodel.formulations.base import Amounts, Case, Formulation, Linear, Peak, Resource, Stage, Switches, Track, add
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.workload import Workload

WEIGHT_COMPRESSION = 4
"""The published model divides weights by 4 and charges nothing for it."""

DISK_WEIGHT_EFFICIENCY = 0.95
"""Weights are read from disk during decode at 95 % of the disk's rate."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """The machine constants of the published model: bytes/s and FLOP/s."""

    cpu_to_gpu_bytes_per_s: float
    gpu_to_cpu_cache_bytes_per_s: float
    gpu_to_cpu_hidden_bytes_per_s: float
    disk_to_cpu_bytes_per_s: float
    cpu_to_disk_cache_prefill_bytes_per_s: float
    cpu_to_disk_hidden_prefill_bytes_per_s: float
    cpu_to_disk_decode_bytes_per_s: float
    matmul_prefill_flops_per_s: float
    matmul_decode_flops_per_s: float
    attention_prefill_flops_per_s: float
    attention_decode_flops_per_s: float
    cpu_attention_flops_per_s: float

    @classmethod
    def of(cls, hardware: Hardware) -> "Constants":
        """The released constants where the machine carries them, else ones derived from its rates."""
        names = {f.name for f in fields(cls)}
        released = hardware.flexgen_constants
        if released is None:
            return cls._derived(hardware)
        if set(released) != names:
            wrong = sorted(set(released) ^ names)
            raise InputError(
                f"hardware {hardware.name!r}: flexgen_constants must hold exactly the {len(names)} constants of the "
                f"published model; missing or unknown: {', '.join(wrong)}"
            )
        return cls(**{name: quantity.effective for name, quantity in released.items()})

    @classmethod
    def _derived(cls, hardware: Hardware) -> "Constants":
        gpu, cpu, links = hardware.gpu, hardware.cpu, hardware.links
        matmul = gpu.matmul_flops_per_s.effective
        # Decode attention does one multiply-add (2 FLOPs) for each 2-byte cache value it reads.
        on_cpu = cpu.attention_bytes_per_s
        return cls(
            cpu_to_gpu_bytes_per_s=links.cpu_to_gpu.bytes_per_s.effective,
            gpu_to_cpu_cache_bytes_per_s=links.gpu_to_cpu.for_cache.effective,
            gpu_to_cpu_hidden_bytes_per_s=links.gpu_to_cpu.bytes_per_s.effective,
            disk_to_cpu_bytes_per_s=links.disk_read.bytes_per_s.effective,
            cpu_to_disk_cache_prefill_bytes_per_s=links.disk_write.for_cache.effective,
            cpu_to_disk_hidden_prefill_bytes_per_s=links.disk_write.bytes_per_s.effective,
            cpu_to_disk_decode_bytes_per_s=links.disk_write.for_cache.effective,
            matmul_prefill_flops_per_s=matmul,
            matmul_decode_flops_per_s=matmul,
            attention_prefill_flops_per_s=matmul,
            attention_decode_flops_per_s=gpu.memory_bytes_per_s.effective,
            cpu_attention_flops_per_s=(on_cpu or links.cpu_to_gpu.bytes_per_s).effective,
        )

    def cpu_attention(self, gpu_batch_low: int, gpu_batch_high: int, hidden_size: int) -> float:
        """CPU attention FLOP/s: slower for small batches and narrow models; the best over a range."""
        narrow = max(0.0, math.log2(4096 / hidden_size))

        def factor(gpu_batch_size: int) -> float:
            small = max(0.0, math.log2(64 / gpu_batch_size))
            return max(0.1, 1 + 0.0168 * small * narrow - 0.0328 * small - 0.0621 * narrow)

        # Monotone in the batch size either way, so the best of a range is at one of its ends.
        return self.cpu_attention_flops_per_s * max(factor(gpu_batch_low), factor(gpu_batch_high))


class FlexGen(Formulation):
    """The published formulas, coefficient by coefficient."""

    name = "flexgen"
    default_usable_fraction = 0.8
    activations_on_disk = False
    mean_context_only = True

    def check(self, hardware: Hardware, model: ModelSpec, workload: Workload) -> None:
        if model.gated_mlp or model.num_kv_heads != model.num_heads:
            raise InputError(
                f"model {model.name!r}: the flexgen formulation knows only plain MLPs and as many kv heads as heads; "
                "use --formulation roofline"
            )
        Constants.of(hardware)

    def notes(self, hardware: Hardware) -> tuple[str, ...]:
        if hardware.flexgen_constants is not None:
            return (
                "the flexgen formulation uses the constants released with the published model, not the rates above",
            )
        derived = f"the flexgen constants are derived from the rates of {hardware.name}"
        return (f"{derived}: the published ones exist only for t4-flexgen",)

    def refusal(self, switches: Switches, hardware: Hardware) -> str | None:
        if not switches.overlap:
            return "overlap cannot be off: the flexgen formulation always overlaps"
        if switches.compress_cache:
            return "compress_cache cannot be on: the flexgen formulation has no cache compression"
        if not switches.cpu_attention:
            return (
                "cpu_attention cannot be off: the flexgen formulation always attends on the CPU to the cache that is "
                "not on the GPU"
            )
        return None

    def prefill(self, case: Case, amounts: Amounts[Any]) -> list[Stage]:
        k = Constants.of(case.hardware)
        wi, h1, h2, s = _sizes(case)
        weights, cache, hidden = amounts.weights, amounts.cache, amounts.activations
        hidden_bytes, cache_bytes = 2 * s * h1, 4 * (s + 1) * h1
        seconds: dict[Resource, Linear] = {
            "cpu_to_gpu": (weights.off_gpu * wi + hidden.off_gpu * hidden_bytes) * (1 / k.cpu_to_gpu_bytes_per_s),
            "gpu_to_cpu": cache.off_gpu * (cache_bytes / k.gpu_to_cpu_cache_bytes_per_s)
            + hidden.off_gpu * (hidden_bytes / k.gpu_to_cpu_hidden_bytes_per_s),
            "disk_read": (weights.disk * wi + hidden.disk * hidden_bytes) * (1 / k.disk_to_cpu_bytes_per_s),
            "disk_write": cache.disk * (cache_bytes / k.cpu_to_disk_cache_prefill_bytes_per_s)
            + hidden.disk * (hidden_bytes / k.cpu_to_disk_hidden_prefill_bytes_per_s),
            "gpu_compute": amounts.prompts
            * (
                (8 * s * h1**2 + 4 * s * h1 * h2) / k.matmul_prefill_flops_per_s
                + 4 * s**2 * h1 / k.attention_prefill_flops_per_s
            ),
            "cpu_compute": amounts.prompts * 0.0,
        }
        seconds = _all_layers(seconds, case.model)
        tracks = _tracks(seconds, ("cpu_to_gpu", "disk_read"), ("gpu_to_cpu", "disk_write"), _COMPUTE)
        return [Stage("layers", seconds, tracks, case.shape)]

    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        k = Constants.of(case.hardware)
        wi, h1, h2, _ = _sizes(case)
        weights, cache, hidden = amounts.weights, amounts.cache, amounts.activations
        hidden_bytes, cached, token = 2 * h1, 4 * context_len * h1, 4 * h1
        shape = case.shape
        on_cpu = k.cpu_attention(shape.gpu_batch_low, shape.gpu_batch_high, h1)
        seconds: dict[Resource, Linear] = {
            "cpu_to_gpu": (weights.off_gpu * wi + hidden.off_gpu * hidden_bytes) * (1 / k.cpu_to_gpu_bytes_per_s),
            "gpu_to_cpu": hidden.off_gpu * (hidden_bytes / k.gpu_to_cpu_hidden_bytes_per_s),
            "disk_read": (cache.disk * cached + hidden.disk * hidden_bytes) * (1 / k.disk_to_cpu_bytes_per_s)
            + weights.disk * (wi / (DISK_WEIGHT_EFFICIENCY * k.disk_to_cpu_bytes_per_s)),
            "disk_write": (cache.disk * token + hidden.disk * hidden_bytes) * (1 / k.cpu_to_disk_decode_bytes_per_s),
            "gpu_compute": amounts.prompts * ((8 * h1**2 + 4 * h1 * h2) / k.matmul_decode_flops_per_s)
            + cache.gpu * (cached / k.attention_decode_flops_per_s),
            "cpu_compute": cache.off_gpu * (cached / on_cpu),
        }
        seconds = _all_layers(seconds, case.model)
        tracks = _tracks(seconds, ("gpu_to_cpu",), ("disk_read",), ("disk_write",), _COMPUTE)
        return [Stage("layers", seconds, tracks, case.shape, serial=seconds["cpu_to_gpu"])]

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        wi, h1, h2, s = _sizes(case)
        nh, layers = case.model.num_heads, case.model.num_layers
        total = case.workload.total_len
        weights, cache, hidden, blocks = amounts.weights, amounts.cache, amounts.activations, amounts.blocks
        batch = case.shape.working_prompts(blocks)
        batch_hidden_off = case.shape.per_batch(hidden.off_gpu)
        batch_hidden_disk = case.shape.per_batch(hidden.disk)
        batch_cache_gpu = case.shape.per_batch(cache.gpu)
        batch_cache_disk = case.shape.per_batch(cache.disk)
        kv = 4 * total * h1
        prefill_work = 8 * s * h1 + (2 * s * h1 + 2 * nh * s**2) + 2 * s * h1 + 4 * s * h1 + 2 * s * h2 + 2 * s * h1
        decode_work = 8 * h1 + 4 * h1 + 2 * h2 + 2 * h1
        attention_work = (2 * h1 + 2 * total * h1 + 2 * nh * total) + (2 * total * h1 + 2 * h1)
        staged = weights.gpu * (wi * layers) + cache.gpu * (kv * layers) + weights.off_gpu * (2 * wi)
        return [
            Peak(
                "gpu",
                "prefill",
                staged + hidden.gpu * (2 * s * h1) + batch_hidden_off * (2 * s * h1) + batch * float(prefill_work),
            ),
            Peak(
                "gpu",
                "decode",
                staged
                + hidden.gpu * (2 * h1)
                + batch_hidden_off * (2 * h1)
                + batch_cache_gpu * (kv + attention_work)
                + batch * float(decode_work),
            ),
            Peak(
                "cpu",
                "prefill",
                weights.cpu * (wi * layers)
                + hidden.cpu * (2 * s * h1)
                + cache.cpu * (4 * s * h1 * layers)
                + weights.off_gpu * wi
                + batch_hidden_off * (2 * s * h1),
            ),
            Peak(
                "cpu",
                "decode",
                weights.cpu * (wi * layers)
                + hidden.cpu * (2 * h1)
                + cache.cpu * (kv * layers)
                + weights.disk * wi
                + batch_hidden_disk * (4 * h1)
                + batch_cache_disk * (2 * kv)
                + batch * float(2 * nh * total + 2 * h1),
            ),
            Peak(
                "disk",
                "whole run",
                weights.disk * (wi * layers) + hidden.disk * (2 * s * h1) + cache.disk * (kv * layers),
            ),
        ]


def _sizes(case: Case) -> tuple[float, int, int, int]:
    """wi (bytes), h1, h2, s of the published formulas."""
    h1, h2 = case.model.hidden_size, case.model.ffn_size
    layer = 8 * h1**2 + 4 * h1 * h2
    wi = layer / WEIGHT_COMPRESSION if case.switches.compress_weights else float(layer)
    return wi, h1, h2, case.workload.prompt_len


def _all_layers(seconds: dict[Resource, Linear], model: ModelSpec) -> dict[Resource, Linear]:
    return {resource: amount * float(model.num_layers) for resource, amount in seconds.items()}


_COMPUTE: tuple[Resource, ...] = ("gpu_compute", "cpu_compute")


def _tracks(seconds: dict[Resource, Linear], *groups: tuple[Resource, ...]) -> tuple[Track, ...]:
    """One track for each group of resources that the published model adds up."""
    return tuple(Track(group, add(seconds[r] for r in group)) for group in groups)
