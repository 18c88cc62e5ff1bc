"""One decoder layer for every family: which norms, biases and matrices exist is data.

A sublayer (attention or MLP) may have a norm in three places, each of which some family leaves out:

    x + output(sublayer(before(x))), then residual(·)

Most models have ``before``; opt-350m has ``residual`` only (post-norm); GLM-4 has ``before`` and
``output``. In a parallel layer both sublayers work on the same x. All functions take hidden states
(batch, tokens, hidden) and return new ones. Nothing here knows where a tensor
came from, only that all lie on one device.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import InputError
from runtime import quantization
from runtime.quantization import Quantized4bitLinear
from runtime.rotary import Rotation, rotate

# Each may write its result into its argument.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": functional.gelu,
    "gelu_new": partial(functional.gelu, approximate="tanh"),
    "gelu_fast": partial(functional.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": partial(functional.silu, inplace=True),
    "swish": partial(functional.silu, inplace=True),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu2": lambda x: functional.relu(x).square(),
    "linear": lambda x: x,
}
"""The names of a config's ``activation_function`` or ``hidden_act``, as transformers spells them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Norm:
    """LayerNorm (``"layer"``) or RMSNorm (``"rms"``) over the last dimension; weight and bias (hidden,) or none."""

    kind: Literal["layer", "rms"]
    weight: Tensor | None = None
    bias: Tensor | None = None
    epsilon: float = 1e-5


@dataclass(frozen=True)
class RowParts:
    """A weight whose rows lie in several places: the parts, from the first row to the last."""

    parts: tuple[Tensor | Quantized4bitLinear, ...]


Weight = Tensor | Quantized4bitLinear | RowParts


@dataclass(frozen=True, kw_only=True, eq=False)
class Linear:
    """A weight (out, in), as it is or in 4 bits, in one place or several, and perhaps a bias (out,)."""

    weight: Weight
    bias: Tensor | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Norms:
    """The norms of a sublayer: before it, on its output, and after the residual sum."""

    before: Norm | None = None
    output: Norm | None = None
    residual: Norm | None = None


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a layer's weights do not say themselves; :class:`InputError` if kv heads do not divide heads.

    ``attention_scale`` multiplies the scores: head_dim ** -0.5 by default. A ``parallel`` layer is
    x + attention(before(x)) + mlp(before(x)); its MLP has a norm of its own or uses the attention's.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str = "relu"
    attention_scale: float = math.nan
    parallel: bool = False

    def __post_init__(self) -> None:
        for field in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise InputError(f"{field} is {getattr(self, field)}: it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_kv_heads is {self.num_kv_heads}: it must divide num_heads, {self.num_heads}")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(sorted(ACTIVATIONS))
            raise InputError(f"activation is {self.activation!r}: it must be one of {known}")
        if math.isnan(self.attention_scale):
            object.__setattr__(self, "attention_scale", self.head_dim**-0.5)


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerWeights:
    """The matrices of one layer; ``gate`` makes the MLP down(activation(gate(x)) · up(x)).

    query (heads · head dim, hidden), key and value (kv heads · head dim, hidden), out (hidden,
    heads · head dim), up and gate (ffn, hidden), down (hidden, ffn). Any tensor may be a view into a
    larger buffer. ``query_norm`` and ``key_norm`` are over the values of each head.
    """

    query: Linear
    key: Linear
    value: Linear
    out: Linear
    up: Linear
    down: Linear
    gate: Linear | None = None
    attention_norms: Norms = Norms()
    mlp_norms: Norms = Norms()
    query_norm: Norm | None = None
    key_norm: Norm | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class EmbeddingWeights:
    """What follows the tables: ``project_in`` widens a token's row to hidden, ``norm`` comes last."""

    project_in: Linear | None = None
    norm: Norm | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadWeights:
    """Final norm, ``project_out`` and the matrix (vocabulary, embedding): the token table itself where tied."""

    matrix: Linear
    norm: Norm | None = None
    project_out: Linear | None = None


def linear(x: Tensor, weights: Linear) -> Tensor:
    """``x @ weight.T + bias`` over the last dimension, from a plain or a 4-bit weight, each part into its columns."""
    weight, bias = weights.weight, weights.bias
    rows = x.reshape(-1, x.shape[-1])  # as one matrix: torch multiplies copies of the weight for (batch, 1, in)
    if not isinstance(weight, RowParts):
        return _product(rows, weight, bias).view(*x.shape[:-1], -1)
    out = rows.new_empty((len(rows), sum(map(_out_features, weight.parts))))
    first = 0
    for part in weight.parts:
        last = first + _out_features(part)
        _product(rows, part, None if bias is None else bias[first:last], out=out[:, first:last])
        first = last
    return out.view(*x.shape[:-1], -1)


