"""How keys and values lie in flat memory: plain or in 4 bits, by row for attention or by token for the road.

A *row* is one kv head of one prompt. Where a cache is attended to it lies as (2, rows, room, head dim),
keys first. Where it is carried to be attended to elsewhere, the prompt's tokens lie as (2, rows, tokens,
head dim) and each later token is a *record* (2, rows, head dim), so that whatever is stored or loaded is one
piece, and no more than what is there.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from runtime import quantization
from runtime.layout import parameter_dtype, values_of
from runtime.quantization import Quantized
from runtime.tiers import round_up

Values = Tensor | Quantized


@dataclass(frozen=True, kw_only=True)
class CacheFormat:
    """The type of a cache's values; ``compressed`` keeps them in 4 bits, in groups along the head dim."""

    head_dim: int
    dtype: torch.dtype
    compressed: bool

    @property
    def group_size(self) -> int:
        """Values that share a scale and a minimum."""
        return quantization.cache_group_size(self.head_dim)

    @property
    def vector_bytes(self) -> int:
        """Bytes of one head's key or value."""
        if not self.compressed:
            return self.head_dim * self.dtype.itemsize
        return self._packed + 4 * self._groups

    @property
    def _packed(self) -> int:
        return quantization.bytes_per_row(self.head_dim, group_size=self.group_size)

    @property
    def _groups(self) -> int:
        return -(-self.head_dim // self.group_size)

    def kept(self, key: Tensor, value: Tensor) -> Values:
        """Keys and values (rows, head dim) of a token as the cache keeps them: (2, rows, head dim).

        4-bit ones are rounded together, in half the calls.
        """
        both = torch.stack((key, value))
        if not self.compressed:
            return both
        return quantization.quantize(both, group_size=self.group_size, parameter_dtype=parameter_dtype(self.dtype))

    def values(self, memory: Tensor, *leading: int) -> Values:
        """Values (\\*leading, head dim) over memory (…, bytes), of which the leading dimensions but one are kept.

        ``memory`` is flat, or (records, stride) where the first of ``leading`` counts records.
        """
        counted = leading[1:] if memory.dim() == 2 else leading
        vectors = values_of(counted)
        if not self.compressed:
            return _shaped(_typed(memory, 0, vectors * self.vector_bytes, self.dtype), *leading, self.head_dim)
        dtype = parameter_dtype(self.dtype)
        packed, groups = vectors * self._packed, vectors * self._groups * 2
        return Quantized(
            packed=_shaped(memory[..., :packed], *leading, self._packed),
            scale=_shaped(_typed(memory, packed, groups, dtype), *leading, self._groups),
            minimum=_shaped(_typed(memory, packed + groups, groups, dtype), *leading, self._groups),
            shape=(*leading, self.head_dim),
            group_size=self.group_size,
        )


@dataclass(frozen=True, kw_only=True)
class RoadLayout:
    """A carried cache of ``rows`` rows: the prompt's tokens, then room for ``new_tokens`` records.

    Each begins at a multiple of ``alignment``: on disk that is a page.
    """

    format: CacheFormat
    rows: int
    prompt_len: int
    new_tokens: int
    alignment: int

    @cached_property
    def prompt_bytes(self) -> int:
        """Bytes of the prompt's keys and values."""
        return round_up(2 * self.rows * self.prompt_len * self.format.vector_bytes, self.alignment)

    @cached_property
    def record_bytes(self) -> int:
        """Bytes from one later token to the next."""
        return round_up(2 * self.rows * self.format.vector_bytes, self.alignment)

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return self.prompt_bytes + self.new_tokens * self.record_bytes

    def filled_bytes(self, new_tokens: int) -> int:
        """Bytes of the prompt and the first ``new_tokens`` records: one piece."""
        return self.prompt_bytes + new_tokens * self.record_bytes

    def prompt(self, memory: Tensor) -> Values:
        """(2, rows, prompt_len, head dim) over the first bytes of flat memory."""
        return self.format.values(memory[: self.prompt_bytes], 2, self.rows, self.prompt_len)

    def records(self, memory: Tensor, count: int) -> Values:
        """(count, 2, rows, head dim): the later tokens."""
        tail = memory[self.prompt_bytes : self.filled_bytes(count)].view(count, self.record_bytes)
        return self.format.values(tail, count, 2, self.rows)

    def record(self, memory: Tensor) -> Values:
        """(2, rows, head dim) over the first bytes of the memory of one record."""
        return self.format.values(memory, 2, self.rows)


def keys_and_values(both: Values, *, dim: int = 0) -> tuple[Values, Values]:
    """The two halves of values whose dimension ``dim`` holds keys, then values."""
    return select(both, dim, 0), select(both, dim, 1)


def select(values: Values, dim: int, index: int) -> Values:
    """``values.select(dim, index)`` for plain and 4-bit values; ``dim`` counts from the front."""
    if isinstance(values, Tensor):
        return values.select(dim, index)
    packed, scale, minimum = (part.select(dim, index) for part in (values.packed, values.scale, values.minimum))
    shape = (*values.shape[:dim], *values.shape[dim + 1 :])
    return Quantized(packed=packed, scale=scale, minimum=minimum, shape=shape, group_size=values.group_size)


def narrow(values: Values, dim: int, some: slice) -> Values:
    """A range of one dimension (counted from the front) of plain and 4-bit values, as a view."""
    place = (*(slice(None),) * dim, some)
    if isinstance(values, Tensor):
        return values[place]
    packed, scale, minimum = (part[place] for part in (values.packed, values.scale, values.minimum))
    shape = (*values.shape[:dim], packed.shape[dim], *values.shape[dim + 1 :])
    return Quantized(packed=packed, scale=scale, minimum=minimum, shape=shape, group_size=values.group_size)


def tokens_of(values: Values, start: int, stop: int) -> Values:
    """A range of tokens of values (…, tokens, head dim), as a view."""
    return values.tokens(start, stop) if isinstance(values, Quantized) else values[..., start:stop, :]


def device_of(values: Values) -> torch.device:
    """Where the values lie."""
    return values.packed.device if isinstance(values, Quantized) else values.device


def write(source: Tensor, into: Values) -> None:
    """Store plain values, rounding them where the room is 4-bit."""
    if isinstance(into, Quantized):
        quantization.quantize_into(source, into)
    else:
        into.copy_(source)


def copy(source: Values, into: Values) -> None:
    """Copy values as they are kept to room of the same shape, on any device."""
    for part, room in zip(_parts(source), _parts(into), strict=True):
        room.copy_(part)


def read(values: Values, into: Tensor) -> None:
    """Copy values of the same shape to where they can be multiplied with, dequantising 4-bit ones."""
    if isinstance(values, Quantized):
        quantization.dequantize(values, dtype=into.dtype, out=into)
    else:
        into.copy_(values)


def _parts(values: Values) -> tuple[Tensor, ...]:
    return (values,) if isinstance(values, Tensor) else (values.packed, values.scale, values.minimum)


def _typed(memory: Tensor, start: int, nbytes: int, dtype: torch.dtype) -> Tensor:
    return memory[..., start : start + nbytes].view(dtype)


def _shaped(memory: Tensor, *shape: int) -> Tensor:
    """Flat values, or records of flat values, in their shape; never a copy."""
    return memory.view(shape)
