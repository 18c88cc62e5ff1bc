"""Families that can be run: a config and its ModelSpec → Architecture, one function a ``model_type``."""

from collections.abc import Callable, Mapping
from typing import Any

from costmodel.errors import InputError
from costmodel.model import ModelSpec
from runtime.architecture import Architecture, TensorSpec
from runtime.layers import LayerShape

Config = Mapping[str, Any]


def architecture(config: Config, *, name: str, where: str | None = None) -> Architecture:
    """The architecture of a parsed ``config.json``; ``where`` opens every message.

    Raises :class:`InputError` for a family that cannot be run, or a config that makes no sense.
    """
    spec = ModelSpec.from_config(config, name=name, where=where)
    if spec.family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{where or f'model {name!r}'}: models of type {spec.family!r} can be planned for, but not yet run "
            f"(these can: {known})"
        )
    return FAMILIES[spec.family](config, spec)


def opt(config: Config, spec: ModelSpec) -> Architecture:
    """OPT: learned positions two rows in, LayerNorm before each sublayer (opt-350m: after the sum), all biases."""
    place = "before" if config.get("do_layer_norm_before", True) else "residual"
    layer = "model.decoder.layers.{layer}."
    hidden, heads = spec.hidden_size, spec.num_heads * spec.head_dim
    matrices = {
        "query": ("self_attn.q_proj", heads, hidden, spec.qkv_bias),
        "key": ("self_attn.k_proj", heads, hidden, spec.qkv_bias),
        "value": ("self_attn.v_proj", heads, hidden, spec.qkv_bias),
        "out": ("self_attn.out_proj", hidden, heads, spec.out_bias),
        "up": ("fc1", spec.ffn_size, hidden, spec.mlp_bias),
        "down": ("fc2", hidden, spec.ffn_size, spec.mlp_bias),
    }
    tensors = [
        *_norm(f"attention_norms.{place}", f"{layer}self_attn_layer_norm", spec),
        *_norm(f"mlp_norms.{place}", f"{layer}final_layer_norm", spec),
    ]
    for name, (source, rows, columns, bias) in matrices.items():
        tensors += _linear(name, layer + source, rows, columns, bias=bias)
    projected = spec.embedding_size != hidden
    decoder = "model.decoder."
    head = _norm("norm", f"{decoder}final_layer_norm", spec) if spec.final_norm else []
    if projected:
        head += _linear("project_out", f"{decoder}project_out", spec.embedding_size, hidden, bias=False)
    if not spec.tied_head:
        head += _linear("matrix", "lm_head", spec.vocab_size, spec.embedding_size, bias=False)
    norms = {f"attention_norms.{place}", f"mlp_norms.{place}"} | ({"head.norm"} if spec.final_norm else set())
    return Architecture(
        spec=spec,
        layer_shape=LayerShape(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            activation=str(config.get("activation_function", "relu")),
        ),
        norm_kind="layer",
        norm_epsilon=1e-5,
        norms=frozenset(norms),
        table=TensorSpec(
            name="tokens", shape=(spec.vocab_size, spec.embedding_size), source=f"{decoder}embed_tokens.weight"
        ),
        positions=TensorSpec(
            name="positions", shape=(spec.position_rows, hidden), source=f"{decoder}embed_positions.weight"
        ),
        position_offset=2,
        embedding=tuple(
            _linear("project_in", f"{decoder}project_in", hidden, spec.embedding_size, bias=False) if projected else ()
        ),
        layer=tuple(tensors),
        head=tuple(head),
        prefixes=("model.",),
    )


FAMILIES: Mapping[str, Callable[[Config, ModelSpec], Architecture]] = {"opt": opt}


def _norm(name: str, source: str, spec: ModelSpec) -> list[TensorSpec]:
    """The vectors of one norm: weight and bias, the weight alone, or none."""
    parts = ("weight", "bias")[: spec.norm_vectors]
    return [TensorSpec(name=f"{name}.{part}", shape=(spec.hidden_size,), source=f"{source}.{part}") for part in parts]


def _linear(name: str, source: str, rows: int, columns: int, *, bias: bool) -> list[TensorSpec]:
    """A matrix (rows, columns) after its bias, if it has one."""
    tensors = [TensorSpec(name=f"{name}.bias", shape=(rows,), source=f"{source}.bias")] if bias else []
    return [*tensors, TensorSpec(name=f"{name}.weight", shape=(rows, columns), source=f"{source}.weight")]
