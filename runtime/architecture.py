"""Architecture: which tensors a model consists of, what a checkpoint calls them, and what a layer makes of them.

A model is a row of *units*: the token table, the position table, what else embeds, the layers, the head.
Every unit is placed by the same split. Tensors have the names of the fields that they fill in
:mod:`runtime.layers` (``query.weight``, ``mlp_norms.before.bias``), whatever the family calls them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from costmodel.model import ModelSpec
from runtime.layers import EmbeddingWeights, HeadWeights, LayerShape, LayerWeights, Linear, Norm, Norms, Weight
from runtime.rotary import Rotary

LAYER_MATRICES = ("query", "key", "value", "out", "gate", "up", "down")
"""In the order in which a layer uses them, which is the order in which they lie in memory."""


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One tensor: its name here, its shape, and its key in a checkpoint (``{layer}`` stands for the number).

    ``take`` makes it from the checkpoint's tensor, of shape ``stored``, where that holds more, or in another order.
    """

    name: str
    shape: tuple[int, ...]
    source: str
    take: Callable[[Tensor], Tensor] | None = None
    stored: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Everything about a model but its values.

    ``norms`` names the norms that exist, with parameters or without: ``attention_norms.before``,
    ``head.norm``. ``prefixes`` are what a checkpoint's keys may or may not start with, ``renamed``
    pairs a start with what older checkpoints have instead of it. ``head`` has no
    ``matrix.weight`` where the head is tied to the token table. Positions are rows of a table, a
    ``rotary`` or ``slopes`` (ALiBi, one a head). ``windows`` has, where any layer is limited, the tokens
    that each may see; None: all.
    """

    spec: ModelSpec
    layer_shape: LayerShape
    norm_kind: Literal["layer", "rms"]
    norm_epsilon: float
    norms: frozenset[str]
    table: TensorSpec
    positions: TensorSpec | None
    position_offset: int
    embedding: tuple[TensorSpec, ...]
    layer: tuple[TensorSpec, ...]
    head: tuple[TensorSpec, ...]
    prefixes: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    rotary: Rotary | None = None
    slopes: tuple[float, ...] = ()
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """How many tokens a layer's attention reaches back, the newest included; None: all."""
        return self.windows[layer] if self.windows else None

    def tensors(self) -> Iterator[tuple[TensorSpec, int | None]]:
        """Every tensor of the model, in the order of its units, and its layer (None outside the layers)."""
        outside = (self.table, *([] if self.positions is None else [self.positions]), *self.embedding)
        yield from ((tensor, None) for tensor in outside)
        for layer in range(self.spec.num_layers):
            yield from ((tensor, layer) for tensor in self.layer)
        yield from ((tensor, None) for tensor in self.head)

    @property
    def tied_head(self) -> bool:
        """Whether the logits are taken with the token table."""
        return all(tensor.name != "matrix.weight" for tensor in self.head)

    def layer_weights(self, tensors: Mapping[str, Weight]) -> LayerWeights:
        """A layer from its tensors by name."""
        matrices = {name: _linear(tensors, name) for name in LAYER_MATRICES if f"{name}.weight" in tensors}
        return LayerWeights(
            **matrices,  # type: ignore[arg-type]
            attention_norms=self._norms(tensors, "attention_norms"),
            mlp_norms=self._norms(tensors, "mlp_norms"),
            query_norm=self._norm(tensors, "query_norm"),
            key_norm=self._norm(tensors, "key_norm"),
        )

    def embedding_weights(self, tensors: Mapping[str, Weight]) -> EmbeddingWeights:
        """What makes hidden states of rows that were gathered from the two tables."""
        return EmbeddingWeights(
            project_in=_linear(tensors, "project_in"), norm=self._norm(tensors, "norm", called="embedding.norm")
        )

    def head_weights(self, tensors: Mapping[str, Weight]) -> HeadWeights:
        """The head from its tensors by name, ``matrix.weight`` (of a tied head: the token table) included."""
        matrix = _linear(tensors, "matrix")
        assert matrix is not None
        return HeadWeights(
            matrix=matrix,
            norm=self._norm(tensors, "norm", called="head.norm"),
            project_out=_linear(tensors, "project_out"),
        )

    def _norms(self, tensors: Mapping[str, Weight], name: str) -> Norms:
        before, output, residual = (
            self._norm(tensors, f"{name}.{place}") for place in ("before", "output", "residual")
        )
        return Norms(before=before, output=output, residual=residual)

    def _norm(self, tensors: Mapping[str, Weight], name: str, called: str = "") -> Norm | None:
        if (called or name) not in self.norms:
            return None
        weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
        assert weight is None or isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, Tensor)
        return Norm(kind=self.norm_kind, weight=weight, bias=bias, epsilon=self.norm_epsilon)


def _linear(tensors: Mapping[str, Weight], name: str) -> Linear | None:
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    assert bias is None or isinstance(bias, Tensor)
    return None if weight is None else Linear(weight=weight, bias=bias)
