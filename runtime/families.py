"""Families that can be run: a config and its ModelSpec → Description, one function a ``model_type``."""

from collections.abc import Callable, Mapping
from typing import Any

from costmodel.errors import InputError
from costmodel.model import ModelSpec
from runtime.architecture import Architecture
from runtime.description import Description, Source, build
from runtime.rotary_config import read_rotary

Config = Mapping[str, Any]


def architecture(config: Config, *, name: str, where: str | None = None) -> Architecture:
    """The architecture of a parsed ``config.json``; ``where`` opens every message.

    Raises :class:`InputError` for a family that cannot be run, or a config that makes no sense.
    """
    spec = ModelSpec.from_config(config, name=name, where=where)
    place = where or f"model {name!r}"
    if spec.family not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"{place}: models of type {spec.family!r} can be planned for, but not yet run (these can: {known})"
        )
    return build(FAMILIES[spec.family](config, spec, place), spec)


def opt(config: Config, spec: ModelSpec, where: str) -> Description:
    """OPT: learned positions two rows in, LayerNorm before each sublayer (opt-350m: after the sum), all biases."""
    place = "before" if config.get("do_layer_norm_before", True) else "residual"
    projected = spec.embedding_size != spec.hidden_size
    return Description(
        prefix="model.decoder.",
        position_table="embed_positions",
        position_offset=2,
        project_in="project_in" if projected else None,
        project_out="project_out" if projected else None,
        matrices=_named(_QKV | {"out": "self_attn.out_proj", "up": "fc1", "down": "fc2"}),
        norms={f"attention_norms.{place}": "self_attn_layer_norm", f"mlp_norms.{place}": "final_layer_norm"},
        final_norm="final_layer_norm",
        norm_kind="layer",
        norm_epsilon=1e-5,
        activation=str(config.get("activation_function", "relu")),
    )


def llama(config: Config, spec: ModelSpec, where: str) -> Description:
    """Llama, Mistral, Qwen2 and Qwen3: RMSNorm, rotary positions, grouped heads, a gated MLP."""
    norms = dict(_LLAMA_NORMS)
    if spec.qk_norm:
        norms |= {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
    return Description(
        matrices=_named(_QKV | _OUT | _GATED),
        norms=norms,
        norm_epsilon=_number(config, "rms_norm_eps", 1e-6, where),
        activation=str(config.get("hidden_act", "silu")),
        rotary=read_rotary(config, head_dim=spec.head_dim, max_positions=spec.max_positions, where=where),
        windows=_windows(config, spec),
    )


_QKV = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
_OUT = {"out": "self_attn.o_proj"}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_LLAMA_NORMS = {"attention_norms.before": "input_layernorm", "mlp_norms.before": "post_attention_layernorm"}

FAMILIES: Mapping[str, Callable[[Config, ModelSpec, str], Description]] = {
    "llama": llama,
    "mistral": llama,
    "opt": opt,
    "qwen2": llama,
    "qwen3": llama,
}


def _named(names: Mapping[str, str]) -> dict[str, Source]:
    """Matrices that a checkpoint holds as they are."""
    return {matrix: Source(name=name) for matrix, name in names.items()}


def _windows(config: Config, spec: ModelSpec) -> tuple[int | None, ...]:
    """Tokens that each layer sees: those that ``layer_types`` names, or else the last ones, are limited."""
    if spec.sliding_window is None:
        return ()
    whole = ["full_attention"] * (spec.num_layers - spec.num_sliding_layers)
    kinds = whole + ["sliding_attention"] * spec.num_sliding_layers
    if spec.num_sliding_layers < spec.num_layers:
        kinds = config.get("layer_types") or kinds
    return tuple(spec.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _number(config: Config, name: str, default: float, where: str) -> float:
    value = config.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise InputError(f"{where}: field {name!r} is {value!r}: it must be a number in [0, 1)")
    return float(value)
