"""Description: all that tells one family from another, as data; and the architecture that it makes of a ModelSpec.

Which vectors and matrices exist, and their sizes, is the ModelSpec's to say. A description says what a
checkpoint calls them, in which order it keeps their rows, and what the config's words mean.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from costmodel.model import ModelSpec
from runtime.architecture import LAYER_MATRICES, Architecture, TensorSpec
from runtime.layers import LayerShape
from runtime.rearrange import Take, then, transposed
from runtime.rotary import Rotary


@dataclass(frozen=True, kw_only=True)
class Source:
    """A matrix of a checkpoint, and how one of ours is taken from its rows.

    ``rows`` are those of the checkpoint's matrix, None: as many as ours. ``is_transposed``: (in, out).
    """

    name: str
    rows: int | None = None
    take: Take | None = None
    is_transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Description:
    """A family's names and words; the defaults are Llama's.

    Names of ``matrices`` and ``norms`` (place → name) are within a layer, all others within ``prefix``,
    ``head`` alone stands by itself. ``windows`` has one entry a layer, or none.
    """

    prefix: str = "model."
    layer: str = "layers.{layer}."
    table: str = "embed_tokens"
    position_table: str | None = None
    position_offset: int = 0
    embedding_norm: str | None = None
    project_in: str | None = None
    project_out: str | None = None
    matrices: Mapping[str, Source]
    norms: Mapping[str, str]
    final_norm: str = "norm"
    head: str = "lm_head"
    norm_kind: Literal["layer", "rms"] = "rms"
    norm_epsilon: float
    activation: str
    parallel: bool = False
    attention_scale: float | None = None
    rotary: Rotary | None = None
    slopes: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
    renamed: tuple[tuple[str, str], ...] = ()


def build(description: Description, spec: ModelSpec) -> Architecture:
    """The architecture of a family's model."""
    d, prefix = description, description.prefix
    layer = prefix + d.layer
    head: list[TensorSpec] = []
    if spec.final_norm:
        head += _norm("norm", prefix + d.final_norm, spec.hidden_size, spec)
    if d.project_out is not None:
        head += _matrix("project_out", prefix, Source(name=d.project_out), (spec.embedding_size, spec.hidden_size))
    if spec.head_bias:
        head.append(TensorSpec(name="matrix.bias", shape=(spec.vocab_size,), source=f"{d.head}.bias"))
    if not spec.tied_head:
        head += _matrix("matrix", "", Source(name=d.head), (spec.vocab_size, spec.embedding_size))
    embedding: list[TensorSpec] = []
    if d.project_in is not None:
        embedding += _matrix("project_in", prefix, Source(name=d.project_in), (spec.hidden_size, spec.embedding_size))
    if d.embedding_norm is not None:
        embedding += _norm("norm", prefix + d.embedding_norm, spec.hidden_size, spec)
    outside = {"head.norm": spec.final_norm, "embedding.norm": d.embedding_norm is not None}
    return Architecture(
        spec=spec,
        layer_shape=_shape(d, spec),
        norm_kind=d.norm_kind,
        norm_epsilon=d.norm_epsilon,
        norms=frozenset({*d.norms, *(name for name, exists in outside.items() if exists)}),
        table=TensorSpec(
            name="tokens", shape=(spec.vocab_size, spec.embedding_size), source=f"{prefix}{d.table}.weight"
        ),
        positions=None
        if d.position_table is None
        else TensorSpec(
            name="positions", shape=(spec.position_rows, spec.hidden_size), source=f"{prefix}{d.position_table}.weight"
        ),
        position_offset=d.position_offset,
        embedding=tuple(embedding),
        layer=tuple(_layer(d, layer, spec)),
        head=tuple(head),
        prefixes=d.prefixes,
        renamed=d.renamed,
        rotary=d.rotary,
        slopes=d.slopes,
        windows=d.windows,
    )


def _shape(d: Description, spec: ModelSpec) -> LayerShape:
    return LayerShape(
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        activation=d.activation,
        parallel=d.parallel,
        attention_scale=spec.head_dim**-0.5 if d.attention_scale is None else d.attention_scale,
    )


def _layer(d: Description, prefix: str, spec: ModelSpec) -> list[TensorSpec]:
    """The vectors of the norms, then each matrix after its bias."""
    heads, kv_heads = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes = {
        "query": ((heads, spec.hidden_size), spec.qkv_bias),
        "key": ((kv_heads, spec.hidden_size), spec.qkv_bias),
        "value": ((kv_heads, spec.hidden_size), spec.qkv_bias),
        "out": ((spec.hidden_size, heads), spec.out_bias),
        "gate": ((spec.ffn_size, spec.hidden_size), spec.mlp_bias),
        "up": ((spec.ffn_size, spec.hidden_size), spec.mlp_bias),
        "down": ((spec.hidden_size, spec.ffn_size), spec.mlp_bias),
    }
    tensors: list[TensorSpec] = []
    for place, name in d.norms.items():
        width = spec.head_dim if place in ("query_norm", "key_norm") else spec.hidden_size
        tensors += _norm(place, prefix + name, width, spec)
    for matrix in (name for name in LAYER_MATRICES if name in d.matrices):
        shape, bias = shapes[matrix]
        tensors += _matrix(matrix, prefix, d.matrices[matrix], shape, bias=bias)
    return tensors


def _norm(name: str, source: str, width: int, spec: ModelSpec) -> list[TensorSpec]:
    """The vectors of one norm: weight and bias, the weight alone, or none."""
    parts = ("weight", "bias")[: spec.norm_vectors]
    return [TensorSpec(name=f"{name}.{part}", shape=(width,), source=f"{source}.{part}") for part in parts]


def _matrix(name: str, prefix: str, source: Source, shape: tuple[int, int], *, bias: bool = False) -> list[TensorSpec]:
    """A matrix (rows, columns) after its bias, if it has one."""
    rows, columns = source.rows or shape[0], shape[1]
    turned = transposed if source.is_transposed else None
    tensors = []
    if bias:
        tensors.append(
            TensorSpec(
                name=f"{name}.bias",
                shape=shape[:1],
                source=f"{prefix}{source.name}.bias",
                take=source.take,
                stored=(rows,),
            )
        )
    weight = TensorSpec(
        name=f"{name}.weight",
        shape=shape,
        source=f"{prefix}{source.name}.weight",
        take=then(turned, source.take),
        stored=(columns, rows) if turned else (rows, columns),
    )
    return [*tensors, weight]
