"""Attention of one new token a row over a cache: in the room where it stays, or in the pieces that were carried.

What is attended to as it lies is not copied; 4-bit values and records are, a few rows at a time.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from runtime import attention
from runtime.cache_format import Values, copy, narrow, read, select, tokens_of
from runtime.quantization import Quantized

COPIED_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Of a carried or 4-bit cache, what attention copies at a time: records made contiguous, values in 16 bits."""

Piece = tuple[Values, int, int]
"""Values, their dimension of keys and values, and their dimension of rows."""


def append_and_attend(room: Values, q: Tensor, newest: Values, *, tokens: int, **options: Any) -> Tensor:
    """Write one token, the last of ``tokens``, to a room (2, rows, room, head dim) and attend to all of them.

    ``q`` is (rows, heads of a kv head, 1, head dim), ``newest`` the token's keys and values (2, rows, head dim) as the
    cache keeps them; ``options`` are those of :func:`attend_pieces`.
    """
    copy(newest, select(room, 2, tokens - 1))
    if isinstance(room, Quantized):
        return attend_pieces([(tokens_of(room, 0, tokens), 0, 1)], q, most_tokens=room.shape[2], **options)
    keys, values = room.unbind(0)
    return attention.decode(q, keys.unsqueeze(1), values.unsqueeze(1), tokens=tokens, **options)


def attend_pieces(
    pieces: Sequence[Piece],
    q: Tensor,
    *,
    most_tokens: int,
    scale: float,
    mask: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """Attention over the tokens of all pieces, in few enough rows at a time that what is copied stays small.

    ``most_tokens`` are those of a finished sequence; ``mask`` (rows, tokens) and ``bias`` (rows, heads of a kv head,
    tokens). What is copied is read as if it were as long as :func:`runtime.attention.tokens_read` says.
    """
    head_dim = q.shape[-1]
    oldest = pieces[0][0]
    in_place, copied = (oldest, pieces[1:]) if isinstance(oldest, Tensor) else (None, pieces)
    tokens = sum(_tokens_of(piece) for piece in copied)
    most = most_tokens - (0 if in_place is None else _tokens_of(pieces[0]))
    room = attention.tokens_read(tokens, most, q[:, :1])
    at_once = max(1, COPIED_BYTES[q.device.type] // max(1, 2 * room * head_dim * q.dtype.itemsize))
    copies = q.new_empty((2, min(at_once, len(q)), room, head_dim))
    copies[:, :, tokens:] = 0
    out = torch.empty_like(q)
    for first in range(0, len(q), at_once):
        some = slice(first, min(len(q), first + at_once))
        parts = [] if in_place is None else [in_place[:, some]]
        if copied:
            parts.append(_copied(copied, some, copies[:, : some.stop - first]))
        out[some] = attention.decode_in_parts(
            q[some],
            [(keys.unsqueeze(1), values.unsqueeze(1)) for keys, values in (part.unbind(0) for part in parts)],
            scale=scale,
            unused=room - tokens,
            mask=None if mask is None else mask[some],
            bias=None if bias is None else bias[some],
        )
    return out


def _copied(pieces: Sequence[Piece], some: slice, into: Tensor) -> Tensor:
    """Keys and values of some rows of the pieces, one behind the other in ``into`` (2, rows, tokens, head dim).

    Products over records, whose rows lie far apart, take ten times as long. Always the same memory: of 8,192 rows
    with 40 records, copying into new memory takes twice the time of copying and attending.
    """
    start = 0
    for piece in pieces:
        values, both_dim, row_dim = piece
        stop = start + _tokens_of(piece)
        target = into[:, :, start:stop]
        if both_dim == 1:  # records: (tokens, 2, rows, head dim)
            target = target.permute(2, 0, 1, 3)
        source = narrow(values, row_dim, some)
        read(source, target.view(source.shape))
        start = stop
    return into


def _tokens_of(piece: Piece) -> int:
    """Tokens of a piece: of the prompt or a room (2, rows, tokens, …), of records (tokens, 2, rows, …), or of one."""
    values, both_dim, _ = piece
    if both_dim == 1:
        return values.shape[0]
    return values.shape[2] if len(values.shape) == 4 else 1
