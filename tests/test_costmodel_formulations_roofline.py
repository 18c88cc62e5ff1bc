"""Our cost model against seconds and bytes worked out by hand, and against a second program written from its text."""

import dataclasses
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.estimate import Estimate, estimate
from costmodel.formulations import FORMULATIONS, get
from costmodel.formulations.base import Shape, Switches
from costmodel.hardware import Hardware, Links
from costmodel.linear_program import solve
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.search.problem import Problem
from costmodel.workload import Workload
from tests.instances import (
    any_machine,
    any_model,
    any_problem,
    any_splits,
    any_switches,
    link,
    machine,
    plain_model,
    rate,
)

RANDOMS = st.randoms(use_true_random=False)
H = 1024
ATTENTION_PARAMS, MLP_PARAMS = 4 * H**2, 8 * H**2
LAYERS, VOCAB = 24, 50_000


def cost(policy: Policy, hardware: Hardware, workload: Workload, model: ModelSpec | None = None) -> Estimate:
    return estimate(policy, hardware=hardware, model=model or plain_model(), workload=workload, usable_fraction=1.0)


# ------------------------------------------------------------------ by hand: 24 layers of width 1024, 8 prompts


def test_everything_on_the_gpu_by_hand() -> None:
    # 2 batches of 4 prompts of 100 tokens, 3 tokens generated: 2 decode steps, attending to 101 and 102 tokens.
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=4, num_gpu_batches=2)
    hardware = machine(matmul=rate(20e12), attention=rate(5e12), memory_bytes_per_s=250e9, layer_launch_s=50e-6)
    result = cost(policy, hardware, Workload(prompt_len=100, gen_len=3))

    # Prefill, one layer and batch of 400 tokens: 2 × params × tokens FLOPs take longer than reading the weights.
    products = 2 * (ATTENTION_PARAMS + MLP_PARAMS) * 400 / 20e12
    assert products > (ATTENTION_PARAMS + MLP_PARAMS) * 2 / 250e9
    scores = 4 * (4 * 1024 * 100 * 100) / 5e12  # per prompt: q·Kᵀ and p·V, 2 FLOPs each, over 100 × 100 scores
    rest = (12 * 1024 + 2 * 4096) * 400 * 2 / 250e9
    layer = products + scores + rest + 50e-6
    head = (VOCAB * 1024 * 2 + 4 * VOCAB * 2) / 250e9 + 50e-6  # the matrix is read, 4 rows of logits are written
    assert result.prefill_s == pytest.approx(2 * (24 * layer + head), rel=1e-12)

    # Decode, one layer and batch of 4 tokens: reading the weights takes longer than 8 × params FLOPs.
    products = (ATTENTION_PARAMS + MLP_PARAMS) * 2 / 250e9
    assert products > 2 * (ATTENTION_PARAMS + MLP_PARAMS) * 4 / 20e12
    rest = (12 * 1024 + 2 * 4096) * 4 * 2 / 250e9
    steps = 0.0
    for context_len in (101, 102):
        attention = 4 * 2 * 1024 * 2 * context_len / 250e9  # K and V of 4 prompts are read
        steps += 2 * (24 * (products + rest + 50e-6 + attention) + head)
    assert result.decode_s == pytest.approx(steps, rel=1e-12)

    assert result.throughput_tok_per_s == pytest.approx(8 * 3 / (result.prefill_s + result.decode_s), rel=1e-12)
    assert result.bottleneck == {"prefill": "gpu_compute", "decode": "gpu_compute"}
    assert set(result.bytes_moved.values()) == {0}
    # Weights with the embedding (the head is tied), the cache of 8 × 103 tokens, hidden states of 8 × 100 tokens, and
    # one batch's workspace: residual, norm and intermediate of 400 tokens.
    weights = (24 * (ATTENTION_PARAMS + MLP_PARAMS) + VOCAB * 1024) * 2
    cache = 8 * 103 * 24 * 2 * 1024 * 2
    workspace = max((2 * 1024 + 4096) * 400 * 2, 4 * VOCAB * (2 + 4) + 400 * 1024 * 2)
    assert result.peak_bytes["gpu"] == pytest.approx(weights + cache + 800 * 1024 * 2 + workspace, rel=1e-12)
    assert (result.peak_bytes["cpu"], result.peak_bytes["disk"]) == (0, 0)


def test_weights_and_cache_in_cpu_memory_with_attention_there_by_hand() -> None:
    # 3 batches of 2 prompts of 50 tokens, 4 generated: contexts 51, 52, 53. Links: 10 GB/s up, 8 GB/s down.
    policy = Policy.from_percent((0, 100, 0, 100, 0, 100), gpu_batch_size=2, num_gpu_batches=3, cpu_attention=True)
    hardware = machine(cpu_attention_bytes_per_s=20e9, cpu_attention_call_s=1e-4)
    result = cost(policy, hardware, Workload(prompt_len=50, gen_len=4))

    layers_and_head = (24 * 12 * H**2 + VOCAB * H) * 2
    hidden = 24 * 6 * 50 * 1024 * 2  # the hidden states of 300 tokens go up and down once a layer
    prefill_up, prefill_down = layers_and_head + hidden, hidden + 24 * 6 * 50 * 2 * 1024 * 2  # the new cache goes down
    compute = (
        24 * 3 * (2 * 12 * H**2 * 100 / 20e12 + 2 * 4 * 1024 * 50**2 / 5e12 + (12 * 1024 + 8192) * 100 * 2 / 250e9)
    )
    compute += 3 * (VOCAB * 1024 * 2 + 2 * VOCAB * 2) / 250e9
    assert result.prefill_s == pytest.approx(max(prefill_up / 10e9, prefill_down / 8e9, compute), rel=1e-12)
    assert result.prefill_s == pytest.approx(prefill_up / 10e9, rel=1e-12)  # the weights' load is the longest

    # A decode step: hidden states of one token, the query down (1024 values a prompt and layer), the result up.
    step_up = layers_and_head + 2 * 24 * 6 * 1024 * 2
    step_down = 24 * 6 * 1024 * 2 + 24 * 6 * 1024 * 2 + 24 * 6 * 2 * 1024 * 2
    on_gpu = 24 * 3 * (12 * H**2 * 2 / 250e9 + (12 * 1024 + 8192) * 2 * 2 / 250e9)
    on_gpu += 3 * (VOCAB * 1024 * 2 + 2 * VOCAB * 2) / 250e9
    decode = 0.0
    for context_len in (51, 52, 53):
        on_cpu = 24 * 6 * context_len * 2 * 1024 * 2 / 20e9 + 24 * 3 * 1e-4  # one call a layer and batch
        decode += max(step_up / 10e9, step_down / 8e9, on_gpu + on_cpu)
    assert result.decode_s == pytest.approx(decode, rel=1e-12)
    assert result.bytes_moved == pytest.approx(
        {
            "cpu_to_gpu": prefill_up + 3 * step_up,
            "gpu_to_cpu": prefill_down + 3 * step_down,
            "disk_read": 0,
            "disk_write": 0,
        },
        rel=1e-12,
    )
    assert result.busy_s["decode"]["cpu_compute"] == pytest.approx(
        24 * 6 * (51 + 52 + 53) * 4096 / 20e9 + 3 * 24 * 3 * 1e-4
    )

    # GPU: two buffers for the head (larger than a layer), two for a batch's hidden states, the workspace of a batch.
    # CPU: everything.
    buffers = 2 * VOCAB * H * 2 + 2 * 100 * 1024 * 2
    workspace = max((2 * 1024 + 4096) * 100 * 2, 2 * VOCAB * 6 + 100 * 1024 * 2)
    assert result.peak_bytes["gpu"] == pytest.approx(buffers + workspace, rel=1e-12)
    everything = layers_and_head + 6 * 54 * 24 * 4096 + 300 * 1024 * 2
    assert result.peak_bytes["cpu"] == pytest.approx(everything, rel=1e-12)
    assert result.peak_bytes["disk"] == 0


