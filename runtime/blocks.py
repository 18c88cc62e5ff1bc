"""Prompts into blocks: long beside long, so that little padding is computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from runtime.execute import Batch


@dataclass(frozen=True, kw_only=True)
class Block:
    """The prompts that are run together: ``indices`` in the order of their batches, ``sizes`` of the batches."""

    indices: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def batches(self) -> list[tuple[int, ...]]:
        """The indices of each batch."""
        found, first = [], 0
        for size in self.sizes:
            found.append(self.indices[first : first + size])
            first += size
        return found


def in_order(prompt_lens: Sequence[int], gen_lens: Sequence[int]) -> list[int]:
    """The prompts' indices, the longest generations and prompts first: neighbours make good blocks."""
    return sorted(range(len(prompt_lens)), key=lambda i: (-gen_lens[i], -prompt_lens[i], i))


def block_of(indices: Sequence[int], gpu_batch_size: int) -> Block:
    """One block, its prompts spread evenly over as few batches as hold them."""
    count = -(-len(indices) // gpu_batch_size)
    edges = [len(indices) * number // count for number in range(count + 1)]
    return Block(indices=tuple(indices), sizes=tuple(b - a for a, b in pairwise(edges)))


def padded(prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> Batch:
    """A batch, padded on the left to its longest prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if bool((lengths == longest).all()):
        return Batch(token_ids=ids)
    mask = torch.arange(longest)[None, :] >= (longest - lengths)[:, None]
    return Batch(token_ids=ids, mask=mask)
