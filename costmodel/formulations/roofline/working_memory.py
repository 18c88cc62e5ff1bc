"""Bytes that are there only while something is computed: buffers, workspaces, weights expanded to 16 bits."""

from costmodel.formulations.base import Case
from costmodel.model import BYTES_PER_VALUE


def largest_load_bytes(case: Case) -> float:
    """Bytes of one staging buffer: the larger of a layer and the LM head."""
    layer = case.model.layer_weight_bytes(compressed=case.switches.compress_weights)
    return max(layer, case.model.head_load_bytes)


def workspace_bytes(case: Case, moment: str) -> float:
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


def dequantized_bytes(case: Case) -> float:
    """GPU bytes of the weights that lie expanded to 16 bits at a time."""
    model, extent = case.model, case.hardware.engine.expanded
    if not case.switches.compress_weights or extent == "pieces":
        return 0.0
    widest = max(model.num_heads * model.head_dim, model.ffn_size)
    return BYTES_PER_VALUE * float(
        model.layer_matrix_params if extent == "layer and cache" else model.hidden_size * widest
    )