def test_everything_on_disk_in_four_bits_by_hand() -> None:
    # 1 batch of 8 prompts of 64 tokens, 3 generated (contexts 65 and 66). The disk reads 2 and writes 1 GB/s.
    policy = Policy.from_percent(
        (0, 0, 0, 0, 0, 0), gpu_batch_size=8, num_gpu_batches=1, compress_weights=True, compress_cache=True
    )
    hardware = machine(dequantize_values_per_s=20e9, unhidden_share=0.25)
    result = cost(policy, hardware, Workload(prompt_len=64, gen_len=3))

    four = 0.5625  # 4 bits, and 16 + 16 bits for each group of 64 values
    layers_and_head = 24 * 12 * H**2 * four + VOCAB * H * 2  # the head stays in 16 bits
    hidden = 24 * 8 * 64 * 1024 * 2
    new_cache = 24 * 8 * 64 * 2048 * four
    up, down, read, write = layers_and_head + hidden, hidden + new_cache, layers_and_head + hidden, hidden + new_cache
    compute = 24 * (2 * 12 * H**2 * 512 / 20e12 + 8 * 4 * 1024 * 64**2 / 5e12 + (12 * 1024 + 8192) * 512 * 2 / 250e9)
    compute += 24 * (12 * H**2 / 20e9 + 8 * 64 * 2048 / 20e9)  # weights expanded, new cache entries packed
    compute += (VOCAB * 1024 * 2 + 8 * VOCAB * 2) / 250e9
    # The processor waits for the hidden states of the only batch, both ways, and hides nothing meanwhile.
    waits = hidden / 10e9 + hidden / 8e9 + hidden / 2e9 + hidden / 1e9
    tracks = [compute, up / 10e9, down / 8e9, read / 2e9, write / 1e9]
    # A quarter of what the longest track hides lengthens the stage all the same.
    longest = max(compute + waits, *tracks[1:])
    assert result.prefill_s == pytest.approx(0.75 * longest + 0.25 * sum(tracks), rel=1e-12)

    decode, moved = 0.0, {"up": up, "down": down, "read": read, "write": write}
    for context_len in (65, 66):
        hidden, cached, token = 24 * 8 * 1024 * 2, 24 * 8 * context_len * 2048 * four, 24 * 8 * 2048 * four
        up, down = layers_and_head + hidden + cached, hidden + token
        read, write = layers_and_head + hidden + cached, hidden + token
        compute = 24 * (12 * H**2 * 2 / 250e9 + (12 * 1024 + 8192) * 8 * 2 / 250e9 + 12 * H**2 / 20e9)
        # The GPU reads K and V in 16 bits after expanding them; one token a prompt is packed.
        compute += 24 * 8 * (context_len * (2048 * 2 / 250e9 + 2048 / 20e9) + 2048 / 20e9)
        compute += (VOCAB * 1024 * 2 + 8 * VOCAB * 2) / 250e9
        tracks = [compute, up / 10e9, down / 8e9, read / 2e9, write / 1e9]
        waits = hidden / 10e9 + hidden / 8e9 + hidden / 2e9 + hidden / 1e9
        decode += 0.75 * max(compute + waits, *tracks[1:]) + 0.25 * sum(tracks)
        for name, volume in (("up", up), ("down", down), ("read", read), ("write", write)):
            moved[name] += volume
    assert result.decode_s == pytest.approx(decode, rel=1e-12)
    assert list(result.bytes_moved.values()) == pytest.approx(list(moved.values()), rel=1e-12)
    assert result.bottleneck == {"prefill": "disk_read", "decode": "disk_read"}

    total = layers_and_head + 24 * 8 * 67 * 2048 * four + 8 * 64 * 1024 * 2
    assert result.peak_bytes["disk"] == pytest.approx(total, rel=1e-12)
    # CPU: two buffers for the head, for one batch's cache of a layer and for its hidden states.
    buffers = 2 * VOCAB * H * 2 + 2 * 8 * 67 * 2048 * four
    assert result.peak_bytes["cpu"] == pytest.approx(buffers + 2 * 8 * 64 * 1024 * 2, rel=1e-12)
    # GPU in prefill: buffers for head and hidden states, a layer in 16 bits, the workspace with its 16-bit cache.
    prefill = (
        2 * VOCAB * H * 2 + 2 * 8 * 64 * 1024 * 2 + 12 * H**2 * 2 + 8 * ((2 * 1024 + 4096) * 64 * 2 + 2048 * 64 * 2)
    )
    # In decode: also a batch's packed cache twice; the workspace holds the whole cache of a layer in 16 bits.
    work = max((2 * 1024 + 4096) * 2 + 2048 * 67 * 2, VOCAB * 6 + 1024 * 2)
    decode = 2 * VOCAB * H * 2 + 2 * 8 * 1024 * 2 + 12 * H**2 * 2 + 2 * 8 * 67 * 2048 * four + 8 * work
    assert result.peak_bytes["gpu"] == pytest.approx(max(prefill, decode), rel=1e-12)


