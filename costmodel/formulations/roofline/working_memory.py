"""Bytes that are there only while something is computed: buffers, workspaces, weights expanded to 16 bits."""

from typing import Any

from costmodel.formulations.base import Amounts, Case, Linear
from costmodel.formulations.roofline.seconds import at_once
from costmodel.model import BYTES_PER_VALUE, ModelSpec

PIECE_VALUES = 2**21
"""Values that an engine expands at a time where it expands pieces (``runtime.quantization.CHUNK_VALUES``)."""

FUSED_ROWS = 64
"""Rows that such an engine multiplies by 4-bit weights as they lie (``runtime.quantization.INT4_KERNEL_ROWS``)."""

QUERY_BLOCK, SCORES_AT_ONCE = 128, 2**21
"""Queries of a prompt, and scores, that such an engine computes at a time in prefill (``runtime.attention``)."""

HEAP_HOLES = 0.35
"""What such an engine's heap holds in prefill beyond what is in use, by that: freed memory that nothing asked for again
fits. OPT-125M and 350M took 1 to 14 MiB more than the up to 16 that they worked in: with this share, and what is
counted for kernels, peaks are as far above the plan as below it."""

KERNELS_BYTES, KERNELS_ROWS_BYTES, KERNELS_PART_BYTES = 2**20, 2 * 2**20, 5 * 2**19
"""Compiled kernels that such an engine keeps, 0.3 to 0.4 MiB for every shape of a 16-bit product: of the head and of
prefill's attention; of the layers for every number of rows (of a whole batch, of what prefill computes at a time and of
its rest; more of them where matrices are cut); of attention to each part of the cache. Of 98 runs of OPT-125M and 350M
with 5 to 33 shapes, a process each, peaks of 110 to 485 MiB were between 3.1 % below and 4.3 % above the plan."""


def largest_load_bytes(case: Case) -> float:
    """Bytes of one staging buffer: the larger of a layer and the LM head."""
    layer = case.model.layer_weight_bytes(compressed=case.switches.compress_weights)
    return max(layer, case.model.head_load_bytes)


def workspace_bytes(case: Case, moment: str, prompts: int) -> float:
    """GPU bytes that computing so many prompts of a batch at a time needs beside their inputs.

    The widest moment of a layer, unfused scores where the engine materialises them, and the logits with an fp32
    copy of the last position's.
    """
    model, workload, engine = case.model, case.workload, case.hardware.engine
    prefill = moment == "prefill"
    tokens = workload.prompt_len if prefill else 1
    layer = _layer_bytes(case, tokens, prompts, context_len=tokens if prefill else workload.total_len)
    if prefill and engine.attention_scores == "stored":
        layer += prompts * (2 * model.num_heads * tokens**2 * BYTES_PER_VALUE)
    if case.switches.compress_cache and engine.expanded == "layer and cache":
        # The batch's cache in 16 bits: what prefill is about to store, what decode attends to.
        span = tokens if prefill else workload.total_len
        layer += prompts * (model.kv_values_per_token * span * BYTES_PER_VALUE)
    rows = tokens if prefill and engine.prefill_logits == "all" else 1
    logits = model.vocab_size * (rows * BYTES_PER_VALUE + 4)
    return max(layer, prompts * (logits + model.hidden_size * tokens * BYTES_PER_VALUE))


def _layer_bytes(case: Case, tokens: int, prompts: int, *, context_len: int) -> float:
    """Bytes of ``tokens`` of each prompt in the widest moment of a layer.

    Attention: residual, norm, q, k, v, output; MLP: residual, norm and the intermediate. An engine on the processor
    works in place of its input, which is counted as the batch's, but holds more beside it: while the MLP writes its
    output, that of attention, the sum, its norm and the intermediate; in attention what :func:`_attention_bytes` says.
    """
    model = case.model
    query = model.num_heads * model.head_dim
    inner = model.ffn_size * (2 if model.gated_mlp else 1)
    values = prompts * tokens * BYTES_PER_VALUE
    if case.hardware.engine.expanded != "pieces":
        attention = 2 * model.hidden_size + 2 * query + model.kv_values_per_token
        return values * max(attention, 2 * model.hidden_size + inner)
    mlp = query + 2 * model.hidden_size + max(inner, model.ffn_size + model.hidden_size)
    used = max(values * mlp, _attention_bytes(model, tokens, prompts, context_len))
    return used if tokens == 1 else used * (1 + HEAP_HOLES)


