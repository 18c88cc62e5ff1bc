"""Reading a Hugging Face ``config.json``: its shape by the description of its family, or one sentence on what is wrong.

Keys that no parameter count depends on (rope_theta, rope_parameters, torch_dtype, dtype, …) are not read at all.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from costmodel.errors import InputError
from costmodel.families import FAMILIES, REQUIRED, Family, Flag, Key, Setting, Window

# What is not one stack of equal, dense, causal layers, told by the keys that give it away.
_REFUSED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("is an encoder-decoder model", ("is_encoder_decoder", "add_cross_attention")),
    ("is a multimodal model", ("text_config", "vision_config", "audio_config")),
    (
        "is a mixture of experts",
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts"),
    ),
    ("has layers that differ from one another", ("per_layer_config", "block_configs")),
    ("caps its logits", ("attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap")),
    ("attends in both directions", ("use_bidirectional_attention",)),
    ("runs the checkpoint's own code", ("auto_map",)),  # even if the type is known: that code may differ from it
)
_REMEDIES = {"auto_map": ": delete the field if transformers loads the weights without trust_remote_code"}
_CODE_ONLY = {"chatglm": "its native successors are glm and glm4"}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A config's shape as keywords of ModelSpec, and the config key that each number came from."""

    shape: Mapping[str, Any]
    called: Mapping[str, str]


def read(config: object, *, where: str) -> Reading:
    """Read the shape that a parsed ``config.json`` describes; ``where`` opens every message."""
    if not isinstance(config, Mapping):
        raise InputError(f"{where}: {_shown(config)} is not the JSON object that a config.json holds")
    model_type = _supported_type(config, where)
    return _Reader(config, model_type, where).read(FAMILIES[model_type])


def _supported_type(config: Mapping[str, Any], where: str) -> str:
    """The config's model_type, or one sentence on why it is not supported."""
    supported = f"supported families: {', '.join(sorted(FAMILIES))}"
    if "model_type" not in config:
        raise InputError(f"{where}: field 'model_type' is missing; {supported}")
    model_type = config["model_type"]
    if not isinstance(model_type, str):
        raise InputError(f"{where}: field 'model_type' is {_shown(model_type)}: it must be text; {supported}")
    subject = f"{where}: model_type {_shown(model_type)}"
    if model_type in _CODE_ONLY:
        hint = _CODE_ONLY[model_type]
        raise InputError(f"{subject} runs only the checkpoint's own code, which is not supported: {hint}; {supported}")
    for reason, keys in _REFUSED:
        for key in keys:
            if config.get(key):  # null, false, 0, [] and {} all switch the feature off
                evidence = f"(field {key!r} is {_shown(config[key])})"
                remedy = _REMEDIES.get(key, "")
                raise InputError(f"{subject} {reason} {evidence}, which is not supported{remedy}; {supported}")
    if model_type not in FAMILIES:
        raise InputError(f"{subject} is not supported; {supported}")
    return model_type