def test_loads_beside_the_first_batch_by_hand() -> None:
    # 4 batches of 1 prompt; attention and MLP are stages of their own: while one computes, the other's weights come,
    # all of them beside the first batch. Weights in CPU memory, all else on the GPU, so the link carries weights only.
    policy = Policy.from_percent((0, 100, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=4)
    hardware = machine(weight_loads="first batch", stages="attention and mlp")
    result = cost(policy, hardware, Workload(prompt_len=512, gen_len=1))
    load = (24 * 12 * H**2 + VOCAB * H) * 2 / 10e9
    attention = 24 * (2 * ATTENTION_PARAMS * 512 / 20e12 + 4 * 1024 * 512**2 / 5e12)
    mlp = 24 * (2 * MLP_PARAMS * 512 / 20e12 + (12 * 1024 + 8192) * 512 * 2 / 250e9)
    mlp += (VOCAB * 1024 * 2 + VOCAB * 2) / 250e9
    # A third of the layers' parameters is attention's. Its stage carries the MLP's load, and the other way round.
    expected = max(attention, load * 2 / 3) + 3 * attention + max(mlp, load / 3) + 3 * mlp
    assert attention < load * 2 / 3
    assert mlp < load / 3
    assert result.prefill_s == pytest.approx(expected, rel=1e-12)
    # Spread over the batches, the same loads hide behind computing altogether.
    spread = cost(policy, machine(stages="attention and mlp"), Workload(prompt_len=512, gen_len=1)).prefill_s
    assert spread == pytest.approx(max(4 * attention, load * 2 / 3) + max(4 * mlp, load / 3), rel=1e-12)


def test_latency_is_paid_for_each_transfer() -> None:
    # Nothing is as slow as a link with a second of latency: one transfer a layer for the weights of a block; one a
    # layer and batch for the cache, and one for the hidden states.
    slow = Links(
        cpu_to_gpu=link(1e15, latency_s=1.0),
        gpu_to_cpu=link(1e15),
        disk_read=link(1e15),
        disk_write=link(1e15),
    )
    workload, hardware = Workload(prompt_len=1, gen_len=1), machine(links=slow)
    shape = {"gpu_batch_size": 7, "num_gpu_batches": 5}
    weights = cost(Policy.from_percent((0, 100, 100, 0, 100, 0), **shape), hardware, workload)
    hidden = cost(Policy.from_percent((100, 0, 100, 0, 0, 100), **shape), hardware, workload)
    half = cost(Policy.from_percent((100, 0, 100, 0, 50, 50), **shape), hardware, workload)
    assert weights.prefill_s == pytest.approx(24, rel=1e-3)
    assert hidden.prefill_s == pytest.approx(24 * 5, rel=1e-3)
    assert half.prefill_s == pytest.approx(24 * 5, rel=1e-3)  # a transfer takes as long however little it brings


def test_the_engine_that_blocks_on_pageable_copies_by_hand() -> None:
    # One prompt, cache in CPU memory. The thread that launches kernels copies K, then V, to a pinned buffer at 1 GB/s
    # and nothing runs meanwhile, except that K crosses the link: V's crossing, at 10 GB/s, is left for later.
    policy = Policy.from_percent((100, 0, 0, 100, 100, 0), gpu_batch_size=1, num_gpu_batches=1)
    links = dataclasses.replace(machine().links, cpu_to_gpu=link(10e9, cache_bytes_per_s=1e9))
    workload = Workload(prompt_len=1000, gen_len=2)
    blocking = cost(policy, machine(links=links, cache_loads="blocking"), workload)
    free = cost(policy, machine(links=links), workload)
    copied = 24 * 1001 * 2048 * 2
    layers = 24 * (12 * H**2 * 2 + (12 * 1024 + 8192) * 2 + 1001 * 2048 * 2) / 250e9
    head = (VOCAB * H * 2 + VOCAB * 2) / 250e9  # which no cache is copied beside
    assert free.decode_s == pytest.approx(max(copied / 1e9, layers) + head, rel=1e-12)
    assert blocking.decode_s == pytest.approx(copied / 1e9 + max(layers, copied / 2 / 10e9) + head, rel=1e-12)
    # The bytes that cross the link are those of the cache, however the copy is done.
    assert blocking.bytes_moved["cpu_to_gpu"] == free.bytes_moved["cpu_to_gpu"] == copied


def test_a_cpu_machine_reads_its_disk_straight_into_the_first_tier() -> None:
    policy = Policy.from_percent((0, 0, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1)
    workload = Workload(prompt_len=1, gen_len=1)
    cuda, cpu = (cost(policy, machine(kind=kind), workload) for kind in ("cuda", "cpu"))
    weights = (24 * 12 * H**2 + VOCAB * H) * 2
    assert cuda.bytes_moved["disk_read"] == cpu.bytes_moved["disk_read"] == weights
    assert (cuda.bytes_moved["cpu_to_gpu"], cpu.bytes_moved["cpu_to_gpu"]) == (weights, 0)
    assert (cuda.peak_bytes["cpu"], cpu.peak_bytes["cpu"]) == (2 * VOCAB * H * 2, 0)


def test_logits_of_every_position_cost_time_and_memory() -> None:
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=1)
    last, every = (
        cost(policy, machine(prefill_logits=which), Workload(prompt_len=100, gen_len=1)) for which in ("last", "all")
    )
    flops_s = 2 * VOCAB * H * 200 / 20e12
    traffic_s = (VOCAB * H * 2 + 200 * VOCAB * 2) / 250e9
    once_s = (VOCAB * H * 2 + 2 * VOCAB * 2) / 250e9
    assert every.prefill_s - last.prefill_s == pytest.approx(max(flops_s, traffic_s) - once_s, rel=1e-9)
    layer, last_row, all_rows = (2 * H + 4 * H) * 200 * 2, 2 * VOCAB * 6, VOCAB * (200 * 2 + 2 * 4)
    states = 200 * H * 2
    assert every.peak_bytes["gpu"] - last.peak_bytes["gpu"] == pytest.approx(
        max(layer, all_rows + states) - max(layer, last_row + states)
    )


def test_stored_scores_need_memory_and_a_causal_kernel_half_the_time() -> None:
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=1)
    workload = Workload(prompt_len=1000, gen_len=1)
    fused, stored = (cost(policy, machine(attention_scores=how), workload) for how in ("fused", "stored"))
    assert stored.prefill_s == fused.prefill_s
    assert stored.peak_bytes["gpu"] - fused.peak_bytes["gpu"] == pytest.approx(2 * 2 * 16 * 1000**2 * 2)
    half = cost(policy, machine(attention_causal_share=0.5), workload)
    assert fused.prefill_s - half.prefill_s == pytest.approx(0.5 * 24 * 2 * 4 * 1024 * 1000**2 / 5e12)


