"""ModelSpec: the shape of a decoder-only transformer, in parameters, bytes and FLOPs.

Read from a Hugging Face ``config.json``; :mod:`costmodel.model_source` says which one a name stands for.
Counts equal those of the transformers models, parameter by parameter.
"""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from costmodel import config_reader, families, model_source, records
from costmodel.errors import InputError

BYTES_PER_VALUE = 2  # fp16 and bf16
COMPRESSED_BYTES_PER_VALUE = 0.5625  # 4 bits, and an fp16 scale and minimum per group of 64: 4.5 bits

_LEAST = {
    **dict.fromkeys(("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_size"), 1),
    **dict.fromkeys(("vocab_size", "embedding_size", "max_positions", "sliding_window"), 1),
    **dict.fromkeys(("position_rows", "num_sliding_layers", "norm_vectors", "norms_per_layer"), 0),
}
_LARGEST = 2**31 - 1  # of any one dimension


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A stack of equal layers between a token embedding and a head.

    Matrices are what activations are multiplied with (and what 4-bit compression applies to); vectors
    are biases and norms, always 16-bit. All counts are parameters unless the name says bytes or FLOPs.

    ``embedding_size`` is the width of the token embedding and of the head's input: where it is not
    ``hidden_size``, a ``project_in`` and a ``project_out`` matrix lie between. ``max_positions`` None
    means no limit. ``position_rows`` counts rows of a learned position table (OPT has two more than
    positions). ``norm_vectors`` is how many vectors one norm holds: 2 for LayerNorm, 1 for RMSNorm, 0
    without parameters. ``sliding_window`` limits attention to that many tokens in
    ``num_sliding_layers`` of the layers; None where no layer is limited.
    """

    __pydantic_config__ = records.STRICT

    name: str
    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    gated_mlp: bool
    vocab_size: int
    embedding_size: int
    tied_head: bool
    max_positions: int | None = None
    positions: families.Positions = "rotary"
    position_rows: int = 0
    sliding_window: int | None = None
    num_sliding_layers: int = 0
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    norm_vectors: int = 1
    norms_per_layer: int = 2
    qk_norm: bool = False
    embedding_norm: bool = False
    final_norm: bool = True

    def __post_init__(self) -> None:
        violation = _violation(vars(self), called={})
        if violation is not None:
            raise InputError(violation)

    @property
    def layer_matrix_params(self) -> int:
        """Query, key, value and output projections and the MLP of one layer."""
        attention = 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)
        return attention + self._mlp_matrices * self.hidden_size * self.ffn_size

    @property
    def layer_vector_params(self) -> int:
        """Biases and norms of one layer."""
        qkv = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        out = self.hidden_size * self.out_bias
        mlp = ((self._mlp_matrices - 1) * self.ffn_size + self.hidden_size) * self.mlp_bias
        norms = self.norms_per_layer * self._norm_params
        qk_norms = 2 * self.norm_vectors * self.head_dim * self.qk_norm
        return qkv + out + mlp + norms + qk_norms

    @property
    def layer_params(self) -> int:
        """All parameters of one layer."""
        return self.layer_matrix_params + self.layer_vector_params

    @property
    def embedding_params(self) -> int:
        """Token and position embedding, the norm after them and ``project_in``."""
        positions = self.position_rows * self.hidden_size
        norm = self._norm_params * self.embedding_norm
        return self.vocab_size * self.embedding_size + positions + norm + self._projection_params

    @property
    def head_params(self) -> int:
        """What the head has of its own: final norm, ``project_out``, bias, and the matrix if untied."""
        matrix = 0 if self.tied_head else self.vocab_size * self.embedding_size
        return matrix + self._projection_params + self._head_vector_params

    @property
    def total_params(self) -> int:
        """All parameters, a tied embedding counted once."""
        return self.num_layers * self.layer_params + self.embedding_params + self.head_params

    @property
    def head_matrix_params(self) -> int:
        """What one logits product multiplies, tied or not: vocabulary × embedding, and ``project_out``."""
        return self.vocab_size * self.embedding_size + self._projection_params

    @property
    def layer_matmul_flops_per_token(self) -> int:
        """FLOPs of one layer's matrix products for one token, attention over the cache left out."""
        return 2 * self.layer_matrix_params

    @property
    def head_flops_per_token(self) -> int:
        """FLOPs of the logits of one position."""
        return 2 * self.head_matrix_params

    @property
    def kv_values_per_token(self) -> int:
        """Values of K and V that one token leaves in one layer's cache."""
        return 2 * self.num_kv_heads * self.head_dim

    @property
    def embedding_bytes(self) -> float:
        """Bytes of ``embedding_params``, 16-bit."""
        return float(self.embedding_params * BYTES_PER_VALUE)

    @property
    def head_bytes(self) -> float:
        """Bytes of ``head_params``, 16-bit: what the head adds to the embedding."""
        return float(self.head_params * BYTES_PER_VALUE)

    @property
    def head_load_bytes(self) -> float:
        """Bytes that must be on the GPU to compute logits, 16-bit, tied or not."""
        return float((self.head_matrix_params + self._head_vector_params) * BYTES_PER_VALUE)

    def layer_weight_bytes(self, *, compressed: bool) -> float:
        """Bytes of one layer's weights; compression applies to matrices only."""
        per_value = COMPRESSED_BYTES_PER_VALUE if compressed else BYTES_PER_VALUE
        return float(self.layer_matrix_params * per_value + self.layer_vector_params * BYTES_PER_VALUE)

    def kv_bytes_per_token(self, *, compressed: bool) -> float:
        """Bytes of one token's K and V in one layer's cache."""
        return float(self.kv_values_per_token * (COMPRESSED_BYTES_PER_VALUE if compressed else BYTES_PER_VALUE))

    def attention_flops(self, *, context_len: float) -> float:
        """FLOPs of one new token's attention over ``context_len`` tokens in one layer: q·Kᵀ and p·V."""
        return 4.0 * self.num_heads * self.head_dim * context_len

    @property
    def _mlp_matrices(self) -> int:
        return 3 if self.gated_mlp else 2

    @property
    def _norm_params(self) -> int:
        return self.norm_vectors * self.hidden_size

    @property
    def _projection_params(self) -> int:
        """``project_in`` and ``project_out``, each: none where the embedding is as wide as the layers."""
        return 0 if self.embedding_size == self.hidden_size else self.embedding_size * self.hidden_size

    @property
    def _head_vector_params(self) -> int:
        return self._norm_params * self.final_norm + self.vocab_size * self.head_bias

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, name: str, where: str | None = None) -> "ModelSpec":
        """Build from a parsed ``config.json``; ``where`` (a path) opens every message.

        Raises :class:`InputError` for a config that is not of a supported decoder-only family.
        """
        place = f"model {name!r}" if where is None else where
        reading = config_reader.read(config, where=place)
        violation = _violation(reading.shape, called=reading.called)
        if violation is not None:
            raise InputError(f"{place}: {violation}")
        return cls(name=name, **reading.shape)

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "ModelSpec":
        """Read a ``config.json``, or the one in a folder; the model takes the folder's name."""
        return cls._from_source(model_source.from_file(path))

    @classmethod
    def from_catalog(cls, name: str) -> "ModelSpec":
        """Load a catalogue model, ``"opt-30b"`` in any case, also by its id on the hub: ``"facebook/opt-30b"``."""
        return cls._from_source(model_source.from_catalog(name))

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> "ModelSpec":
        """Load a catalogue model by name or hub id, a local ``config.json`` (or its folder), or any id of the hub.

        A bare name is looked up in the catalogue first (write ``./opt-30b`` for a folder of that
        name); text with a slash is a path first, if there is something at that path. Of a model on the hub that
        the catalogue does not have, ``config.json`` is fetched (or taken from the client's cache), nothing else.
        """
        return cls._from_source(model_source.find(name_or_path))

    @classmethod
    def _from_source(cls, source: model_source.Source) -> "ModelSpec":
        return cls.from_config(source.config, name=source.name, where=source.where)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready data; ``records.from_dict`` reads them back."""
        return records.to_dict(self)


def _violation(shape: Mapping[str, Any], *, called: Mapping[str, str]) -> str | None:
    """What is wrong with a shape, in the words of ``called``, or None.

    Every dimension lies in [1, 2**31 - 1]; kv heads divide heads; a learned table has rows.
    """

    def name(field: str) -> str:
        return called.get(field, field)

    for field, least in _LEAST.items():
        value = shape[field]
        if value is None and field in ("max_positions", "sliding_window"):
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            return f"{name(field)} is {value!r}: it must be an integer"
        if not least <= value <= _LARGEST:
            text = value if abs(value) < 10**20 else f"an integer of {value.bit_length()} bits"
            return f"{name(field)} is {text}: it must lie in [{least}, {_LARGEST}]"
    if shape["num_heads"] % shape["num_kv_heads"]:
        return (
            f"{name('num_kv_heads')} is {shape['num_kv_heads']}: it must divide {name('num_heads')}, "
            f"which is {shape['num_heads']}"
        )
    if (shape["positions"] == "learned") != (shape["position_rows"] > 0):
        return f"position_rows is {shape['position_rows']}: it must be above 0 for learned positions and 0 otherwise"
    if shape["num_sliding_layers"] > shape["num_layers"]:
        return f"num_sliding_layers is {shape['num_sliding_layers']}: the limit is num_layers, {shape['num_layers']}"
    if (shape["sliding_window"] is None) != (shape["num_sliding_layers"] == 0):
        return (
            f"num_sliding_layers is {shape['num_sliding_layers']} with sliding_window {shape['sliding_window']}: "
            "give both or neither"
        )
    return None


@cache
def catalog_names() -> tuple[str, ...]:
    """Names of the models in the catalogue, smallest first."""
    return tuple(sorted(model_source.entries(), key=lambda name: ModelSpec.from_catalog(name).total_params))


def catalog_config(name: str) -> dict[str, Any]:
    """A catalogue model's ``config.json`` fields, as transformers' configuration class takes them."""
    return copy.deepcopy(dict(model_source.from_catalog(name).config))