def _shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Reader:
    """Reads keys of one config and remembers what each field of the shape is called there."""

    def __init__(self, config: Mapping[str, Any], model_type: str, where: str) -> None:
        self.config = config
        self.model_type = model_type
        self.where = where
        self.called: dict[str, str] = {}

    def read(self, family: Family) -> Reading:
        """Collect the keywords of ModelSpec."""
        hidden_size = self._required("hidden_size", family.hidden)
        num_layers = self._required("num_layers", family.layers)
        num_heads = self._required("num_heads", family.heads)
        num_kv_heads = self._integer("num_kv_heads", family.kv_heads)
        head_dim = self._integer("head_dim", family.head_dim)
        if head_dim is None:
            head_dim = self._equal_heads(hidden_size, num_heads)
        ffn_size = self._integer("ffn_size", family.ffn)
        embedding_size = self._integer("embedding_size", family.embedding)
        max_positions = self._integer("max_positions", family.max_positions)
        window, window_layers = self._window(family.window, num_layers, max_positions)
        learned = family.positions == "learned" and max_positions is not None
        norm_vectors = family.norm_vectors if self._holds(family.norm_affine) else 0
        shape = {
            "family": self.model_type,
            "num_layers": num_layers,
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": num_heads if num_kv_heads is None else num_kv_heads,
            "head_dim": head_dim,
            "ffn_size": 4 * hidden_size if ffn_size is None else ffn_size,
            "gated_mlp": family.gated_mlp,
            "vocab_size": self._required("vocab_size", family.vocab),
            "embedding_size": hidden_size if embedding_size is None else embedding_size,
            "max_positions": max_positions,
            "positions": family.positions,
            "position_rows": (max_positions or 0) + family.extra_position_rows if learned else 0,
            "sliding_window": window,
            "num_sliding_layers": window_layers,
            "tied_head": self._holds(family.tied_head),
            "qkv_bias": self._holds(family.qkv_bias),
            "out_bias": self._holds(family.out_bias),
            "mlp_bias": self._holds(family.mlp_bias),
            "head_bias": family.head_bias,
            "norm_vectors": norm_vectors,
            "norms_per_layer": family.norms_per_layer,
            "qk_norm": self._holds(family.qk_norm),
            "embedding_norm": family.embedding_norm,
            "final_norm": self._holds(family.final_norm),
        }
        return Reading(shape=shape, called=self.called)

    def _required(self, field: str, key: Key) -> int:
        value = self._integer(field, key)
        assert value is not None, f"the family table lets {field} be null"
        return value

    def _integer(self, field: str, key: Key | None) -> int | None:
        """The number under the key; its range is checked here, relations between numbers by ModelSpec."""
        if key is None:
            return None
        given: list[tuple[str, Any]] = [(name, self.config[name]) for name in key.names if name in self.config]
        for name, value in given:
            if value is None and key.nullable:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise InputError(f"{self.where}: field {name!r} is {_shown(value)}: it must be an integer")
            if value < 1:
                raise InputError(f"{self.where}: field {name!r} is {_shown(value)}: it must be at least 1")
        if not given:
            if key.default == REQUIRED:
                raise InputError(f"{self.where}: field {' or '.join(map(repr, key.names))} is missing")
            self.called[field] = f"{key.names[-1]} (absent: the default of {self.model_type})"
            return key.default
        first_name: str = given[0][0]
        first: int | None = given[0][1]
        for name, value in given[1:]:
            if value != first:
                raise InputError(
                    f"{self.where}: fields {first_name!r} and {name!r} are {_shown(first)} and {_shown(value)}: "
                    "they are two names of one number and must be equal"
                )
        self.called[field] = first_name
        return first

    def _equal_heads(self, hidden_size: int, num_heads: int) -> int:
        if hidden_size % num_heads:
            raise InputError(
                f"{self.where}: field {self.called['num_heads']!r} is {num_heads}: it must divide "
                f"{self.called['hidden_size']!r}, which is {hidden_size}"
            )
        return hidden_size // num_heads

    def _flag(self, flag: Flag) -> bool:
        value = self.config.get(flag.name, flag.default)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: field {flag.name!r} is {_shown(value)}: it must be true or false")
        return value != flag.negate

    def _holds(self, setting: Setting) -> bool:
        if isinstance(setting, bool):
            return setting
        if isinstance(setting, Flag):
            return self._flag(setting)
        return all(self._flag(flag) for flag in setting)

    def _window(self, window: Window | None, num_layers: int, max_positions: int | None) -> tuple[int | None, int]:
        """The window in tokens and the number of layers that it limits; (None, 0) where it limits nothing."""
        if window is None or (window.switch is not None and not self._flag(window.switch)):
            return None, 0
        size = self._integer("sliding_window", window.size)
        if size is None or (max_positions is not None and size >= max_positions):
            return None, 0
        layers = num_layers if window.first_layer is None else self._sliding_layers(window.first_layer, num_layers)
        return (size, layers) if layers else (None, 0)

    def _sliding_layers(self, first_layer: Key, num_layers: int) -> int:
        kinds = self.config.get("layer_types")
        if kinds is None:
            name = first_layer.names[0]
            first = self.config.get(name, first_layer.default)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise InputError(
                    f"{self.where}: field {name!r} is {_shown(first)}: it must be an integer of at least 0"
                )
            return max(0, num_layers - first)
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in known for kind in kinds):
            raise InputError(
                f"{self.where}: field 'layer_types' is {_shown(kinds)}: it must list {num_layers} entries, "
                f"each {known[0]!r} or {known[1]!r}"
            )
        return kinds.count("sliding_attention")
