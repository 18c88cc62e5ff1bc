"""ALiBi (arXiv 2108.12409): a head adds to its scores a slope of its own times how far back a key lies."""

import math

import torch
from torch import Tensor


def slopes(num_heads: int) -> tuple[float, ...]:
    """A slope for each head: powers of 2^(−8 / n) for n heads, a power of two.

    For other counts the slopes of the next lower power of two come first, then every other one of the
    doubled sequence.
    """
    whole = 2 ** math.floor(math.log2(num_heads))
    first = [2 ** (-8 * number / whole) for number in range(1, whole + 1)]
    between = [2 ** (-4 * number / whole) for number in range(1, 2 * (num_heads - whole), 2)]
    return tuple(first + between)


def decode_bias(head_slopes: Tensor, *, prompts: int, num_kv_heads: int, tokens: int) -> Tensor:
    """What the newest of ``tokens`` tokens adds to its scores, by row of the cache: (rows, heads of a kv head, tokens).

    fp32. Prompts are padded on the left, so that the distance is the difference of the places.
    """
    distance = torch.arange(1 - tokens, 1, dtype=torch.float32, device=head_slopes.device)
    bias = head_slopes.view(num_kv_heads, -1, 1) * distance
    return bias.repeat(prompts, 1, 1)


def prefill_bias(head_slopes: Tensor, tokens: int) -> Tensor:
    """The same for every token of a prompt: (heads, tokens, tokens) in fp32, of which only the past is meant."""
    places = torch.arange(tokens, dtype=torch.float32, device=head_slopes.device)
    return head_slopes[:, None, None] * (places[None, :] - places[:, None])
