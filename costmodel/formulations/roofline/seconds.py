"""Seconds of one layer (or the LM head) for one prompt, by what computes."""

from typing import Any

from costmodel.formulations.base import Case
from costmodel.model import BYTES_PER_VALUE, ModelSpec


def matrix_params(model: ModelSpec) -> tuple[int, int]:
    """Parameters in the matrices of attention and of the MLP."""
    query = model.num_heads * model.head_dim
    attention = model.hidden_size * (2 * query + model.kv_values_per_token)
    return attention, model.layer_matrix_params - attention


def products_s(case: Case, params: int, tokens: int) -> float:
    """Seconds to multiply one prompt's ``tokens`` by matrices of ``params`` parameters (half a layer).

    max(FLOPs / rate, weight bytes / bandwidth), plus half a layer's launches; what a batch does once
    (reading the weights, expanding 4-bit ones, launching) is shared by its prompts. Where products with 4-bit
    weights were measured, that rate is all there is to them: reading and expanding are in it.
    """
    gpu, shape = case.hardware.gpu, case.shape
    fewest, most = (at_once(case, tokens, prompts) for prompts in (shape.gpu_batch_low, shape.gpu_batch_high))
    once = gpu.layer_launch_s.effective * launch_share(case) / 2
    if case.switches.compress_weights and gpu.compressed_matmul_flops_per_s is not None:
        rate = gpu.compressed_matmul_flops_per_s.best_between(fewest * tokens, most * tokens)
        return 2 * params * tokens / rate + once / most
    rate = gpu.matmul_flops_per_s.best_between(fewest * tokens, most * tokens)
    read_s = params * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective / most
    if case.switches.compress_weights:
        once += params / gpu.dequantize_values_per_s.effective
    return max(2 * params * tokens / rate, read_s) + once / most


def launch_share(case: Case) -> float:
    """What is left of launches and calls, which were measured beside 16-bit weights."""
    share = case.hardware.gpu.compressed_launch_share
    return share.effective if case.switches.compress_weights and share is not None else 1.0


def at_once(case: Case, tokens: int, prompts: int) -> int:
    """Prompts of a batch that a layer computes at a time: all, unless the engine limits the tokens of prefill."""
    limit = case.hardware.engine.prefill_rows
    return prompts if limit is None or tokens == 1 else min(prompts, max(1, limit // tokens))


def elementwise_s(case: Case, tokens: int) -> float:
    """Seconds of norms, residual additions (12 h values moved) and activation function (2 a unit)."""
    model = case.model
    values = 12 * model.hidden_size + 2 * model.ffn_size * (2 if model.gated_mlp else 1)
    return values * tokens * BYTES_PER_VALUE / case.hardware.gpu.memory_bytes_per_s.effective


def prefill_attention_s(case: Case, tokens: int) -> float:
    """Seconds of one layer's attention among one prompt's tokens (products, mask and softmax)."""
    engine = case.hardware.engine
    flops = case.model.attention_flops(context_len=tokens) * tokens * engine.attention_causal_share.effective
    return flops / case.hardware.gpu.attention_flops_per_s.at(tokens)


def cache_quantize_s(case: Case, tokens: int) -> float:
    """Seconds to write one layer's new cache entries of one prompt in 4 bits."""
    if not case.switches.compress_cache:
        return 0.0
    gpu = case.hardware.gpu
    rate = gpu.quantize_values_per_s or gpu.dequantize_values_per_s
    return case.model.kv_values_per_token * tokens / rate.effective


def gpu_attention_s(case: Case, context_len: Any) -> Any:
    """Seconds of one layer's decode attention on the GPU for one prompt: the cache is read once."""
    model, gpu = case.model, case.hardware.gpu
    per_token = max(
        model.attention_flops(context_len=1) / gpu.matmul_flops_per_s.effective,
        model.kv_values_per_token * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective,
    )
    if case.switches.compress_cache:
        per_token += model.kv_values_per_token / gpu.dequantize_values_per_s.effective
    return per_token * context_len


def gather_s(case: Case, context_len: Any) -> Any:
    """Seconds in which one layer's carried tokens after the prompt become one piece, for one prompt."""
    rate = case.hardware.gpu.gather_bytes_per_s
    if rate is None:
        return 0.0
    per_token = case.model.kv_values_per_token * BYTES_PER_VALUE / rate.effective
    return (context_len - case.workload.prompt_len) * per_token


def cpu_attention_s(case: Case, context_len: Any) -> Any:
    """Seconds of one layer's decode attention on the CPU for one prompt."""
    model, cpu = case.model, case.hardware.cpu
    assert cpu.attention_bytes_per_s is not None  # Roofline.refusal has ruled this out
    per_token = model.kv_values_per_token * BYTES_PER_VALUE / cpu.attention_bytes_per_s.effective
    if case.switches.compress_cache:
        assert cpu.dequantize_values_per_s is not None
        per_token += model.kv_values_per_token / cpu.dequantize_values_per_s.effective
    return per_token * context_len


def head_s(case: Case, rows: int) -> float:
    """Seconds of the LM head for one prompt: ``rows`` positions get logits."""
    model, gpu, shape = case.model, case.hardware.gpu, case.shape
    rate = gpu.matmul_flops_per_s.best_between(shape.gpu_batch_low * rows, shape.gpu_batch_high * rows)
    read_s = model.head_load_bytes / gpu.memory_bytes_per_s.effective / shape.gpu_batch_high
    write_s = rows * model.vocab_size * BYTES_PER_VALUE / gpu.memory_bytes_per_s.effective
    launch_s = gpu.layer_launch_s.effective / shape.gpu_batch_high
    return max(model.head_flops_per_token * rows / rate, read_s + write_s) + launch_s
