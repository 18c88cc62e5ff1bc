"""Where every token of a block stands, and what it may see: made once a step, for all layers.

Prompts are padded on the left, so that the distance of two tokens is the difference of their places.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime import alibi, layers
from runtime.architecture import Architecture
from runtime.rotary import Rotation


@dataclass(frozen=True, kw_only=True, eq=False)
class Newest:
    """The newest token of each prompt of a batch: its rotation, and by row of the cache what it may see.

    ``mask`` (rows, tokens) and ``bias`` (rows, heads of a kv head, tokens) are as :meth:`KvCache.attend` takes them.
    """

    rotation: Rotation | None
    mask: Tensor | None
    bias: Tensor | None


class BlockPositions:
    """Positions, masks and biases of a block's batches."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        masks: Sequence[Tensor | None],
        *,
        new_tokens: int,
        architecture: Architecture,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """``shapes`` are (prompts, tokens) by batch, ``masks`` as in :class:`runtime.execute.Batch`."""
        self._shapes = list(shapes)
        self._masks = [None if mask is None else mask.bool().to(device) for mask in masks]
        self._architecture, self._device = architecture, device
        self._first_new = [
            torch.full((prompts,), tokens, device=device) if mask is None else mask.sum(1)
            for (prompts, tokens), mask in zip(self._shapes, self._masks, strict=True)
        ]
        room = max(tokens for _, tokens in self._shapes) + new_tokens
        rotary = architecture.rotary
        self._table = None if rotary is None else rotary.table(room, dtype=dtype, device=device)
        self.slopes = torch.tensor(architecture.slopes, device=device) if architecture.slopes else None
        self._newest: dict[int, dict[int | None, Newest]] = {}

    def of_prompts(self, batch: int) -> Tensor:
        """Positions (prompts, tokens) of a batch's prompts; −1 for padding."""
        mask = self._masks[batch]
        if mask is None:
            mask = torch.ones(self._shapes[batch], dtype=torch.bool, device=self._device)
        return layers.positions(mask)

    def of_newest(self, batch: int, new_tokens: int) -> Tensor:
        """Positions (prompts, 1) of the last of ``new_tokens`` tokens after the prompts."""
        return (self._first_new[batch] + (new_tokens - 1)).unsqueeze(1)

    def prompts(self, batch: int, first: int, last: int) -> tuple[Rotation | None, Tensor | None]:
        """Rotation and mask (prompts, tokens) of some prompts of a batch."""
        mask = self._masks[batch]
        if mask is None:
            tokens = self._shapes[batch][1]
            table = self._table
            return (None if table is None else table.at(torch.arange(tokens, device=self._device)[None])), None
        some = mask[first:last]
        return (None if self._table is None else self._table.at(layers.positions(some))), some

    def newest(self, batch: int, layer: int, new_tokens: int) -> Newest:
        """The last of ``new_tokens`` tokens after the prompts, as a layer sees it; made anew in layer 0."""
        if layer == 0:
            self._newest[batch] = {}
        window = self._architecture.window(layer)
        found = self._newest[batch]
        if window not in found:
            found[window] = self._make(batch, window, new_tokens, next(iter(found.values()), None))
        return found[window]

    def _make(self, batch: int, window: int | None, new_tokens: int, other: Newest | None) -> Newest:
        """``other``, of the same step, differs in its window at most."""
        mask = self._row_mask(batch, window, new_tokens)
        if other is not None:
            return Newest(rotation=other.rotation, mask=mask, bias=other.bias)
        prompts, tokens = self._shapes[batch]
        bias = None
        if self.slopes is not None:
            kv_heads = self._architecture.spec.num_kv_heads
            bias = alibi.decode_bias(self.slopes, prompts=prompts, num_kv_heads=kv_heads, tokens=tokens + new_tokens)
        rotation = None if self._table is None else self._table.at(self.of_newest(batch, new_tokens))
        return Newest(rotation=rotation, mask=mask, bias=bias)

    def _row_mask(self, batch: int, window: int | None, new_tokens: int) -> Tensor | None:
        prompts, tokens = self._shapes[batch]
        total = tokens + new_tokens
        mask = self._masks[batch]
        is_limited = window is not None and window < total
        if mask is None and not is_limited:
            return None
        seen = torch.ones((prompts, total), dtype=torch.bool, device=self._device)
        if mask is not None:
            seen[:, :tokens] = mask
        if window is not None and is_limited:
            seen[:, : total - window] = False
        return seen.repeat_interleave(self._architecture.spec.num_kv_heads, 0)
