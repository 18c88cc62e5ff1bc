"""Families that can be run: a config and its ModelSpec → Description, one function a ``model_type``."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from costmodel.errors import InputError
from costmodel.model import ModelSpec
from runtime import alibi, rearrange
from runtime.architecture import Architecture
from runtime.description import Description, Source, build
from runtime.rotary_config import plain_rotary, read_rotary

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


def phi3(config: Config, spec: ModelSpec, where: str) -> Description:
    """Phi-3: Llama with fused query, key and value, and fused gate and up."""
    common = llama(config, spec, where)
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    edges = {"query": (0, queries), "key": (queries, queries + keys), "value": (queries + keys, queries + 2 * keys)}
    fused = {
        name: Source(name="self_attn.qkv_proj", rows=queries + 2 * keys, take=rearrange.rows(*edge))
        for name, edge in edges.items()
    }
    return replace(common, matrices=fused | _named(_OUT | {"down": "mlp.down_proj"}) | _gate_up(spec))


def glm(config: Config, spec: ModelSpec, where: str) -> Description:
    """GLM-4: interleaved rotary positions on half of each head, gate and up fused; ``glm4`` norms its outputs too."""
    rotary = read_rotary(
        config, head_dim=spec.head_dim, max_positions=spec.max_positions, where=where, default_share=0.5
    )
    turned = rearrange.half_split(spec.head_dim, rotary.rotary_dim)
    norms = dict(_LLAMA_NORMS)
    if spec.norms_per_layer == 4:
        norms |= {"attention_norms.output": "post_self_attn_layernorm", "mlp_norms.output": "post_mlp_layernorm"}
    return Description(
        matrices={
            "query": Source(name="self_attn.q_proj", take=turned),
            "key": Source(name="self_attn.k_proj", take=turned),
            **_named({"value": "self_attn.v_proj", "down": "mlp.down_proj"} | _OUT),
            **_gate_up(spec),
        },
        norms=norms,
        norm_epsilon=_number(config, "rms_norm_eps", 1.5625e-07, where),
        activation=str(config.get("hidden_act", "silu")),
        rotary=rotary,
    )


def starcoder2(config: Config, spec: ModelSpec, where: str) -> Description:
    """StarCoder2: Llama's names with LayerNorm and a plain MLP."""
    return replace(
        llama(config, spec, where),
        matrices=_named(_QKV | _OUT | {"up": "mlp.c_fc", "down": "mlp.c_proj"}),
        norm_kind="layer",
        norm_epsilon=_number(config, "norm_epsilon", 1e-5, where),
        activation=str(config.get("hidden_act", "gelu_pytorch_tanh")),
    )


def phi(config: Config, spec: ModelSpec, where: str) -> Description:
    """Phi: parallel sublayers after one LayerNorm, rotary positions on half of each head."""
    qk_norms = {"query_norm": "self_attn.q_layernorm", "key_norm": "self_attn.k_layernorm"}
    return Description(
        matrices=_named(_QKV | {"out": "self_attn.dense", "up": "mlp.fc1", "down": "mlp.fc2"}),
        norms={"attention_norms.before": "input_layernorm"} | (qk_norms if spec.qk_norm else {}),
        final_norm="final_layernorm",
        norm_kind="layer",
        norm_epsilon=_number(config, "layer_norm_eps", 1e-5, where),
        activation=str(config.get("hidden_act", "gelu_new")),
        parallel=True,
        rotary=read_rotary(
            config, head_dim=spec.head_dim, max_positions=spec.max_positions, where=where, default_share=0.5
        ),
    )


def bloom(config: Config, spec: ModelSpec, where: str) -> Description:
    """BLOOM: ALiBi, a norm after the embedding, query, key and value fused by head."""
    _refuse(config, "apply_residual_connection_post_layernorm", where)
    fused = _fused("self_attention.query_key_value", spec, order=("query", "key", "value"), blocks=spec.num_heads)
    rest = {"out": "self_attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
    return Description(
        prefix="transformer.",
        prefixes=("transformer.",),
        layer="h.{layer}.",
        table="word_embeddings",
        embedding_norm="word_embeddings_layernorm",
        matrices=fused | _named(rest),
        norms=_LLAMA_NORMS,
        final_norm="ln_f",
        norm_kind="layer",
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5, where),
        activation="gelu_new",
        slopes=alibi.slopes(spec.num_heads),
    )


def gpt2(config: Config, spec: ModelSpec, where: str) -> Description:
    """GPT-2: learned positions, matrices transposed, query, key and value one behind the other."""
    _refuse(config, "scale_attn_by_inverse_layer_idx", where)
    width = 3 * spec.hidden_size
    fused = {
        name: Source(name="attn.c_attn", rows=width, take=rearrange.part(index, 3), is_transposed=True)
        for index, name in enumerate(("query", "key", "value"))
    }
    rest = {"out": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}
    return Description(
        **_GPT,
        position_table="wpe",
        matrices=fused | {name: Source(name=source, is_transposed=True) for name, source in rest.items()},
        norms={"attention_norms.before": "ln_1", "mlp_norms.before": "ln_2"},
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5, where),
        activation=str(config.get("activation_function", "gelu_new")),
        attention_scale=None if config.get("scale_attn_weights", True) else 1.0,
    )


