"""Families: how each decoder-only ``model_type`` writes its shape into a Hugging Face ``config.json``.

A family is data: which key holds which number, what a missing key means, which vectors exist. The
defaults are those of transformers' configuration classes, in the v4 and the v5 form. :mod:`costmodel.config_reader`
reads configs by it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Positions = Literal["learned", "alibi", "rotary"]

REQUIRED = -1  # the default of a key that has none


@dataclass(frozen=True)
class Key:
    """An integer of the config under any of ``names``; ``None`` is what an explicit null means.

    ``default`` stands for a missing key; without one the key is required.
    """

    names: tuple[str, ...]
    default: int | None = REQUIRED
    nullable: bool = False


@dataclass(frozen=True)
class Flag:
    """A true/false key of the config, its default when missing, inverted if ``negate``."""

    name: str
    default: bool
    negate: bool = False


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sliding-window attention: its key, the switch that turns it on and the layers that it spares.

    ``layer_types`` (a list with one entry a layer) overrides ``first_layer`` where the config has it.
    """

    size: Key
    switch: Flag | None = None
    first_layer: Key | None = None


Setting = bool | Flag | tuple[Flag, ...]  # a tuple holds if all of its flags hold


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model_type; the defaults describe a Llama-like model.

    ``kv_heads`` None: as many as query heads. ``head_dim`` None: hidden / heads. ``ffn`` None (or a
    null): 4 × hidden. ``embedding`` None (or a null): as wide as hidden.
    """

    hidden: Key = Key(("hidden_size",))
    layers: Key = Key(("num_hidden_layers",))
    heads: Key = Key(("num_attention_heads",))
    kv_heads: Key | None = Key(("num_key_value_heads",), None, nullable=True)
    head_dim: Key | None = Key(("head_dim",), None, nullable=True)
    ffn: Key | None = Key(("intermediate_size",))
    vocab: Key = Key(("vocab_size",))
    embedding: Key | None = None
    max_positions: Key | None = Key(("max_position_embeddings",), 2048)
    positions: Positions = "rotary"
    extra_position_rows: int = 0
    window: Window | None = None
    tied_head: Flag = Flag("tie_word_embeddings", False)
    gated_mlp: bool = True
    qkv_bias: Setting = False
    out_bias: Setting = False
    mlp_bias: Setting = False
    head_bias: bool = False
    norm_vectors: Literal[1, 2] = 1  # RMSNorm: weight; LayerNorm: weight and bias
    norm_affine: Setting = True
    norms_per_layer: int = 2
    qk_norm: Setting = False
    embedding_norm: bool = False
    final_norm: Setting = True


def _max_positions(default: int, *aliases: str) -> Key:
    return Key((*aliases, "max_position_embeddings"), default)


_TIED = Flag("tie_word_embeddings", True)
_ATTENTION_BIAS = Flag("attention_bias", False)
_MLP_BIAS = Flag("mlp_bias", False)
_WINDOW = Key(("sliding_window",), None, nullable=True)
_WINDOW_4096 = Key(("sliding_window",), 4096, nullable=True)
_GPT_NAMES: dict[str, Any] = {
    "hidden": Key(("n_embd", "hidden_size")),
    "layers": Key(("n_layer", "num_hidden_layers")),
    "heads": Key(("n_head", "num_attention_heads")),
    "kv_heads": None,
    "head_dim": None,
    "ffn": Key(("n_inner",), None, nullable=True),
    "gated_mlp": False,
    "mlp_bias": True,
    "norm_vectors": 2,
}
_QWEN_WINDOW = Window(
    size=_WINDOW_4096, switch=Flag("use_sliding_window", False), first_layer=Key(("max_window_layers",), 28)
)
_GLM: dict[str, Any] = {
    "kv_heads": Key(("num_key_value_heads",), 2, nullable=True),
    "head_dim": Key(("head_dim",), 128, nullable=True),
    "max_positions": _max_positions(131072),
    "qkv_bias": Flag("attention_bias", True),
}

FAMILIES: Mapping[str, Family] = {
    "bloom": Family(
        hidden=Key(("n_embed", "hidden_size")),
        layers=Key(("n_layer", "num_hidden_layers")),
        heads=Key(("n_head", "num_attention_heads")),
        kv_heads=None,
        head_dim=None,
        ffn=None,
        max_positions=None,
        positions="alibi",
        tied_head=_TIED,
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        norm_vectors=2,
        embedding_norm=True,
    ),
    "codegen": Family(
        **_GPT_NAMES, max_positions=_max_positions(2048, "n_positions"), norms_per_layer=1, head_bias=True
    ),
    "gemma": Family(
        kv_heads=Key(("num_key_value_heads",), 16, nullable=True),
        head_dim=Key(("head_dim",), 256, nullable=True),
        max_positions=_max_positions(8192),
        tied_head=_TIED,
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
    ),
    "glm": Family(**_GLM),
    "glm4": Family(**_GLM, norms_per_layer=4),
    "gpt2": Family(
        **_GPT_NAMES,
        max_positions=_max_positions(1024, "n_positions"),
        positions="learned",
        tied_head=_TIED,
        qkv_bias=True,
        out_bias=True,
    ),
    "gpt_neox": Family(
        kv_heads=None,
        head_dim=None,
        gated_mlp=False,
        qkv_bias=Flag("attention_bias", True),
        out_bias=Flag("attention_bias", True),
        mlp_bias=True,
        norm_vectors=2,
    ),
    "gptj": Family(**_GPT_NAMES, max_positions=_max_positions(2048, "n_positions"), norms_per_layer=1, head_bias=True),
    "granite": Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=_MLP_BIAS),
    "llama": Family(qkv_bias=_ATTENTION_BIAS, out_bias=_ATTENTION_BIAS, mlp_bias=_MLP_BIAS),
    "mistral": Family(
        kv_heads=Key(("num_key_value_heads",), 8, nullable=True),
        max_positions=_max_positions(131072),
        window=Window(size=_WINDOW_4096),
    ),
    "opt": Family(
        kv_heads=None,
        head_dim=None,
        ffn=Key(("ffn_dim",)),
        embedding=Key(("word_embed_proj_dim",), None, nullable=True),
        positions="learned",
        extra_position_rows=2,
        tied_head=_TIED,
        gated_mlp=False,
        qkv_bias=Flag("enable_bias", True),
        out_bias=Flag("enable_bias", True),
        mlp_bias=Flag("enable_bias", True),
        norm_vectors=2,
        norm_affine=Flag("layer_norm_elementwise_affine", True),
        final_norm=(Flag("do_layer_norm_before", True), Flag("_remove_final_layer_norm", False, negate=True)),
    ),
    "phi": Family(
        gated_mlp=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
        norm_vectors=2,
        norms_per_layer=1,
        qk_norm=Flag("qk_layernorm", False),
    ),
    "phi3": Family(max_positions=_max_positions(4096), window=Window(size=_WINDOW)),
    "qwen2": Family(
        kv_heads=Key(("num_key_value_heads",), 32, nullable=True),
        max_positions=_max_positions(32768),
        window=_QWEN_WINDOW,
        qkv_bias=True,
    ),
    "qwen3": Family(
        kv_heads=Key(("num_key_value_heads",), 32, nullable=True),
        head_dim=Key(("head_dim",), 128, nullable=True),
        max_positions=_max_positions(32768),
        window=_QWEN_WINDOW,
        qkv_bias=_ATTENTION_BIAS,
        out_bias=_ATTENTION_BIAS,
        qk_norm=True,
    ),
    "starcoder2": Family(
        kv_heads=Key(("num_key_value_heads",), 2, nullable=True),
        max_positions=_max_positions(4096),
        window=Window(size=_WINDOW),
        tied_head=_TIED,
        gated_mlp=False,
        qkv_bias=Flag("use_bias", True),
        out_bias=Flag("use_bias", True),
        mlp_bias=Flag("use_bias", True),
        norm_vectors=2,
    ),
}
