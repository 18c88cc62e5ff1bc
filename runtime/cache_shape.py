"""What the cache of one block must hold, and which of its rows lie on which tier.

A split is honoured to one *row*, one kv head of one prompt: the rows of a layer and batch are shared out in
order, and what rounding leaves over is carried to the next layer and batch, so that the whole block misses
the split by less than one row.
"""

import math
from dataclasses import dataclass

from costmodel.policy import Split
from runtime.cache_format import CacheFormat

Place = tuple[int, int]
"""A layer and a batch of the block."""

_ROUNDING = 1e-9
"""What a whole number of rows may be short of in floating point."""


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What must be kept: prompts and prompt lengths by batch, and the tokens that follow every prompt."""

    num_layers: int
    num_kv_heads: int
    format: CacheFormat
    batch_sizes: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    new_tokens: int

    def rows(self, batch: int) -> int:
        """Rows of one layer and batch."""
        return self.batch_sizes[batch] * self.num_kv_heads

    def room(self, batch: int) -> int:
        """Tokens of a finished sequence."""
        return self.prompt_lens[batch] + self.new_tokens


@dataclass(frozen=True)
class Share:
    """How many rows of one layer and batch lie on each tier, in this order."""

    gpu: int
    cpu: int
    disk: int


def shares(shape: CacheShape, split: Split) -> dict[Place, Share]:
    """Rows by tier of every layer and batch; their sums miss ``split`` by less than a row.

    Each place gives every tier its part in whole rows, and the rows that are left to those tiers, of whose part some is
    left, that are owed the most by then: so a tier holds one of two numbers of rows of batches of one size, and
    attention has few shapes.
    """
    fractions = (split.gpu, split.cpu, split.disk)
    found, seen, given = {}, 0, [0, 0, 0]
    for layer in range(shape.num_layers):
        for batch in range(len(shape.batch_sizes)):
            rows = shape.rows(batch)
            seen += rows
            parts = [fraction * rows for fraction in fractions]
            counts = [math.floor(part + _ROUNDING) for part in parts]
            owed = [
                fraction * seen - already - count
                for fraction, already, count in zip(fractions, given, counts, strict=True)
            ]
            not_whole = [tier for tier in range(3) if parts[tier] - counts[tier] > _ROUNDING]
            for tier in sorted(not_whole, key=lambda tier: -owed[tier])[: rows - sum(counts)]:
                counts[tier] += 1
            given = [already + count for already, count in zip(given, counts, strict=True)]
            found[layer, batch] = Share(*counts)
    return found