def _attention_bytes(model: ModelSpec, tokens: int, prompts: int, context_len: int) -> float:
    """Bytes of attention on the processor.

    In prefill q, k, v (and copies of k and v for heads that share them) and the output; of as many heads as make
    ``SCORES_AT_ONCE`` scores, q scaled, k transposed, scores and their softmax, and a block of output. In decode the
    scores over the context and their softmax in fp32, and the latter in 16 bits.
    """
    if tokens == 1:
        return float(prompts * model.num_heads * context_len * (4 + 4 + BYTES_PER_VALUE))
    query = model.num_heads * model.head_dim
    copies = 2 * query if model.num_kv_heads < model.num_heads else 0
    width = min(QUERY_BLOCK, tokens)
    heads = min(prompts * model.num_heads, max(1, SCORES_AT_ONCE // (width * tokens)))
    whole = prompts * tokens * (2 * query + model.kv_values_per_token + copies)
    return BYTES_PER_VALUE * float(
        whole + heads * (2 * tokens * model.head_dim + 2 * width * tokens + width * model.head_dim)
    )


def dequantized_bytes(case: Case, tokens: int) -> float:
    """GPU bytes of the weights that lie expanded to 16 bits at a time while a batch's ``tokens`` a prompt are computed.

    An engine that expands pieces keeps one of at most ``PIECE_VALUES`` values in 16 bits, and the half of its integers
    that it works on, a byte each; few rows it multiplies by the weights as they lie.
    """
    model, extent = case.model, case.hardware.engine.expanded
    if not case.switches.compress_weights:
        return 0.0
    matrix = model.hidden_size * max(model.num_heads * model.head_dim, model.ffn_size)
    if extent == "pieces":
        if _is_fused(case, at_once(case, tokens, case.shape.gpu_batch_low) * tokens):
            return 0.0
        return float(min(PIECE_VALUES, matrix) * (BYTES_PER_VALUE + 0.5))
    return BYTES_PER_VALUE * float(model.layer_matrix_params if extent == "layer and cache" else matrix)


def kernels_bytes(case: Case, amounts: Amounts[Any]) -> Linear:
    """Bytes (times blocks) of the kernels that an engine on the processor compiles; a GPU's come with its libraries."""
    if case.hardware.engine.expanded != "pieces":
        return amounts.blocks * 0.0
    layers = KERNELS_BYTES + KERNELS_ROWS_BYTES * _numbers_of_rows(case)
    return amounts.blocks * float(layers) + case.parts(amounts, "cache") * float(KERNELS_PART_BYTES)


def _numbers_of_rows(case: Case) -> int:
    """How many numbers of rows the layers multiply by 16-bit weights in a run; never fewer for a larger batch.

    Of decode and of prefill's end, a row a prompt; of prefill, what is computed at a time, and where that is less than
    a batch, what it leaves of it. Few rows are multiplied by 4-bit weights as they lie.
    """
    tokens, batch = case.workload.prompt_len, case.shape.gpu_batch_low
    some = at_once(case, tokens, batch)
    rows = [batch] if tokens == 1 else [batch, some * tokens] + [some * tokens] * (some < batch)
    return sum(not _is_fused(case, number) for number in rows)


def _is_fused(case: Case, rows: int) -> bool:
    """Whether such an engine multiplies so many rows by 4-bit weights as they lie."""
    return case.switches.compress_weights and rows <= FUSED_ROWS
