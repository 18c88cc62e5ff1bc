"""Choosing the next token: greedy, temperature, top-k and top-p, as transformers does; reproducible by seed.

A row's random number depends on its seed, its request's number and the step, and on nothing else: a request gets the
same tokens whichever batch it happens to be in, and whether or not a job was interrupted before it.
"""

import hashlib
import math
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from costmodel.errors import InputError, TierwiseError

_MOST_SEED = 2**63
_VALUES_AT_ONCE = 2**20
"""Logits that are sorted and summed at a time, so that sampling needs tens of MB whatever the batch."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens. Without ``seed`` every run differs.
    A sequence ends at an end-of-sequence token of the model or one of ``stop_token_ids`` (unless ``ignore_eos``),
    before the first of the strings ``stop`` (a string, or a sequence of them: kept as a tuple), or after
    ``max_new_tokens``.
    """

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _whole("max_new_tokens", self.max_new_tokens, least=1)
        _whole("top_k", self.top_k, least=0)
        _number("temperature", self.temperature)
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise InputError(f"temperature is {self.temperature}: it must be at least 0 (greedy) and finite")
        _number("top_p", self.top_p)
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}: it must lie in [0, 1]")
        if self.seed is not None:
            _whole("seed", self.seed, least=-_MOST_SEED, most=_MOST_SEED - 1)
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        if not isinstance(self.ignore_eos, bool):
            raise InputError(f"ignore_eos is {self.ignore_eos!r}: true or false is expected")

    @property
    def greedy(self) -> bool:
        """True where the likeliest token is always chosen."""
        return self.temperature == 0 or self.top_k == 1


def _whole(name: str, value: object, *, least: int, most: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: a whole number is expected")
    if value < least:
        raise InputError(f"{name} is {value}: it must be at least {least}")
    if most is not None and value > most:
        raise InputError(f"{name} is {value}: it must be at most {most}")


def _number(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}: a number is expected")


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string or a sequence of them as a tuple; none of them may be empty."""
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{name} is {value!r}: a string or a sequence of strings is expected")
    if "" in texts:
        raise InputError(f"{name} holds an empty string, which would end every text before it begins: leave it out")
    return tuple(texts)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    """A sequence of token ids as a tuple."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise InputError(f"{name} is {value!r}: a sequence of token ids is expected")
    for token in value:
        _whole(name, token, least=0)
    return tuple(value)


class Sampler:
    """Chooses the next token of every row of a batch; ``keys`` are the requests' own numbers."""

    def __init__(self, params: Sequence[SamplingParams], keys: Sequence[int]) -> None:
        if len(params) != len(keys):
            raise ValueError(f"{len(params)} params for {len(keys)} keys: one of each per row is expected")
        self._params = tuple(params)
        self._keys = tuple(keys)
        self._seeds = tuple(secrets.randbits(63) if row.seed is None else row.seed for row in params)
        self._random_rows = [row for row, one in enumerate(params) if not one.greedy]

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """The tokens of step ``step`` (0: the first new token): logits (rows, vocabulary) to int64 (rows,).

        The result is on the logits' device. Greedy rows take the first of the largest logits, which does not
        depend on the precision they are compared in.
        """
        if logits.dim() != 2 or logits.shape[0] != len(self._params):
            raise ValueError(f"logits have shape {tuple(logits.shape)}: ({len(self._params)}, vocabulary) is expected")
        largest, tokens = logits.max(dim=-1)
        if not bool(largest.isfinite().all()):
            raise TierwiseError("the model's logits are not finite numbers: no token can be chosen from them")
        for rows in self._slices(logits.shape[1]):
            every = len(rows) == logits.shape[0]
            chosen = self._draw(logits if every else logits[rows], rows, step)
            tokens = chosen if every else tokens.index_copy_(0, torch.tensor(rows, device=logits.device), chosen)
        return tokens

    def _slices(self, vocabulary: int) -> Iterator[list[int]]:
        """The rows that are drawn, as many at a time as bounded memory allows."""
        count = max(1, _VALUES_AT_ONCE // vocabulary)
        for start in range(0, len(self._random_rows), count):
            yield self._random_rows[start : start + count]

    def _draw(self, logits: Tensor, rows: Sequence[int], step: int) -> Tensor:
        """Invert the cumulative distribution at one uniform number a row."""
        params = [self._params[row] for row in rows]
        scores = warped(logits, params)
        cumulative = scores.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise TierwiseError("the model's logits are not finite numbers: nothing can be sampled from them")
        uniform = [_uniform(self._seeds[row], self._keys[row], step) for row in rows]
        at = torch.tensor(uniform, dtype=torch.float64, device=logits.device)[:, None] * total
        # The first token whose cumulative probability exceeds the number: one of probability 0 never does so first.
        return torch.searchsorted(cumulative, at, right=True).squeeze(-1)


def _uniform(seed: int, key: int, step: int) -> float:
    """A number in [0, 1), the same for the same arguments on every machine.

    48 bits, so that its product with a total near 1 stays below that total in double precision.
    """
    digest = hashlib.blake2b(f"{seed},{key},{step}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little") / 2**48


def warped(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Logits (rows, vocabulary) to fp32 scores: divided by the temperature, what is not kept at minus infinity.

    The operations and their order are those of transformers' TemperatureLogitsWarper, TopKLogitsWarper (which
    keeps all tokens that tie with the k-th) and TopPLogitsWarper. No row may be of temperature 0.
    """
    device = logits.device
    temperature = torch.tensor([row.temperature for row in params], dtype=torch.float32, device=device)
    scores = logits.float() / temperature[:, None]
    with_k = [row for row, one in enumerate(params) if one.top_k > 0]
    if with_k:
        rows = torch.tensor(with_k, device=device)
        scores = scores.index_copy(0, rows, _top_k(scores[rows], [params[row].top_k for row in with_k]))
    with_p = [row for row, one in enumerate(params) if one.top_p < 1]
    if with_p:
        rows = torch.tensor(with_p, device=device)
        scores = scores.index_copy(0, rows, _top_p(scores[rows], [params[row].top_p for row in with_p]))
    return scores


def _top_k(scores: Tensor, top_k: Sequence[int]) -> Tensor:
    """Drop what is below the k-th largest score of its row."""
    limits = [min(k, scores.shape[-1]) for k in top_k]
    largest = scores.topk(max(limits)).values
    least = largest.gather(1, torch.tensor(limits, device=scores.device)[:, None] - 1)
    return scores.masked_fill(scores < least, -math.inf)


def _top_p(scores: Tensor, top_p: Sequence[float]) -> Tensor:
    """Drop the least likely tokens whose probabilities sum to at most ``1 - top_p``; the likeliest stays."""
    ascending, order = scores.sort(dim=-1)
    dropped_share = torch.tensor([1 - p for p in top_p], device=scores.device)[:, None]
    drop = ascending.softmax(dim=-1).cumsum(dim=-1) <= dropped_share
    drop[:, -1] = False
    return scores.masked_fill(drop.scatter(1, order, drop), -math.inf)