def gptj(config: Config, spec: ModelSpec, where: str) -> Description:
    """GPT-J: parallel sublayers after one norm, interleaved rotary positions on the first values of each head."""
    rotary = plain_rotary(_rotary_dim(config, spec, where))
    turned = rearrange.half_split(spec.head_dim, rotary.rotary_dim)
    return Description(
        **_GPT,
        matrices={
            "query": Source(name="attn.q_proj", take=turned),
            "key": Source(name="attn.k_proj", take=turned),
            **_named({"value": "attn.v_proj", "out": "attn.out_proj", "up": "mlp.fc_in", "down": "mlp.fc_out"}),
        },
        norms={"attention_norms.before": "ln_1"},
        norm_epsilon=_number(config, "layer_norm_epsilon", 1e-5, where),
        activation=str(config.get("activation_function", "gelu_new")),
        parallel=True,
        rotary=rotary,
    )


def codegen(config: Config, spec: ModelSpec, where: str) -> Description:
    """CodeGen: GPT-J with query, value and key (in this order) fused within each of four shares of the heads."""
    if spec.num_heads % _CODEGEN_SHARES:
        raise InputError(f"{where}: the model has {spec.num_heads} heads: CodeGen fuses them by {_CODEGEN_SHARES}")
    common = gptj(config, spec, where)
    fused = _fused("attn.qkv_proj", spec, order=("query", "value", "key"), blocks=_CODEGEN_SHARES)
    turned = {
        name: replace(source, take=rearrange.then(source.take, common.matrices[name].take))
        for name, source in fused.items()
    }
    return replace(common, matrices=dict(common.matrices) | turned)


def gpt_neox(config: Config, spec: ModelSpec, where: str) -> Description:
    """GPT-NeoX: mostly parallel sublayers, each after its norm; query, key and value fused by head."""
    fused = _fused("attention.query_key_value", spec, order=("query", "key", "value"), blocks=spec.num_heads)
    rest = {"out": "attention.dense", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h"}
    return Description(
        prefix="gpt_neox.",
        prefixes=("gpt_neox.",),
        renamed=(("lm_head.", "embed_out."),),
        table="embed_in",
        matrices=fused | _named(rest),
        norms=_LLAMA_NORMS,
        final_norm="final_layer_norm",
        norm_kind="layer",
        norm_epsilon=_number(config, "layer_norm_eps", 1e-5, where),
        activation=str(config.get("hidden_act", "gelu")),
        parallel=bool(config.get("use_parallel_residual", True)),
        rotary=read_rotary(
            config,
            head_dim=spec.head_dim,
            max_positions=spec.max_positions,
            where=where,
            theta="rotary_emb_base",
            share="rotary_pct",
            default_share=0.25,
        ),
    )


_QKV = {"query": "self_attn.q_proj", "key": "self_attn.k_proj", "value": "self_attn.v_proj"}
_OUT = {"out": "self_attn.o_proj"}
_GATED = {"gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
_LLAMA_NORMS = {"attention_norms.before": "input_layernorm", "mlp_norms.before": "post_attention_layernorm"}
_GPT: dict[str, Any] = {
    "prefix": "transformer.",
    "prefixes": ("transformer.",),
    "layer": "h.{layer}.",
    "table": "wte",
    "final_norm": "ln_f",
    "norm_kind": "layer",
}
_CODEGEN_SHARES = 4
"""CodeGen was trained on slices of four TPU cores; its checkpoints have kept their order."""

FAMILIES: Mapping[str, Callable[[Config, ModelSpec, str], Description]] = {
    "bloom": bloom,
    "codegen": codegen,
    "glm": glm,
    "glm4": glm,
    "gpt2": gpt2,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "llama": llama,
    "mistral": llama,
    "opt": opt,
    "phi": phi,
    "phi3": phi3,
    "qwen2": llama,
    "qwen3": llama,
    "starcoder2": starcoder2,
}


def _named(names: Mapping[str, str]) -> dict[str, Source]:
    """Matrices that a checkpoint holds as they are."""
    return {matrix: Source(name=name) for matrix, name in names.items()}


def _fused(name: str, spec: ModelSpec, *, order: tuple[str, ...], blocks: int) -> dict[str, Source]:
    """Matrices that lie side by side within each of ``blocks`` blocks of one that holds them all."""
    rows = len(order) * spec.num_heads * spec.head_dim
    return {
        matrix: Source(name=name, rows=rows, take=rearrange.part_of_each(index, len(order), blocks=blocks))
        for index, matrix in enumerate(order)
    }


def _gate_up(spec: ModelSpec) -> dict[str, Source]:
    """The gate before the other in one matrix."""
    return {
        name: Source(name="mlp.gate_up_proj", rows=2 * spec.ffn_size, take=rearrange.part(index, 2))
        for index, name in enumerate(("gate", "up"))
    }


def _refuse(config: Config, flag: str, where: str) -> None:
    if config.get(flag):
        raise InputError(f"{where}: field {flag!r} is {config[flag]!r}: models with it cannot be run, only without")


def _rotary_dim(config: Config, spec: ModelSpec, where: str) -> int:
    value = config.get("rotary_dim", 64)
    if not isinstance(value, int) or isinstance(value, bool) or not 2 <= value <= spec.head_dim or value % 2:
        raise InputError(
            f"{where}: field 'rotary_dim' is {value!r}: it must be an even number of at most {spec.head_dim}, "
            "the values of a head"
        )
    return value


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
