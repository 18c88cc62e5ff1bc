"""Bytes that are there only while something is computed: buffers, workspaces, weights expanded to 16 bits."""

from costmodel.formulations.base import Case
from costmodel.formulations.roofline.seconds import at_once
from costmodel.model import BYTES_PER_VALUE

PIECE_VALUES = 2**21
"""Values that an engine expands at a time where it expands pieces (``runtime.quantization.CHUNK_VALUES``)."""

FUSED_ROWS = 64
"""Rows that such an engine multiplies by 4-bit weights as they lie (``runtime.quantization.INT4_KERNEL_ROWS``)."""

KERNELS_BYTES = 12 * 2**20
"""Compiled kernels that such an engine keeps, half a MiB for every shape of a 16-bit product: some 24, of layers that
are cut between tiers, of attention in prefill and in decode and of the head. Runs of OPT-125M took 8 to 21 MiB."""

KERNELS_4BIT_BYTES = 4 * 2**20
"""The same where weights are in 4 bits: attention's and the head's alone."""


def largest_load_bytes(case: Case) -> float:
    """Bytes of one staging buffer: the larger of a layer and the LM head."""
    layer = case.model.layer_weight_bytes(compressed=case.switches.compress_weights)
    return max(layer, case.model.head_load_bytes)


def workspace_bytes(case: Case, moment: str) -> float:
    """GPU bytes that computing one prompt of a batch needs beside its inputs.

    The widest moment of a layer, unfused scores where the engine materialises them, and the logits with an fp32
    copy of the last position's.
    """
    model, workload, engine = case.model, case.workload, case.hardware.engine
    prefill = moment == "prefill"
    tokens = workload.prompt_len if prefill else 1
    layer = _layer_values(case, tokens) * BYTES_PER_VALUE
    if prefill and engine.attention_scores == "stored":
        layer += 2 * model.num_heads * tokens**2 * BYTES_PER_VALUE
    if case.switches.compress_cache and engine.expanded == "layer and cache":
        # The batch's cache in 16 bits: what prefill is about to store, what decode attends to.
        span = tokens if prefill else workload.total_len
        layer += model.kv_values_per_token * span * BYTES_PER_VALUE
    rows = tokens if prefill and engine.prefill_logits == "all" else 1
    logits = model.vocab_size * (rows * BYTES_PER_VALUE + 4)
    return max(layer, logits + model.hidden_size * tokens * BYTES_PER_VALUE)


def _layer_values(case: Case, tokens: int) -> float:
    """Values of one prompt's ``tokens`` in the widest moment of a layer.

    Attention: residual, norm, q, k, v, output; MLP: residual, norm and the intermediate. An engine on the processor
    works in place of its input, which is counted as the batch's, but holds more beside it: while attention writes a
    few heads' output, q scaled and unscaled, the output and that part of it, k, v and k transposed; while the MLP
    writes its output, that of attention, the sum, its norm and the intermediate.
    """
    model = case.model
    query = model.num_heads * model.head_dim
    inner = model.ffn_size * (2 if model.gated_mlp else 1)
    if case.hardware.engine.expanded == "pieces":
        attention = 4 * query + 1.5 * model.kv_values_per_token
        mlp = query + 2 * model.hidden_size + max(inner, model.ffn_size + model.hidden_size)
    else:
        attention = 2 * model.hidden_size + 2 * query + model.kv_values_per_token
        mlp = 2 * model.hidden_size + inner
    return max(attention, mlp) * tokens


def dequantized_bytes(case: Case, tokens: int) -> float:
    """GPU bytes of the weights that lie expanded to 16 bits at a time while a batch's ``tokens`` a prompt are computed.

    An engine that expands pieces holds one of at most ``PIECE_VALUES`` values in 16 bits, and twice the half of its
    integers that it works on, a byte each; few rows it multiplies by the weights as they lie.
    """
    model, extent = case.model, case.hardware.engine.expanded
    if not case.switches.compress_weights:
        return 0.0
    matrix = model.hidden_size * max(model.num_heads * model.head_dim, model.ffn_size)
    if extent == "pieces":
        if at_once(case, tokens, case.shape.gpu_batch_low) * tokens <= FUSED_ROWS:
            return 0.0
        return float(min(PIECE_VALUES, matrix) * (BYTES_PER_VALUE + 1))
    return BYTES_PER_VALUE * float(model.layer_matrix_params if extent == "layer and cache" else matrix)


def kernels_bytes(case: Case) -> float:
    """Bytes of the kernels that an engine on the processor compiles while it runs; a GPU's come with its libraries."""
    if case.hardware.engine.expanded != "pieces":
        return 0.0
    return float(KERNELS_4BIT_BYTES if case.switches.compress_weights else KERNELS_BYTES)
