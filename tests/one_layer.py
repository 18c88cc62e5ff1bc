"""A decoder layer with a plain cache beside it, played without the engine: what the tests of the layer run."""

from dataclasses import dataclass

from torch import Tensor

from runtime import attention
from runtime.cache_format import Values, read, tokens_of, write
from runtime.layers import LayerShape, LayerWeights, finish_layer, project_qkv


@dataclass(frozen=True)
class LayerCache:
    """Room for the keys and values of one layer and batch, zeros at first: each (batch, kv heads, room, head dim)."""

    keys: Values
    values: Values


def prefill(
    hidden: Tensor, weights: LayerWeights, shape: LayerShape, cache: LayerCache, *, mask: Tensor | None = None
) -> Tensor:
    """One layer over a prompt, hidden (batch, tokens, hidden); keys and values go to the first tokens of ``cache``.

    ``mask`` (batch, tokens) is True for real tokens.
    """
    q, k, v = project_qkv(hidden, weights, shape)
    _store(cache, k, v, position=0)
    attended = attention.prefill(q, k, v, scale=shape.attention_scale, key_padding_mask=mask)
    return finish_layer(hidden, attended, weights, shape)


def decode(
    hidden: Tensor,
    weights: LayerWeights,
    shape: LayerShape,
    cache: LayerCache,
    *,
    position: int,
    mask: Tensor | None = None,
) -> Tensor:
    """One layer over one new token, hidden (batch, 1, hidden), whose key and value go to ``position`` of ``cache``.

    ``mask`` (batch, position + 1) is True for real tokens; None: no padding.
    """
    q, k, v = project_qkv(hidden, weights, shape)
    _store(cache, k, v, position=position)
    return finish_layer(hidden, attend(q, cache, shape, tokens=position + 1, mask=mask), weights, shape)


def attend(q: Tensor, cache: LayerCache, shape: LayerShape, *, tokens: int, mask: Tensor | None = None) -> Tensor:
    """Attention of one new token over the first ``tokens`` of a cache, plain or 4-bit."""
    keys, values = (q.new_empty((*part.shape[:2], tokens, part.shape[-1])) for part in (cache.keys, cache.values))
    for part, into in ((cache.keys, keys), (cache.values, values)):
        read(tokens_of(part, 0, tokens), into)
    return attention.decode(q, keys, values, scale=shape.attention_scale, mask=mask)


def _store(cache: LayerCache, keys: Tensor, values: Tensor, *, position: int) -> None:
    for new, into in ((keys, cache.keys), (values, cache.values)):
        write(new, tokens_of(into, position, position + new.shape[2]))