def test_the_matrix_rate_is_that_of_the_batch() -> None:
    # The products of a batch have gpu_batch_size × tokens rows: 64 in prefill here, between the knots 16 and 256.
    curve = rate(20e12, (16, 2e12), (256, 10e12))
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=1)
    measured, constant = (
        cost(policy, machine(matmul=matmul), Workload(prompt_len=32, gen_len=1)) for matmul in (curve, rate(6e12))
    )
    assert measured.prefill_s == pytest.approx(constant.prefill_s, rel=1e-12)  # halfway in log(rows): 6 TFLOP/s


def test_grouped_heads_and_a_gated_mlp_by_hand() -> None:
    # 16 query heads of 64 share 4 kv heads: K and V have 2 × 256 values a token. Gate, up and down: 3 h × ffn.
    model = plain_model(num_kv_heads=4, gated_mlp=True, ffn_size=2816)
    policy = Policy.from_percent((0, 100, 0, 100, 100, 0), gpu_batch_size=1, num_gpu_batches=1)
    result = cost(policy, machine(), Workload(prompt_len=10, gen_len=2), model)
    attention, mlp = 2 * H * H + 2 * H * 256, 3 * H * 2816
    weights = (24 * (attention + mlp) + VOCAB * H) * 2
    assert result.bytes_moved["cpu_to_gpu"] == 2 * weights + 24 * 11 * 512 * 2
    assert result.bytes_moved["gpu_to_cpu"] == 24 * 11 * 512 * 2
    assert result.peak_bytes["cpu"] == weights + 24 * 12 * 512 * 2


# ------------------------------------------------------------------ a second program, written from docs/cost-model.md


