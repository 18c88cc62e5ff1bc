"""Attention over the prompt and over the cache, for any number of kv heads that divides the heads.

Caches are (batch, kv heads, tokens, head dim). Masks are boolean, True where a key may be seen; there is
no infinity in them, so a row that sees nothing is finite too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import InputError
from runtime import alibi

WHOLE_CACHE_RATIO = 4.0
"""Room : tokens up to which decode in 16 bits on a CPU reads a cache's unused room too. oneDNN's ``bmm`` copies
an operand whose batches do not touch: over 512 tokens, a cache with room for 512, 576, 2048, 3072 takes 73,
73, 206, 386 ms as a whole and 74, 431, 343, 394 ms without the room (batch 32, 32 heads of 128; AMD
EPYC, torch 2.13, one thread, least of 8, other programs running: trust the ratios). fp32 copies nothing."""

TOKENS_STEP, FEW_ROWS_STEP = 16, 64
"""The steps of :func:`tokens_read` for short caches; the second one where few rows are read. Where nothing is compiled,
the first one for all."""

FEW_ROWS = 1024
"""Rows (prompts × kv heads) up to which fewer kernels are worth more than fewer tokens read: OPT-125M with 48 rows on
three tiers for 64 tokens takes 131 MiB in steps of 64 and 139 in steps of 16. Of 48, 768, 2048 and 8192 rows with 33
tokens in records, attention takes 1.15, 1.25, 1.38 and 1.36 times as long in steps of 64 as in steps of 16, with 65
1.02, 0.96, 1.08 and 1.11 times; of 4-bit ones 0.99 to 1.21 times (two threads, least of 9)."""

QUERY_BLOCK, SCORES_AT_ONCE = 128, 2**21
"""Queries of a prompt, and scores of as many heads or prompts, that are computed at a time in bf16 on a CPU: they
stay in its caches. Of 4 prompts of 512 tokens with 32 heads, ``scaled_dot_product_attention`` takes 82 ms at head
dim 64 and 114 ms at 128, this 37 and 63 ms (AMD EPYC with AVX512-BF16, torch 2.13, two threads, least of 9)."""


def prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    key_padding_mask: Tensor | None = None,
    bias: Tensor | None = None,
    slopes: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Causal attention of a prompt: q (batch, heads, tokens, head dim), k and v with kv heads, gives q's shape.

    ``key_padding_mask`` (batch, tokens), True for real tokens; None: no padding. ``bias``, added to the
    scaled scores, broadcasts to (batch, heads, tokens, tokens). ``slopes`` (heads,) in fp32 add ALiBi's
    bias without its table. ``window``: a token sees so many, itself included. Rows of padding hold finite
    values without meaning.
    """
    _check(q, k, v)
    batch, _, tokens, _ = q.shape
    if k.shape[2] != tokens:
        raise InputError(f"q has {tokens} tokens and k has {k.shape[2]}: a prompt attends to itself")
    groups = q.shape[1] // k.shape[1]
    if groups > 1:  # copies of a prompt's keys are small beside its scores; a cache is never copied
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    if window is not None and window >= tokens:
        window = None
    in_blocks = q.device.type == "cpu"
    if bias is None and key_padding_mask is None and (in_blocks or (slopes is None and window is None)):
        return _causal(q, k, v, scale, slopes, window)
    if key_padding_mask is not None and tuple(key_padding_mask.shape) != (batch, tokens):
        raise InputError(f"key_padding_mask has shape {tuple(key_padding_mask.shape)}: it must be {(batch, tokens)}")
    if bias is None and key_padding_mask is not None and in_blocks:
        padding = _left_padding(key_padding_mask)
        if padding is not None:
            return _prefill_left_padded(q, k, v, padding, scale, slopes, window)
    mask = causal_mask(tokens, key_padding_mask, device=q.device)
    if window is not None:
        mask = mask & ~torch.ones((tokens, tokens), dtype=torch.bool, device=q.device).tril_(-window)
    if slopes is not None:
        table = alibi.prefill_bias(slopes, tokens)
        bias = table if bias is None else bias + table
    if bias is not None:
        mask = torch.where(mask, bias.to(q.dtype), torch.finfo(q.dtype).min)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    scale: float,
    tokens: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one new token: q (batch, heads, 1, head dim) over caches (batch, kv heads, room, head dim).

    ``tokens`` of the room are filled (by default as many as the mask has, else all of it). ``mask``
    (batch, tokens) is True where a key may be seen; None: everywhere. Room beyond them must hold finite
    values (``torch.zeros``), because it may be read and multiplied with 0. ``bias``, added to the scaled
    scores, broadcasts to (batch, heads, tokens). Products in the caches' type, softmax in fp32; returns
    (batch, heads, 1, head dim).
    """
    _check(q, k_cache, v_cache)
    batch, heads, new_tokens, head_dim = q.shape
    if new_tokens != 1:
        raise InputError(f"q has {new_tokens} tokens: decode takes one")
    room = k_cache.shape[2]
    if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] > room):
        raise InputError(f"mask has shape {tuple(mask.shape)}: it must be ({batch}, at most {room})")
    if tokens is None:
        tokens = room if mask is None else mask.shape[1]
    if not 1 <= tokens <= room or (mask is not None and mask.shape[1] != tokens):
        masked = "" if mask is None else f", and the mask has {mask.shape[1]}"
        raise InputError(f"tokens is {tokens}: the cache has room for {room}{masked}")
    span = room if _read_whole(k_cache, tokens) else tokens_read(tokens, room, k_cache)
    products = batch * k_cache.shape[1]
    keys, values = (cache[:, :, :span].reshape(products, span, head_dim) for cache in (k_cache, v_cache))
    query = (q * scale).reshape(products, heads // k_cache.shape[1], head_dim)
    scores = torch.bmm(query, keys.transpose(1, 2)).view(batch, heads, span).float()
    if bias is not None:
        scores[..., :tokens] += bias
    lowest = torch.finfo(torch.float32).min
    scores[..., tokens:] = lowest
    if mask is not None:
        scores[..., :tokens].masked_fill_(~mask[:, None, :], lowest)
    weights = torch.softmax(scores, dim=-1).to(v_cache.dtype).view(products, -1, span)
    return torch.bmm(weights, values).view(batch, heads, 1, head_dim)


def decode_in_parts(
    q: Tensor,
    parts: Sequence[tuple[Tensor, Tensor]],
    *,
    scale: float,
    unused: int = 0,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of one new token over a cache in several pieces: q (batch, heads, 1, head dim).

    ``parts`` are keys and values (batch, kv heads, tokens of the part, head dim) in the order of the tokens, all of
    them filled but the last ``unused``, which must hold finite values; ``mask`` and ``bias`` as in :func:`decode`,
    over those that are filled.
    """
    batch, heads, _, head_dim = q.shape
    kv_heads = parts[0][0].shape[1]
    products = batch * kv_heads
    query = (q * scale).reshape(products, heads // kv_heads, head_dim)
    flat = [[part.reshape(products, -1, head_dim) for part in pair] for pair in parts]
    scores = torch.cat([torch.bmm(query, keys.transpose(1, 2)).float() for keys, _ in flat], dim=-1)
    scores = scores.view(batch, heads, -1)
    tokens, lowest = scores.shape[-1] - unused, torch.finfo(torch.float32).min
    if bias is not None:
        scores[..., :tokens] += bias
    scores[..., tokens:] = lowest
    if mask is not None:
        scores[..., :tokens].masked_fill_(~mask[:, None, :], lowest)
    weights = torch.softmax(scores, dim=-1).to(q.dtype).view(products, -1, scores.shape[-1])
    shares = torch.split(weights, [values.shape[1] for _, values in flat], dim=-1)
    out = torch.bmm(shares[0], flat[0][1])
    for share, (_, values) in zip(shares[1:], flat[1:], strict=True):
        out = torch.baddbmm(out, share, values)
    return out.view(batch, heads, 1, head_dim)


def tokens_read(tokens: int, most: int, cache: Tensor) -> int:
    """How many tokens decode reads of a cache that holds so many, and ``most`` in the end: some of its room as well.

    For every shape of a 16-bit product on a CPU oneDNN compiles a kernel and keeps 0.3 MiB or more; a cache that grows
    by one token a step would have as many shapes as steps. So it is read in multiples of 16 (few rows: of 64), of 32
    beyond 128 tokens, of 64 beyond 256 and so on: in at most four lengths until it has doubled. With many rows that is
    a twelfth more than there is, on average.
    """
    step = TOKENS_STEP
    if _is_onednns(cache):
        few = cache.shape[0] * cache.shape[1] <= FEW_ROWS
        step = max(FEW_ROWS_STEP if few else TOKENS_STEP, 1 << max(0, (tokens - 1).bit_length() - 3))
    return min(most, -(-tokens // step) * step)


def causal_mask(tokens: int, key_padding_mask: Tensor | None = None, *, device: torch.device | str = "cpu") -> Tensor:
    """Boolean (1 or batch, 1, tokens, tokens): real tokens up to oneself, and oneself even if padding."""
    causal = torch.ones((tokens, tokens), dtype=torch.bool, device=device).tril_()
    if key_padding_mask is None:
        return causal[None, None]
    itself = torch.eye(tokens, dtype=torch.bool, device=device)
    return (causal & (key_padding_mask.bool()[:, None, :] | itself))[:, None]


def _left_padding(key_padding_mask: Tensor) -> list[int] | None:
    """Padding tokens that open each row; None if a row has padding anywhere else."""
    mask = key_padding_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        return None
    padding: list[int] = (mask.shape[1] - mask.sum(1)).tolist()
    return padding


def _prefill_left_padded(
    q: Tensor, k: Tensor, v: Tensor, padding: list[int], scale: float, slopes: Tensor | None, window: int | None
) -> Tensor:
    """Attention of each run of rows with equal padding, without that padding: no mask and no work for it."""
    batch, heads, tokens, head_dim = q.shape
    out = q.new_zeros((batch, tokens, heads, head_dim)).transpose(1, 2)  # the layout that the layer flattens
    first = 0
    while first < batch:
        last = first
        while last < batch and padding[last] == padding[first]:
            last += 1
        part = (slice(first, last), slice(None), slice(padding[first], None))
        if padding[first] < tokens:
            out[part] = _causal(q[part], k[part], v[part], scale, slopes, window)
        first = last
    return out


def _causal(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None = None, window: int | None = None
) -> Tensor:
    """Causal attention without padding; q, k and v are (batch, heads, tokens, head dim)."""
    needs_blocks = q.dtype == torch.bfloat16 or slopes is not None or window is not None
    if q.device.type == "cpu" and needs_blocks:
        return _causal_by_blocks(q, k, v, scale, slopes, window)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _causal_by_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, slopes: Tensor | None, window: int | None
) -> Tensor:
    """A few heads and a block of queries at a time, over the keys that the block may see.

    Softmax computes in fp32 from scores as the product leaves them; only ALiBi's bias needs more of them.
    """
    batch, heads, tokens, head_dim = q.shape
    out = q.new_empty((batch, tokens, heads, head_dim))  # the layout that the layer flattens
    width = min(QUERY_BLOCK, tokens)
    dtype = q.dtype if slopes is None else torch.float32
    lowest = torch.finfo(dtype).min
    future = torch.full((width, width), lowest, dtype=dtype).triu_(1)
    rows = max(1, SCORES_AT_ONCE // (width * tokens))
    for prompt in range(0, batch, max(1, rows // heads)):
        for head in range(0, heads, rows):
            some = (slice(prompt, prompt + max(1, rows // heads)), slice(head, head + rows))
            queries = torch.mul(q[some], scale, out=q.new_empty(q[some].shape)).view(-1, tokens, head_dim)
            keys, values = (part[some].reshape(-1, tokens, head_dim) for part in (k, v))
            keys = keys.transpose(1, 2).contiguous()
            steep = None if slopes is None else slopes[some[1]].repeat(q[some].shape[0])[:, None, None]
            for start in range(0, tokens, width):
                stop = min(tokens, start + width)
                first = 0 if window is None else max(0, start - window + 1)
                scores = torch.bmm(queries[:, start:stop], keys[:, :, first:stop]).to(dtype)
                if steep is not None:
                    scores.addcmul_(steep, _distance(start, stop, first))
                if window is not None:
                    behind = torch.ones(scores.shape[1:], dtype=torch.bool).tril_(start - first - window)
                    scores.masked_fill_(behind, lowest)
                scores[:, :, start - first :] += future[: stop - start, : stop - start]
                weights = torch.softmax(scores, dim=-1).to(v.dtype)
                attended = torch.bmm(weights, values[:, first:stop]).view(*q[some].shape[:2], -1, head_dim)
                out[some[0], start:stop, some[1]] = attended.transpose(1, 2)
    return out.transpose(1, 2)


def _distance(start: int, stop: int, first: int) -> Tensor:
    """Key minus query (queries, keys), of queries ``start`` to ``stop`` and keys ``first`` to ``stop``; fp32."""
    queries, keys = torch.arange(start, stop), torch.arange(first, stop)
    return (keys[None, :] - queries[:, None]).float()


def _read_whole(cache: Tensor, tokens: int) -> bool:
    """Whether reading the unused room too is cheaper than the copy that ``bmm`` makes without it."""
    return _is_onednns(cache) and cache.is_contiguous() and cache.shape[2] <= WHOLE_CACHE_RATIO * tokens


def _is_onednns(cache: Tensor) -> bool:
    """Whether products with it are oneDNN's: those in 16 bits on a CPU."""
    return cache.device.type == "cpu" and cache.dtype in (torch.bfloat16, torch.float16)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        shapes = ", ".join(str(tuple(part.shape)) for part in (q, k, v))
        raise InputError(f"q, k and v have shapes {shapes}: they must be (batch, heads, tokens, head dim)")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or q.shape[1] % k.shape[1]:
        raise InputError(f"q has shape {tuple(q.shape)} and k {tuple(k.shape)}: batch and head dim must be equal")
