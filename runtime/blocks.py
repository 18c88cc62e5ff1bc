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


def blocks_of(
    prompt_lens: Sequence[int], gen_lens: Sequence[int], *, gpu_batch_size: int, num_gpu_batches: int
) -> list[Block]:
    """Share out prompts, the longest generations and prompts first; every prompt is in one block.

    The last block may be short; its prompts are spread evenly over as few batches as hold them.
    """
    order = sorted(range(len(prompt_lens)), key=lambda i: (-gen_lens[i], -prompt_lens[i], i))
    size = gpu_batch_size * num_gpu_batches
    found = []
    for start in range(0, len(order), size):
        part = tuple(order[start : start + size])
        count = -(-len(part) // gpu_batch_size)
        edges = [len(part) * number // count for number in range(count + 1)]
        found.append(Block(indices=part, sizes=tuple(b - a for a, b in pairwise(edges))))
    return found


def padded(prompts: Sequence[Sequence[int]], *, pad_token_id: int) -> Batch:
    """A batch, padded on the left to its longest prompt."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    if bool((lengths == longest).all()):
        return Batch(token_ids=ids)
    mask = torch.arange(longest)[None, :] >= (longest - lengths)[:, None]
    return Batch(token_ids=ids, mask=mask)
