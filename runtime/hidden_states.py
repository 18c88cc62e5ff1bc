"""Hidden states of a block's batches between two layers, on three tiers.

The tokens of a batch are shared out in order: the first part stays, the rest is stored after a layer and
loaded before the next.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from costmodel.policy import Split
from runtime.movers import Movers
from runtime.pending import Pending, drain
from runtime.tiers import device_buffer, host_buffer, round_up


class HiddenStates:
    """Hidden states (prompts, tokens, hidden) by batch.

    With all of a split on the first tier this holds tensors and moves nothing.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        dtype: torch.dtype,
        batches: Sequence[tuple[int, int]],
        split: Split,
        movers: Movers,
        directory: Path,
    ) -> None:
        """``batches`` are (prompts, prompt length): a batch has all those tokens first, then one a prompt."""
        self._split, self._movers, self._dtype = split, movers, dtype
        self._row_bytes = hidden_size * dtype.itemsize
        self._kept: dict[int, Tensor] = {}
        self._leaving: dict[int, Tensor] = {}
        self._shapes: dict[int, torch.Size] = {}
        self._loading: dict[int, list[Pending]] = {}
        self._stored: dict[int, list[Pending]] = {}
        rooms = [self._room(prompts, prompt_len) for prompts, prompt_len in batches]
        off = max(in_host + on_disk for in_host, on_disk in rooms) * self._row_bytes
        device = movers.device
        self._staging = [device_buffer(round_up(off), device) for _ in range(2)]
        pinned = device.type != "cpu"
        self._host = [host_buffer(in_host * self._row_bytes, pinned=pinned) for in_host, _ in rooms]
        on_disk = [rows * self._row_bytes for _, rows in rooms]
        self.file, self._offsets = movers.nameless_parts(directory, on_disk)
        relay_bytes = max(on_disk) if pinned else 0
        self._load_relays, self._store_relays = (
            [host_buffer(relay_bytes, pinned=True) for _ in range(2)] for _ in range(2)
        )
        self._storing: dict[int, Pending] = {}
        self.bytes_on = {
            "gpu": sum(self._cut(prompts * length)[0] for prompts, length in batches) * self._row_bytes,
            "cpu": sum(part.nbytes for part in self._host),
            "disk": sum(on_disk),
        }
        self.buffer_bytes = {
            "gpu": 2 * self._staging[0].nbytes,
            "cpu": 4 * relay_bytes,
        }

    def put(self, batch: int, hidden: Tensor) -> None:
        """Keep what a layer computed; :meth:`store` sends off what must go."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        first, _ = self._cut(len(rows))
        self._shapes[batch] = hidden.shape
        if first == len(rows):
            self._kept[batch] = rows
        else:
            self._kept[batch], self._leaving[batch] = rows[:first].clone(), rows[first:]

    def take(self, batch: int, turn: int) -> Tensor:
        """The hidden states (prompts, tokens, hidden), after :meth:`finish`."""
        kept, shape = self._kept.pop(batch), self._shapes[batch]
        rows = shape[0] * shape[1]
        if len(kept) == rows:
            return kept.view(shape)
        nbytes = (rows - len(kept)) * self._row_bytes
        loaded = self._staging[turn % 2][:nbytes].view(self._dtype).view(-1, shape[-1])
        return torch.cat((kept, loaded)).view(shape)

    def store(self, batch: int) -> None:
        """Begin to send off what does not stay."""
        leaving = self._leaving.pop(batch, None)
        if leaving is None:
            return
        first, second = self._cut(self._tokens(batch))
        pending: list[Pending] = []
        in_host = second - first
        if in_host:
            source = _bytes(leaving[:in_host])
            pending.append(self._movers.down(self._host[batch][: source.nbytes], source, name=f"hidden {batch}"))
        if len(leaving) > in_host and self.file is not None:
            source = _bytes(leaving[in_host:])
            relay = None
            if source.is_cuda:
                relay = self._store_relays[batch % 2][: source.nbytes]
                if batch % 2 in self._storing:
                    self._storing[batch % 2].synchronize()
            storing = self._movers.store(self.file, self._offsets[batch], source, relay=relay, name=f"hidden {batch}")
            self._storing[batch % 2] = storing
            pending.append(storing)
        self._stored[batch] = pending

    def load(self, batch: int, turn: int) -> None:
        """Begin to bring back what was stored."""
        if batch not in self._shapes or batch in self._leaving:
            return
        rows = self._tokens(batch)
        first, second = self._cut(rows)
        pending = self._loading.setdefault(turn, [])
        after = self._stored.pop(batch, ())
        edge = (second - first) * self._row_bytes
        target = self._staging[turn % 2]
        if edge:
            pending.append(
                self._movers.up(target[:edge], self._host[batch][:edge], after=after, name=f"hidden {batch}")
            )
        nbytes = (rows - second) * self._row_bytes
        if nbytes and self.file is not None:
            relay = self._load_relays[turn % 2][:nbytes] if target.is_cuda else None
            pending.append(
                self._movers.load(
                    self.file,
                    self._offsets[batch],
                    target[edge : edge + nbytes],
                    relay=relay,
                    after=(*after, *self._loading.get(turn - 2, ())),
                    name=f"hidden {batch}",
                )
            )

    def finish(self, turn: int) -> None:
        """Wait for the load of this turn."""
        for pending in self._loading.get(turn, ()):
            pending.wait()
        self._loading.pop(turn - 2, None)

    def drain(self) -> None:
        """Wait for whatever is on its way."""
        drain(self._loading, self._stored)

    def _tokens(self, batch: int) -> int:
        return self._shapes[batch][0] * self._shapes[batch][1]

    def _cut(self, tokens: int) -> tuple[int, int]:
        """Where the first tier's tokens end, and the second's."""
        first = round(self._split.gpu * tokens)
        second = tokens if self._split.disk == 0 else round((self._split.gpu + self._split.cpu) * tokens)
        return first, max(first, second)

    def _room(self, prompts: int, prompt_len: int) -> tuple[int, int]:
        """Tokens that need room in host memory and on disk: few tokens round otherwise than many."""
        cuts = [(tokens, *self._cut(tokens)) for tokens in (prompts * prompt_len, prompts)]
        return max(second - first for _, first, second in cuts), max(tokens - second for tokens, _, second in cuts)


def _bytes(rows: Tensor) -> Tensor:
    """The memory of contiguous rows."""
    return rows.reshape(-1).view(torch.uint8)