def by_the_text(policy: Policy, hardware: Hardware, model: ModelSpec, workload: Workload) -> dict[str, Any]:
    """Seconds, peaks and bytes moved of any policy."""
    g, k, layers, h = policy.gpu_batch_size, policy.num_gpu_batches, model.num_layers, model.hidden_size
    prompts, s, n = g * k, workload.prompt_len, workload.gen_len
    w, c, a = policy.weights, policy.cache, policy.activations
    gpu, cpu, links, engine = hardware.gpu, hardware.cpu, hardware.links, hardware.engine
    bandwidth, expand = gpu.memory_bytes_per_s.effective, gpu.dequantize_values_per_s.effective
    round_off = expand if gpu.quantize_values_per_s is None else gpu.quantize_values_per_s.effective
    straight = gpu.kind in ("cpu", "metal")
    query, kv = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    attention_params = 2 * h * query + h * kv
    mlp_params = (3 if model.gated_mlp else 2) * h * model.ffn_size
    vectors = model.layer_vector_params
    weight_value, cache_value = (0.5625 if on else 2.0 for on in (policy.compress_weights, policy.compress_cache))
    layer_bytes = (attention_params + mlp_params) * weight_value + vectors * 2
    head_bytes = (model.vocab_size * h + model.norm_vectors * h) * 2
    streamed = layers * layer_bytes + head_bytes

    def up(amount: Any) -> float:
        return amount.cpu if straight else amount.cpu + amount.disk

    def count(split: Split) -> SimpleNamespace:
        """1 for each tier that holds anything."""
        return SimpleNamespace(**{tier: float(getattr(split, tier) > 0) for tier in TIERS})

    c_used, a_used = count(c), count(a)
    in_place = straight and policy.cpu_attention
    cached_up, cached_up_calls = (0.0 if in_place else up(one) for one in (c, c_used))

    def at_once(tokens: int) -> int:
        limit = engine.prefill_rows
        return g if tokens == 1 or limit is None else min(g, max(1, limit // tokens))

    shrunk = gpu.compressed_launch_share.effective if policy.compress_weights and gpu.compressed_launch_share else 1.0
    launch = gpu.layer_launch_s.effective * shrunk

    def products(params: int, tokens: int) -> float:
        """Of one batch and layer."""
        if policy.compress_weights and gpu.compressed_matmul_flops_per_s is not None:
            rate = gpu.compressed_matmul_flops_per_s.at(at_once(tokens) * tokens)
            return 2 * params * g * tokens / rate + launch / 2 * g / at_once(tokens)
        compute = 2 * params * g * tokens / gpu.matmul_flops_per_s.at(at_once(tokens) * tokens)
        once = launch / 2 + (params / expand if policy.compress_weights else 0)
        return max(compute, params * 2 / bandwidth * g / at_once(tokens)) + once * g / at_once(tokens)

    def head(rows: int) -> float:
        """Of one batch."""
        compute = 2 * model.vocab_size * h * g * rows / gpu.matmul_flops_per_s.at(g * rows)
        traffic = (head_bytes + g * rows * model.vocab_size * 2) / bandwidth
        return max(compute, traffic) + gpu.layer_launch_s.effective

    def one_pass(tokens: int, context_len: int | None) -> tuple[float, dict[str, float]]:
        """Seconds of one pass of the block, and bytes over the links; prefill where there is no context."""
        prefill = context_len is None
        seconds = {
            part: dict.fromkeys(("compute", "up", "down", "read", "write"), 0.0) for part in ("attention", "mlp")
        }
        moved = dict.fromkeys(("up", "down", "read", "write"), 0.0)
        waited = 0.0

        def move(part: str, name: str, volume: float, bytes_per_s: float, transfers: float, latency_s: float) -> None:
            moved[name] += volume
            seconds[part][name] += volume / bytes_per_s + transfers * latency_s

        one = seconds["attention"]
        one["compute"] += k * layers * products(attention_params, tokens)
        if policy.compress_cache:
            one["compute"] += layers * prompts * tokens * kv / round_off
        new_bytes = layers * prompts * tokens * kv * cache_value
        wires = {name: getattr(links, path) for name, path in PATHS.items()}
        move("attention", "down", new_bytes * cached_up, wires["down"].for_cache.effective, 0, 0)
        move("attention", "write", new_bytes * c.disk, wires["write"].for_cache.effective, 0, 0)
        if prefill:
            flops = 4 * query * tokens**2 * engine.attention_causal_share.effective
            one["compute"] += layers * prompts * flops / gpu.attention_flops_per_s.at(tokens)
        else:
            cached = layers * prompts * context_len * kv
            read = 2 * cached / bandwidth
            flops = layers * prompts * 4 * query * context_len / gpu.matmul_flops_per_s.effective
            on_gpu = max(read, flops) + (cached / expand if policy.compress_cache else 0)
            one["compute"] += c.gpu * on_gpu
            carried, carried_calls = (one.disk if policy.cpu_attention else one.cpu + one.disk for one in (c, c_used))
            seen, further = 1.0, c_used.gpu + c_used.cpu + c_used.disk - 1
            if policy.cpu_attention and not straight:
                carried, carried_calls, seen, further = 0.0, 0.0, c_used.gpu, 0.0
            if policy.compress_cache and gpu.compressed_call_s is not None:
                one["compute"] += layers * k * seen * gpu.compressed_call_s.effective * shrunk
            if gpu.carried_call_s is not None:
                one["compute"] += layers * k * carried_calls * gpu.carried_call_s.effective * shrunk
            part_call = gpu.compressed_part_call_s if policy.compress_cache else gpu.part_call_s
            if part_call is not None:
                one["compute"] += layers * k * further * part_call.effective * shrunk
            if gpu.gather_bytes_per_s is not None:
                singles = layers * prompts * (context_len - s) * kv * 2
                one["compute"] += carried * singles / gpu.gather_bytes_per_s.effective
            move("attention", "read", cached * cache_value * c.disk, wires["read"].for_cache.effective, 0, 0)
            if policy.cpu_attention:
                off = c.cpu + c.disk
                one["compute"] += off * 2 * cached / cpu.attention_bytes_per_s.effective
                if policy.compress_cache:
                    one["compute"] += off * cached / cpu.dequantize_values_per_s.effective
                if cpu.attention_call_s is not None:
                    one["compute"] += layers * k * (c_used.cpu + c_used.disk) * cpu.attention_call_s.effective
                vectors_bytes = 0 if straight else layers * prompts * query * 2 * off
                move("attention", "down", vectors_bytes, wires["down"].bytes_per_s.effective, 0, 0)
                move("attention", "up", vectors_bytes, wires["up"].bytes_per_s.effective, 0, 0)
            elif engine.cache_loads == "blocking":
                one["compute"] += (c.cpu + c.disk) * on_gpu
                waited = cached * cache_value * c.cpu / wires["up"].for_cache.effective
                later = cached * cache_value * (up(c) - c.cpu / 2)
                one["up"] += later / wires["up"].bytes_per_s.effective
                moved["up"] += cached * cache_value * up(c)
            else:
                one["compute"] += (c.cpu + c.disk) * on_gpu
                move("attention", "up", cached * cache_value * up(c), wires["up"].for_cache.effective, 0, 0)
        for name, amount in (
            ("up", cached_up_calls + up(a_used)),
            ("down", cached_up_calls + up(a_used)),
            ("read", c_used.disk + a_used.disk),
            ("write", c_used.disk + a_used.disk),
        ):
            move("attention", name, 0, 1, layers * k * amount, wires[name].latency_s.effective)
        two = seconds["mlp"]
        two["compute"] += k * layers * products(mlp_params, tokens)
        elementwise = 12 * h + 2 * model.ffn_size * (2 if model.gated_mlp else 1)
        two["compute"] += layers * prompts * tokens * elementwise * 2 / bandwidth
        last = dict.fromkeys(two, 0.0) | {
            "compute": k * head(tokens if prefill and engine.prefill_logits == "all" else 1)
        }
        hidden = layers * prompts * tokens * h * 2
        for name, amount in (("up", up(a)), ("down", up(a)), ("read", a.disk), ("write", a.disk)):
            move("mlp", name, hidden * amount, wires[name].bytes_per_s.effective, 0, 0)
        # The only batch waits for its hidden states both ways, the second of two for the way back.
        ways = {1: ("up", "down", "read", "write"), 2: ("up", "read") if engine.weight_loads == "spread" else ()}
        idle_s = 0.0
        for name in ways.get(k, ()):
            amount, calls = ({"up": up(one), "down": up(one)}.get(name, one.disk) for one in (a, a_used))
            if name in ("read", "write") or not straight:
                idle_s += hidden * amount / wires[name].bytes_per_s.effective
                idle_s += layers * k * calls * wires[name].latency_s.effective
        loads = {"up": up(w), "read": w.disk}
        for name, share in loads.items():
            moved[name] += streamed * share
        layer_load_s = {
            name: share * layers * (layer_bytes / wires[name].bytes_per_s.effective + wires[name].latency_s.effective)
            for name, share in loads.items()
        }
        head_load_s = {name: share * head_bytes / wires[name].bytes_per_s.effective for name, share in loads.items()}

        def both(x: dict[str, float], y: dict[str, float], a: float = 1.0, b: float = 1.0) -> dict[str, float]:
            return {name: a * x[name] + b * y[name] for name in x}

        # Each stage loads the next one's weights: the last layer the head's, the head those of the first layer.
        first, n = 1 - attention_params / (attention_params + mlp_params), layers
        load_s, layer = both(layer_load_s, head_load_s), both(one, two)
        parts = [
            (one, both(load_s, load_s, first, 0), 0.0),
            (both(two, last), both(load_s, load_s, 1 - first, 0), idle_s),
        ]
        if engine.stages == "layer":
            parts = [
                (
                    both(layer, layer, (n - 1) / n, 0),
                    both(layer_load_s, layer_load_s, (n - 1) / n, 0),
                    idle_s * (n - 1) / n,
                ),
                (both(layer, layer, 1 / n, 0), head_load_s, idle_s / n),
                (last, both(layer_load_s, layer_load_s, 1 / n, 0), 0.0),
            ]
        return waited + sum(stage(*part) for part in parts), moved

    def stage(work: dict[str, float], load: dict[str, float], idle: float) -> float:
        everything = sum(work.values()) + sum(load.values())
        if straight:  # the cores that compute copy between the memory tiers
            cores = ("compute", "up", "down")
            work, load = (
                {"compute": sum(part.get(name, 0) for name in cores)}
                | {name: seconds for name, seconds in part.items() if name not in cores}
                for part in (work, load)
            )
        if not policy.overlap:
            return everything
        lasts = {**work, "compute": work["compute"] + idle}
        if engine.weight_loads == "spread":
            longest = max(lasts[name] + load.get(name, 0) for name in work)
        else:
            first = max(lasts[name] / k + load.get(name, 0) for name in work)
            longest = first + (k - 1) / k * max(lasts.values())
        unhidden = engine.unhidden_share.effective
        return (1 - unhidden) * longest + unhidden * everything

    prefill_s, moved = one_pass(s, None)
    decode_s = 0.0
    for step in range(1, n):
        seconds, volumes = one_pass(1, s + step)
        decode_s += seconds
        moved = {name: moved[name] + volumes[name] for name in moved}

    buffer = 2 * max(layer_bytes, head_bytes)
    matrix = 0 if model.tied_head else model.vocab_size * h
    stored = layers * layer_bytes + (model.vocab_size * h + matrix + model.norm_vectors * h) * 2
    batch_cache = 2 * g * (s + n) * kv * cache_value

    def workspace(tokens: int, *, prefill: bool) -> float:
        inner, some = model.ffn_size * (2 if model.gated_mlp else 1), at_once(tokens)
        wide = some * max(2 * h + 2 * query + kv, 2 * h + inner) * tokens * 2
        if engine.expanded == "pieces":
            # attention's output, sum, norm, intermediate, output
            wide = some * (query + 2 * h + max(inner, model.ffn_size + h)) * tokens * 2
            if tokens == 1:  # fp32 scores, their softmax, and that in 16 bits
                attending = some * model.num_heads * (s + n) * 10
            else:  # q, output, k, v, perhaps k and v for every head; q, k, scores, softmax, output of some heads
                shared = model.num_kv_heads != model.num_heads
                block = min(128, tokens)
                rows = min(some * model.num_heads, max(1, 2**21 // (block * tokens)))
                each = model.head_dim * (2 * tokens + block) + 2 * block * tokens
                attending = 2 * (some * tokens * (query * (4 if shared else 2) + kv) + rows * each)
            wide = max(wide, attending) * (1 if tokens == 1 else 1.35)
        if prefill and engine.attention_scores == "stored":
            wide += some * 2 * model.num_heads * tokens**2 * 2
        if policy.compress_cache and engine.expanded == "layer and cache":
            wide += some * kv * (tokens if prefill else s + n) * 2
        rows = tokens if prefill and engine.prefill_logits == "all" else 1
        return max(wide, some * (model.vocab_size * (rows * 2 + 4) + h * tokens * 2))

    peaks = dict.fromkeys(TIERS, 0.0)
    for tokens, prefill in ((s, True), (1, False)):
        states = prompts * tokens * h * 2
        held = {
            tier: getattr(w, tier) * stored
            + getattr(c, tier) * prompts * (s + n) * kv * cache_value * layers
            + getattr(a, tier) * states
            for tier in TIERS
        }
        batch_states = 2 * g * tokens * h * 2
        held["gpu"] += (w.cpu + w.disk) * buffer + (a.cpu + a.disk) * batch_states
        held["gpu"] += workspace(tokens, prefill=prefill)
        expanded = {
            "layer and cache": attention_params + mlp_params,
            "matrix": h * max(query, model.ffn_size),
            "pieces": min(2**21, h * max(query, model.ffn_size)) * 5 / 4,
        }
        if engine.expanded == "pieces":  # up to 64 rows are multiplied by 4-bit weights as they lie
            multiplied = [g, *[at_once(s) * s] * ((s > 1) + (s > 1 and at_once(s) < g))]
            compiled = [rows for rows in multiplied if rows > 64 or not policy.compress_weights]
            held["gpu"] += (1 + 2 * len(compiled) + 2.5 * sum(vars(c_used).values())) * 2**20
            expanded["pieces"] *= at_once(tokens) * tokens > 64
        held["gpu"] += expanded[engine.expanded] * 2 if policy.compress_weights else 0
        buffered = not prefill or engine.buffers == "always"
        if buffered and not policy.cpu_attention:
            held["gpu"] += (c.cpu + c.disk) * batch_cache
        if buffered and policy.cpu_attention and straight:
            held["gpu"] += c.disk * batch_cache
        if not straight:
            held["cpu"] += w.disk * buffer + c.disk * batch_cache + a.disk * batch_states
        peaks = {tier: max(peaks[tier], held[tier]) for tier in TIERS}
    return {"prefill_s": prefill_s, "decode_s": decode_s, "peaks": peaks, "moved": list(moved.values())}


PATHS = {"up": "cpu_to_gpu", "down": "gpu_to_cpu", "read": "disk_read", "write": "disk_write"}


@settings(max_examples=200)
@given(rng=RANDOMS)
def test_any_policy_costs_what_the_text_says(rng: random.Random) -> None:
    model = any_model(rng)
    hardware = any_machine(rng, gpu_bytes=16e9, cpu_bytes=64e9, disk_bytes=1e12)
    switches = any_switches(rng, get("roofline"), hardware)
    weights, cache, activations = any_splits(rng)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=rng.choice([1, 3, 64]),
        num_gpu_batches=rng.choice([1, 2, 15]),
        **dataclasses.asdict(switches),
    )
    workload = Workload(prompt_len=rng.choice([1, 33, 512]), gen_len=rng.choice([1, 2, 7]))
    result, expected = cost(policy, hardware, workload, model), by_the_text(policy, hardware, model, workload)
    assert result.prefill_s == pytest.approx(expected["prefill_s"], rel=1e-9)
    assert result.decode_s == pytest.approx(expected["decode_s"], rel=1e-9)
    assert result.peak_bytes == pytest.approx(expected["peaks"], rel=1e-9)
    assert list(result.bytes_moved.values()) == pytest.approx(expected["moved"], rel=1e-9)


# ------------------------------------------------------------------ what must hold on any machine


def test_the_cache_grows_step_by_step() -> None:
    # A stage lasts max(weights, cache): where the two cross during generation, the mean context understates.
    policy = Policy.from_percent((0, 100, 0, 100, 100, 0), gpu_batch_size=64, num_gpu_batches=1)
    hardware = machine(links=Links(cpu_to_gpu=link(10e9), gpu_to_cpu=link(1e12), disk_read=link(1), disk_write=link(1)))
    model, workload = plain_model(), Workload(prompt_len=1, gen_len=401)
    weights, token = (24 * 12 * H**2 + VOCAB * H) * 2 / 10e9, 64 * 24 * 2048 * 2 / 10e9
    result = cost(policy, hardware, workload, model)
    # Both go up the link: weights + cache; computing is far below.
    assert result.decode_s == pytest.approx(sum(weights + token * (1 + i) for i in range(1, 401)), rel=1e-9)
    attends_there = policy.replace(cpu_attention=True)
    on_cpu = machine(cpu_attention_bytes_per_s=10e9, memory_bytes_per_s=1e15, matmul=rate(1e18), links=hardware.links)
    result = cost(attends_there, on_cpu, workload, model)
    layer, head, vectors = 12 * H**2 * 2 / 10e9, VOCAB * H * 2 / 10e9, 64 * 1024 * 2 / 10e9

    def step(cached: float) -> float:
        """23 layers hide the next one's weights, the last one the head's, and the head those of the first."""
        attended = token * cached / 24
        return 23 * max(layer + vectors, attended) + max(head + vectors, attended) + layer

    exact = sum(step(1 + i) for i in range(1, 401))
    assert result.decode_s == pytest.approx(exact, rel=1e-3)
    assert 400 * step(201.5) < 0.97 * exact


def test_the_only_layer_hides_the_heads_weights_and_the_head_its_own() -> None:
    model, workload = plain_model(num_layers=1), Workload(prompt_len=1, gen_len=2)
    policy = Policy.from_percent((0, 100, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1)
    layer, head = 12 * H**2 * 2 / 10e9, VOCAB * H * 2 / 10e9
    links = Links(**dict.fromkeys(("cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write"), link(10e9)))
    result = cost(policy, machine(memory_bytes_per_s=1e15, matmul=rate(1e15), links=links), workload, model)
    assert result.decode_s == pytest.approx(layer + head, rel=1e-3)


def test_the_last_layer_hides_the_heads_weights_and_the_head_those_of_the_first() -> None:
    # A layer computes for 24 µs and its weights take 2.5 ms; those of the head take 10 ms.
    policy = Policy.from_percent((0, 100, 100, 0, 100, 0), gpu_batch_size=1, num_gpu_batches=1)
    hardware = machine(
        memory_bytes_per_s=1e15,
        matmul=rate(1e15),
        links=Links(**dict.fromkeys(("cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write"), link(10e9))),
    )
    model, workload = plain_model(), Workload(prompt_len=1, gen_len=2)
    layer, head = 12 * H**2 * 2 / 10e9, VOCAB * H * 2 / 10e9
    assert cost(policy, hardware, workload, model).decode_s == pytest.approx(24 * layer + head, rel=1e-3)
    # Where a layer computes for longer than its own load but not for as long as the head's, that one shows.
    slow = machine(memory_bytes_per_s=1e15, matmul=rate(2 * 12 * H**2 / (2 * layer)), links=hardware.links)
    computed = 2 * layer
    head_computed = computed * VOCAB / (12 * H)
    assert head > computed
    expected = 23 * computed + head + max(head_computed, layer)
    assert cost(policy, slow, workload, model).decode_s == pytest.approx(expected, rel=1e-3)


@settings(max_examples=80)
@given(rng=RANDOMS)
def test_overlap_is_never_slower(rng: random.Random) -> None:
    policy, hardware, model, workload = any_case(rng)
    overlapped, plain = (cost(policy.replace(overlap=on), hardware, workload, model) for on in (True, False))
    assert overlapped.latency_s <= plain.latency_s * (1 + 1e-12)
    assert overlapped.peak_bytes == plain.peak_bytes
    assert overlapped.bytes_moved == pytest.approx(plain.bytes_moved, rel=1e-9)
    # Without overlap, the time is the sum of what every resource is busy with.
    busy = [sum(plain.busy_s[phase].values()) for phase in ("prefill", "decode")]
    assert [plain.prefill_s, plain.decode_s] == pytest.approx(busy, rel=1e-9)
    # With it, no resource is busy for longer than its phase.
    for phase, seconds in (("prefill", overlapped.prefill_s), ("decode", overlapped.decode_s)):
        for resource, share in overlapped.busy_share(phase).items():
            assert share * seconds <= seconds * (1 + 1e-9), (phase, resource)


@settings(max_examples=80)
@given(rng=RANDOMS)
def test_compression_never_moves_or_stores_more(rng: random.Random) -> None:
    policy, hardware, model, workload = any_case(rng, cpu_attention=False)
    for name in ("compress_weights", "compress_cache"):
        plain, packed = (cost(policy.replace(**{name: on}), hardware, workload, model) for on in (False, True))
        for moved in plain.bytes_moved:
            assert packed.bytes_moved[moved] <= plain.bytes_moved[moved] * (1 + 1e-12), (name, moved)
        # (The GPU's peak may rise: what is expanded there needs room.)
        for tier in ("cpu", "disk"):
            assert packed.peak_bytes[tier] <= plain.peak_bytes[tier] * (1 + 1e-12), (name, tier)


def any_case(rng: random.Random, **fixed: bool) -> tuple[Policy, Hardware, ModelSpec, Workload]:
    """A policy on a machine that allows it."""
    hardware = any_machine(rng, gpu_bytes=16e9, cpu_bytes=64e9, disk_bytes=1e12)
    switches = dataclasses.replace(any_switches(rng, get("roofline"), hardware), **fixed)
    assume(get("roofline").refusal(switches, hardware) is None)
    weights, cache, activations = any_splits(rng)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        gpu_batch_size=rng.randint(1, 60),
        num_gpu_batches=rng.randint(1, 12),
        **dataclasses.asdict(switches),
    )
    return policy, hardware, any_model(rng), Workload(prompt_len=rng.choice([1, 100]), gen_len=rng.choice([1, 2, 9]))


BETTER = [
    "gpu.memory_bytes",
    "cpu.memory_bytes",
    "disk.memory_bytes",
    "gpu.memory_bytes_per_s",
    "gpu.matmul_flops_per_s",
    "gpu.attention_flops_per_s",
    "gpu.dequantize_values_per_s",
    "gpu.gather_bytes_per_s",
    "gpu.quantize_values_per_s",
    "cpu.attention_bytes_per_s",
    "cpu.dequantize_values_per_s",
    *(f"links.{name}.{rate}" for name in PATHS.values() for rate in ("bytes_per_s", "cache_bytes_per_s")),
]


@pytest.mark.parametrize("name", FORMULATIONS)
@settings(max_examples=80)
@given(rng=RANDOMS, path=st.sampled_from(BETTER), factor=st.floats(1.01, 5))
def test_a_better_machine_never_lowers_the_optimum(name: str, rng: random.Random, path: str, factor: float) -> None:
    problem = any_problem(rng, name)
    owner: Any = problem.hardware
    for step in path.split("."):
        owner = getattr(owner, step)
    assume(owner is not None)
    better = problem.hardware.raised(path, owner.effective * (factor - 1))
    raised = dataclasses.replace(problem, hardware=better, limits=better.capacity_bytes)
    switches, shape = problem.switches[0], Shape.exactly(rng.randint(1, 20), rng.randint(1, 8))
    before, after = (solve(p.question(switches, shape, segments=1000)) for p in (problem, raised))
    if before is not None:
        assert after is not None
        assert after.seconds_per_prompt <= before.seconds_per_prompt * (1 + 1e-7)


@pytest.mark.parametrize("prompts", [1, 16])
@pytest.mark.parametrize("size", [1, 8])
def test_prompts_in_one_batch_share_what_a_batch_does_once(prompts: int, size: int) -> None:
    hardware = machine(layer_launch_s=1e-3)
    policy = Policy.from_percent((100, 0, 100, 0, 100, 0), gpu_batch_size=size, num_gpu_batches=prompts)
    result = cost(policy, hardware, Workload(prompt_len=1, gen_len=1))
    launches = prompts * (24 + 1) * 1e-3  # every layer and the head, once a batch
    free = cost(policy, machine(), Workload(prompt_len=1, gen_len=1))
    assert result.prefill_s - free.prefill_s == pytest.approx(launches, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "cpu_attention", "carried", "further", "gathered"),
    [
        # Half of the cache stays, a quarter is in host memory and a quarter on disk.
        ("cuda", False, 2, 2, 0.5),
        ("cuda", True, 0, 0, 0.0),  # the CPU attends to what the GPU does not hold
        ("cpu", False, 2, 2, 0.5),
        ("cpu", True, 1, 2, 0.25),  # host memory is attended to in place
    ],
)
def test_carried_and_4_bit_caches_take_time_of_their_own(
    kind: str, cpu_attention: bool, carried: int, further: int, gathered: float
) -> None:
    extra = {
        "compressed_call_s": 1e-3,
        "carried_call_s": 2e-3,
        "compressed_part_call_s": 3e-4,
        "part_call_s": 7.0,  # of a cache in 16 bits
        "gather_bytes_per_s": 1e9,
    }
    policy = Policy.from_percent(
        (100, 0, 50, 25, 100, 0),
        gpu_batch_size=4,
        num_gpu_batches=3,
        compress_cache=True,
        cpu_attention=cpu_attention,
        overlap=False,
    )
    workload = Workload(prompt_len=100, gen_len=3)
    with_it, without = (cost(policy, machine(kind=kind, **more), workload) for more in (extra, {}))
    # 24 layers, 3 batches, 2 steps; a call is a whole one for a quarter of a batch. The prompt of 100 tokens came in
    # one piece, then 1 and 2 tokens by themselves.
    expected = 24 * 3 * 2 * (1e-3 + carried * 2e-3 + further * 3e-4)
    expected += gathered * 24 * 12 * (1 + 2) * 2 * 1024 * 2 / 1e9
    assert with_it.decode_s - without.decode_s == pytest.approx(expected, rel=1e-9)
    assert with_it.prefill_s == without.prefill_s


def test_beside_4_bit_weights_launches_and_calls_take_their_share() -> None:
    """Of two batches in 24 layers and 3 steps of decode: 2 ms a launch, 1 ms a carried cache, 40 % of both."""
    workload = Workload(prompt_len=100, gen_len=4)
    policy = Policy.from_percent((100, 0, 0, 0, 100, 0), gpu_batch_size=2, num_gpu_batches=2, overlap=False)
    extra: dict[str, Any] = {"layer_launch_s": 2e-3, "carried_call_s": 1e-3}
    for compressed, left in ((False, 1.0), (True, 0.4)):
        one = dataclasses.replace(policy, compress_weights=compressed)
        whole, share = (
            cost(one, machine(**extra, compressed_launch_share=given), workload).decode_s for given in (None, 0.4)
        )
        assert whole - share == pytest.approx(24 * 2 * 3 * 3e-3 * (1 - left), rel=1e-9, abs=1e-12)


# ------------------------------------------------------------------ limits


def test_a_short_sliding_window_is_refused() -> None:
    model = plain_model(sliding_window=64, num_sliding_layers=24)
    with pytest.raises(InputError, match=r"within a window of 64 tokens, shorter than prompt \+ generation = 96"):
        get("roofline").check(machine(), model, Workload(prompt_len=64, gen_len=32))
    get("roofline").check(machine(), model, Workload(prompt_len=32, gen_len=32))


@pytest.mark.parametrize(
    ("missing", "compress_cache", "message"),
    [
        ({"cpu_attention_bytes_per_s": None}, False, r"needs cpu\.attention_bytes_per_s"),
        ({"cpu_dequantize_values_per_s": None}, True, r"needs cpu\.dequantize_values_per_s"),
        ({"cpu_dequantize_values_per_s": None}, False, None),
        ({}, True, None),
    ],
)
def test_attention_on_the_cpu_needs_its_rates(
    missing: dict[str, Any], compress_cache: bool, message: str | None
) -> None:
    switches = Switches(compress_weights=False, compress_cache=compress_cache, cpu_attention=True, overlap=True)
    policy = Policy.from_percent(
        (100, 0, 50, 50, 100, 0), gpu_batch_size=1, num_gpu_batches=1, **dataclasses.asdict(switches)
    )
    assert (get("roofline").refusal(switches, machine(**missing)) is None) == (message is None)
    if message is None:
        assert cost(policy, machine(**missing), Workload(prompt_len=1, gen_len=2)).decode_s > 0
        return
    with pytest.raises(InputError, match=message):
        cost(policy, machine(**missing), Workload())


def test_problems_take_any_formulation_by_name() -> None:
    assert set(FORMULATIONS) == {"roofline", "flexgen"}
    with pytest.raises(InputError, match="unknown formulation 'rooflin': did you mean 'roofline'"):
        get("rooflin")
    assert isinstance(any_problem(random.Random(0), "roofline"), Problem)
