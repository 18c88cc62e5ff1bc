"""Attention of one new token a row over a cache: in the room where it stays, or in the pieces that were carried.

What is attended to as it lies is not copied; 4-bit values and records are, a few rows at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime import attention
from runtime.cache_format import Values, narrow, plain, tokens_of, write_pair
from runtime.quantization import Quantized

COPIED_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Of a carried or 4-bit cache, what attention copies at a time: records made contiguous, values in 16 bits."""

Piece = tuple[Values, int, int]
"""Values, their dimension of keys and values, and their dimension of rows."""


def append_and_attend(room: Values, q: Tensor, key: Tensor, value: Tensor, *, tokens: int, **options: Any) -> Tensor:
    """Write one token, the last of ``tokens``, to a room (2, rows, room, head dim) and attend to all of them.

    ``q`` is (rows, heads of a kv head, 1, head dim), ``key`` and ``value`` are (rows, 1, head dim); ``options`` are
    those of :func:`attend_pieces`.
    """
    write_pair(key, value, tokens_of(room, tokens - 1, tokens))
    if isinstance(room, Quantized):
        return attend_pieces([(tokens_of(room, 0, tokens), 0, 1)], q, **options)
    keys, values = room.unbind(0)
    return attention.decode(q, keys.unsqueeze(1), values.unsqueeze(1), tokens=tokens, **options)


def attend_pieces(
    pieces: Sequence[Piece], q: Tensor, *, scale: float, mask: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Attention over the tokens of all pieces, in few enough rows at a time that what is copied stays small.

    ``mask`` (rows, tokens) and ``bias`` (rows, heads of a kv head, tokens).
    """
    head_dim, (first_tokens, *others) = q.shape[-1], [_tokens_of(piece) for piece in pieces]
    later_tokens = sum(others)
    copied_tokens = later_tokens + (first_tokens if isinstance(pieces[0][0], Quantized) else 0)
    at_once = max(1, COPIED_BYTES[q.device.type] // (2 * copied_tokens * head_dim * q.dtype.itemsize))
    later = q.new_empty((2, min(at_once, len(q)), later_tokens, head_dim))
    out = torch.empty_like(q)
    for first in range(0, len(q), at_once):
        some = slice(first, min(len(q), first + at_once))
        out[some] = attention.decode_in_parts(
            q[some],
            _some_rows(pieces, some, later[:, : some.stop - first]),
            scale=scale,
            mask=None if mask is None else mask[some],
            bias=None if bias is None else bias[some],
        )
    return out


def _some_rows(pieces: Sequence[Piece], some: slice, later: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (rows, 1, tokens, head dim) of some rows.

    All after the first piece become one, in ``later`` (2, rows, tokens, head dim): products over records, whose rows
    lie far apart, take ten times as long. Always the same memory: of 8,192 rows with 40 records, copying into new
    memory takes twice the time of copying and attending.
    """
    both = _halves(pieces[0], some, later.dtype)
    start = 0
    for piece in pieces[1:]:
        stop = start + _tokens_of(piece)
        for into, half in zip(later, _halves(piece, some, later.dtype), strict=True):
            into[:, start:stop] = half
        start = stop
    pairs = [both] if start == 0 else [both, (later[0], later[1])]
    return [(keys.unsqueeze(1), values.unsqueeze(1)) for keys, values in pairs]


def _halves(piece: Piece, some: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values (rows, tokens, head dim) of some rows of a piece; a view where they are plain."""
    values, both_dim, row_dim = piece
    keys, vals = plain(narrow(values, row_dim, some), dtype).unbind(both_dim)
    if row_dim == 2:  # records: (tokens, rows, head dim)
        return keys.transpose(0, 1), vals.transpose(0, 1)
    return (keys, vals) if keys.dim() == 3 else (keys.unsqueeze(1), vals.unsqueeze(1))


def _tokens_of(piece: Piece) -> int:
    """Tokens of a piece: of the prompt or a room (2, rows, tokens, …), of records (tokens, 2, rows, …), or of one."""
    values, both_dim, _ = piece
    if both_dim == 1:
        return values.shape[0]
    return values.shape[2] if len(values.shape) == 4 else 1