def _out_features(part: Tensor | Quantized4bitLinear) -> int:
    return part.out_features if isinstance(part, Quantized4bitLinear) else part.shape[0]


def _product(
    rows: Tensor, weight: Tensor | Quantized4bitLinear, bias: Tensor | None, *, out: Tensor | None = None
) -> Tensor:
    """Of rows (rows, in); ``out`` (rows, out) may be columns of a wider matrix."""
    if isinstance(weight, Quantized4bitLinear):
        return quantization.linear_4bit(rows, weight, bias, out=out)
    if out is None:
        return functional.linear(rows, weight, bias)
    return torch.mm(rows, weight.T, out=out) if bias is None else torch.addmm(bias, rows, weight.T, out=out)


def normalize(x: Tensor, norm: Norm | None) -> Tensor:
    """The norm over the last dimension, statistics in fp32; x itself if there is none."""
    if norm is None:
        return x
    if norm.kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.epsilon)
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.epsilon)
    return scaled.to(x.dtype) if norm.weight is None else norm.weight * scaled.to(x.dtype)


def project_qkv(
    hidden: Tensor, weights: LayerWeights, shape: LayerShape, rotation: Rotation | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (batch, heads, tokens, head dim), keys and values (batch, kv heads, tokens, head dim).

    ``rotation`` (batch or 1, tokens, rotary_dim / 2) turns queries and keys by their tokens' positions.
    """
    x = normalize(hidden, weights.attention_norms.before)
    batch, tokens, _ = x.shape

    def heads(projection: Linear, count: int) -> Tensor:
        return linear(x, projection).view(batch, tokens, count, shape.head_dim)

    query = normalize(heads(weights.query, shape.num_heads), weights.query_norm).transpose(1, 2)
    key = normalize(heads(weights.key, shape.num_kv_heads), weights.key_norm).transpose(1, 2)
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    return query, key, heads(weights.value, shape.num_kv_heads).transpose(1, 2)


def finish_layer(hidden: Tensor, attended: Tensor, weights: LayerWeights, shape: LayerShape) -> Tensor:
    """The rest of a layer after attention: ``hidden`` is its input, ``attended`` (batch, heads, tokens, head dim)."""
    merged = linear(attended.transpose(1, 2).flatten(2), weights.out)
    if shape.parallel:
        x = normalize(hidden, weights.mlp_norms.before or weights.attention_norms.before)
        return _join(_join(hidden, merged, weights.attention_norms), _mlp(x, weights, shape), weights.mlp_norms)
    hidden = _join(hidden, merged, weights.attention_norms)
    x = normalize(hidden, weights.mlp_norms.before)
    return _join(hidden, _mlp(x, weights, shape), weights.mlp_norms)


def _mlp(x: Tensor, weights: LayerWeights, shape: LayerShape) -> Tensor:
    activation = ACTIVATIONS[shape.activation]
    if weights.gate is None:
        inner = activation(linear(x, weights.up))
    else:
        inner = activation(linear(x, weights.gate)).mul_(linear(x, weights.up))
    return linear(inner, weights.down)


def positions(attention_mask: Tensor) -> Tensor:
    """Position of each token (batch, tokens) among the real ones of its row; −1 for padding."""
    mask = attention_mask.long()
    return mask.cumsum(1) * mask - 1


def embed(token_rows: Tensor, weights: EmbeddingWeights, *, position_rows: Tensor | None = None) -> Tensor:
    """Hidden states (batch, tokens, hidden) of rows of the token table and, if it is learned, of the position table."""
    hidden = token_rows if weights.project_in is None else linear(token_rows, weights.project_in)
    if position_rows is not None:
        hidden = hidden + position_rows
    return normalize(hidden, weights.norm)


def lm_head(hidden: Tensor, weights: HeadWeights) -> Tensor:
    """Logits (batch, vocabulary) of the last position of hidden states (batch, tokens, hidden), and of no other."""
    x = normalize(hidden[:, -1], weights.norm)
    if weights.project_out is not None:
        x = linear(x, weights.project_out)
    return linear(x, weights.matrix)


def _join(hidden: Tensor, output: Tensor, norms: Norms) -> Tensor:
    """The residual sum with its norms; may reuse the memory of ``output``."""
    return normalize(normalize(output, norms.output).add_(hidden), norms.residual)
