"""The KV cache of one block on three tiers: what is written, attended to, stored and loaded, and when.

Rows that stay are appended to and attended to in place. All others are carried: stored when computed, loaded before
use. :mod:`runtime.cache_memory` holds them.
"""

from pathlib import Path

import torch
from torch import Tensor

from costmodel.policy import Split
from runtime import cache_attention
from runtime.cache_format import Values, copy, device_of, keys_and_values, narrow, tokens_of, write
from runtime.cache_memory import CacheMemory, Carried
from runtime.cache_shape import CacheShape, Place
from runtime.disk import DiskFile
from runtime.movers import Movers
from runtime.pending import Pending, drain


class KvCache:
    """Room for the keys and values of a block, and the way to and from it.

    ``cpu_attention`` attends to rows in host memory where they lie, and to those on disk in host memory.
    A *turn* numbers the computations of the block; every second one uses the same staging buffer.
    """

    def __init__(
        self, shape: CacheShape, split: Split, *, cpu_attention: bool, movers: Movers, directory: Path
    ) -> None:
        self.shape, self._movers = shape, movers
        self._memory = CacheMemory(shape, split, cpu_attention=cpu_attention, movers=movers, directory=directory)
        self._loading: dict[int, list[Pending]] = {}
        self._prompts_leaving: dict[int, list[Pending]] = {}
        self._records_leaving: dict[int, list[Pending]] = {}
        self._stored: dict[Place, list[Pending]] = {}

    @property
    def bytes_on(self) -> dict[str, int]:
        """Bytes of the cache by tier."""
        return self._memory.bytes_on

    @property
    def buffer_bytes(self) -> dict[str, int]:
        """Bytes of the buffers that carried rows pass through, by tier."""
        return self._memory.buffer_bytes

    @property
    def file(self) -> DiskFile | None:
        """What is on disk, if anything is."""
        return self._memory.file

    # ------------------------------------------------------------- computing

    def write_prompts(self, place: Place, turn: int, keys: Tensor, values: Tensor, *, first_prompt: int = 0) -> None:
        """Keep keys and values (prompts, kv heads, tokens, head dim) of the prompts from ``first_prompt`` on.

        :meth:`store` sends off what must go, when all prompts of the place are written.
        """
        _wait(self._prompts_leaving, turn)
        tokens = keys.shape[2]
        both = [part.reshape(-1, tokens, part.shape[-1]) for part in (keys, values)]
        begin = first_prompt * self.shape.num_kv_heads
        end = begin + len(both[0])
        for part in self._memory.parts[place]:
            low, high = max(begin, part.rows.start), min(end, part.rows.stop)
            if low >= high:
                continue
            kept = part.kept
            into = kept.road.prompt(kept.staging[turn % 2]) if isinstance(kept, Carried) else tokens_of(kept, 0, tokens)
            home = narrow(into, 1, slice(low - part.rows.start, high - part.rows.start))
            for source, half in zip(both, keys_and_values(home), strict=True):
                write(source[low - begin : high - begin].to(device_of(half)), half)

    def attend(
        self,
        place: Place,
        turn: int,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scale: float,
        new_tokens: int,
        mask: Tensor | None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Keep the keys and values of one token, and its attention (batch, heads, 1, head dim) over all tokens.

        ``new_tokens`` counts those after the prompt, this one included; ``mask`` (rows, tokens) and
        ``bias`` (rows, heads of a kv head, tokens) are by row. :meth:`finish` must have been called.
        """
        batch, heads, _, head_dim = q.shape
        total = self.shape.rows(place[1])
        query = q.reshape(total, heads // self.shape.num_kv_heads, 1, head_dim)
        newest = self.shape.format.kept(*(part.reshape(total, head_dim) for part in (keys, values)))
        tokens = self.shape.prompt_lens[place[1]] + new_tokens
        out = []
        for part in self._memory.parts[place]:
            some, here = part.rows, part.device
            one_q, one_newest = query[some].to(here), narrow(newest, 1, some)
            masks = {
                "mask": None if mask is None else mask[some].to(here),
                "bias": None if bias is None else bias[some].to(here),
            }
            if isinstance(part.kept, Carried):
                pieces = self._pieces(part.kept, turn, one_newest, new_tokens)
                most = self.shape.room(place[1])
                attended = cache_attention.attend_pieces(pieces, one_q, most_tokens=most, scale=scale, **masks)
            else:
                attended = cache_attention.append_and_attend(
                    part.kept, one_q, one_newest, tokens=tokens, scale=scale, **masks
                )
            out.append(attended.to(q.device))
        joined = out[0] if len(out) == 1 else torch.cat(out)
        return joined.view(batch, heads, 1, head_dim)

    def _pieces(self, part: Carried, turn: int, newest: Values, new_tokens: int) -> list[cache_attention.Piece]:
        """What was loaded, and the newest token, which is left in the record buffer for :meth:`store`."""
        _wait(self._records_leaving, turn)
        record = part.road.record(part.records[turn % 2])
        copy(newest, record)
        # What was stored, not what was to be stored: in 4 bits the two differ, and every tier must give the same.
        memory = part.staging[turn % 2]
        pieces = [(part.road.prompt(memory), 0, 1)]
        if new_tokens > 1:
            pieces.append((part.road.records(memory, new_tokens - 1), 1, 2))
        return [*pieces, (record, 0, 1)]

    # ---------------------------------------------------------------- moving

    def load(self, place: Place, turn: int, new_tokens: int) -> None:
        """Begin to bring the carried rows, ``new_tokens`` after the prompt included, to where they are attended."""
        after = [*self._stored.pop(place, ()), *self._prompts_leaving.pop(turn % 2, ())]
        if self._memory.relays:  # a record may still be on its way to disk through the relay of this turn
            after += self._records_leaving.get(turn % 2, ())
        pending, file = self._loading.setdefault(turn, []), self._memory.file
        name = f"cache {place[0]}.{place[1]}"
        for part in self._memory.carried(place):
            nbytes = part.road.filled_bytes(new_tokens)
            target = part.staging[turn % 2][:nbytes]
            if isinstance(part.home, Tensor):
                pending.append(self._movers.up(target, part.home[:nbytes], after=after, name=name))
                continue
            assert file is not None
            relay = self._memory.relays[turn % 2][:nbytes] if self._memory.relays else None
            before = (*after, *self._loading.get(turn - 2, ()))
            pending.append(self._movers.load(file, part.home, target, relay=relay, after=before, name=name))

    def finish(self, turn: int) -> None:
        """Wait for the load of this turn."""
        for pending in self._loading.get(turn, ()):
            pending.wait()
        self._loading.pop(turn - 2, None)

    def store(self, place: Place, turn: int, new_tokens: int) -> None:
        """Begin to send off what the computation of ``turn`` left: the prompt (0 new tokens), or the latest token."""
        name = f"cache {place[0]}.{place[1]}"
        pending: list[Pending] = []
        file = self._memory.file
        for part in self._memory.carried(place):
            if new_tokens == 0:
                source, start = part.staging[turn % 2][: part.road.prompt_bytes], 0
            else:
                source, start = part.records[turn % 2], part.road.filled_bytes(new_tokens - 1)
            if isinstance(part.home, Tensor):
                pending.append(self._movers.down(part.home[start : start + source.nbytes], source, name=name))
                continue
            assert file is not None
            relay = self._memory.relays[turn % 2][: source.nbytes] if self._memory.relays else None
            for loading in self._loading.get(turn, ()):
                loading.synchronize()
            pending.append(self._movers.store(file, part.home + start, source, relay=relay, name=name))
        leaving = self._records_leaving if new_tokens else self._prompts_leaving
        leaving.setdefault(turn % 2, []).extend(pending)
        self._stored.setdefault(place, []).extend(pending)

    def drain(self) -> None:
        """Wait for whatever is on its way."""
        drain(self._loading, self._prompts_leaving, self._records_leaving, self._stored)


def _wait(leaving: dict[int, list[Pending]], turn: int) -> None:
    """Before a buffer is written again, what was in it must have left."""
    for pending in leaving.pop(turn % 2, ()):
        pending.synchronize()
