"""The KV cache of one block on three tiers.

A split is honoured to one *row*, one kv head of one prompt: the rows of a layer and batch are shared out in
order, and what rounding leaves over is carried to the next layer and batch, so that the whole block misses
the split by less than one row. Rows on the first tier are appended to and attended to in place; so are those
in host memory where the CPU attends. All others are carried: stored when computed, loaded before use.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costmodel.policy import Split
from runtime import attention
from runtime.cache_format import CacheFormat, RoadLayout, Values, keys_and_values, narrow, plain, write
from runtime.disk import DiskFile
from runtime.layout import FIELD_ALIGNMENT
from runtime.movers import Movers
from runtime.pending import Pending
from runtime.quantization import Quantized
from runtime.tiers import ALIGNMENT, device_buffer, host_buffer, round_up

COPIED_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
"""Of a carried or 4-bit cache, what attention copies at a time: records made contiguous, values in 16 bits."""

Place = tuple[int, int]
"""A layer and a batch of the block."""


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

    Each place gives every tier what it is owed so far, in whole rows, and the rows left to the tiers that
    are owed the largest parts of one.
    """
    fractions = (split.gpu, split.cpu, split.disk)
    found, seen, given = {}, 0, [0, 0, 0]
    for layer in range(shape.num_layers):
        for batch in range(len(shape.batch_sizes)):
            rows = shape.rows(batch)
            seen += rows
            owed = [fraction * seen - already for fraction, already in zip(fractions, given, strict=True)]
            counts = [max(0, math.floor(rows_owed)) for rows_owed in owed]
            while sum(counts) != rows:
                step = 1 if sum(counts) < rows else -1
                tiers = [tier for tier in range(3) if (fractions[tier] if step > 0 else counts[tier])]
                chosen = max(tiers, key=lambda tier: step * (owed[tier] - counts[tier]))
                counts[chosen] += step
            given = [already + count for already, count in zip(given, counts, strict=True)]
            found[layer, batch] = Share(*counts)
    return found


class KvCache:
    """Room for the keys and values of a block, and the way to and from it.

    ``cpu_attention`` attends to rows in host memory where they lie, and to those on disk in host memory.
    A *turn* numbers the computations of the block; every second one uses the same staging buffer.
    """

    def __init__(
        self, shape: CacheShape, split: Split, *, cpu_attention: bool, movers: Movers, directory: Path
    ) -> None:
        self.shape, self._movers, self._in_place = shape, movers, cpu_attention
        self._format, device = shape.format, movers.device
        self._host_device = torch.device("cpu")
        self._staging_device = self._host_device if cpu_attention else device
        self.shares = shares(shape, split)
        self.bytes_on = dict.fromkeys(("gpu", "cpu", "disk"), 0)
        self._resident = self._rooms("gpu", device)
        self._host_rooms = self._rooms("cpu", self._host_device) if cpu_attention else {}
        self._host = {} if cpu_attention else self._carried_in_host_memory()
        self.file, self._file_offsets = self._carried_on_disk(directory)
        self._staging_bytes = max(sum(round_up(road.nbytes) for road in self._roads(place)) for place in self.shares)
        self._record_bytes = max(
            sum(round_up(road.record_bytes) for road in self._roads(place)) for place in self.shares
        )
        self._staging = [device_buffer(self._staging_bytes, self._staging_device) for _ in range(2)]
        self._records = [device_buffer(self._record_bytes, self._staging_device) for _ in range(2)]
        self._relays: list[Tensor] = []
        if self._staging_device.type != "cpu":
            disk = max(self._road(place, "disk").nbytes for place in self.shares)
            self._relays = [host_buffer(disk, pinned=True) for _ in range(2)]
        self._loading: dict[int, list[Pending]] = {}
        self._prompts_leaving: dict[int, list[Pending]] = {}
        self._records_leaving: dict[int, list[Pending]] = {}
        self._stored: dict[Place, list[Pending]] = {}

    @property
    def buffer_bytes(self) -> dict[str, int]:
        """Bytes of the buffers that carried rows pass through, by tier."""
        staging = 2 * (self._staging_bytes + self._record_bytes)
        on_gpu = self._staging_device == self._movers.device
        relays = sum(relay.nbytes for relay in self._relays)
        return {"gpu": staging if on_gpu else 0, "cpu": relays + (0 if on_gpu else staging)}

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
        for first, count, into in self._homes_of_prompts(place, turn, tokens):
            low, high = max(begin, first), min(end, first + count)
            if low >= high:
                continue
            home = narrow(into, 1, slice(low - first, high - first))
            for part, half in zip(both, keys_and_values(home), strict=True):
                write(part[low - begin : high - begin].to(_device_of(half)), half)

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
        both = [part.reshape(total, 1, head_dim) for part in (keys, values)]
        share = self.shares[place]
        tokens = self.shape.prompt_lens[place[1]] + new_tokens
        out, first = [], 0
        for tier, count in (("gpu", share.gpu), ("cpu", share.cpu), ("disk", share.disk)):
            if not count:
                continue
            part = slice(first, first + count)
            first += count
            room = (
                self._resident.get(place) if tier == "gpu" else self._host_rooms.get(place) if tier == "cpu" else None
            )
            here = q.device if tier == "gpu" else self._staging_device
            inputs = _moved((query[part], both[0][part], both[1][part]), here)
            options: dict[str, Any] = {
                "scale": scale,
                "mask": None if mask is None else mask[part].to(here),
                "bias": None if bias is None else bias[part].to(here),
            }
            if room is not None:
                attended = self._attend_room(room, *inputs, tokens=tokens, **options)
            else:
                attended = self._attend_carried(place, turn, tier, *inputs, new_tokens=new_tokens, **options)
            out.append(attended.to(q.device))
        joined = out[0] if len(out) == 1 else torch.cat(out)
        return joined.view(batch, heads, 1, head_dim)

    def _attend_room(
        self, room: Values, q: Tensor, key: Tensor, value: Tensor, *, tokens: int, **options: Any
    ) -> Tensor:
        """Append one token to a room and attend to it."""
        halves = keys_and_values(room)
        for half, new in zip(halves, (key, value), strict=True):
            write(new, _tokens(half, tokens - 1, tokens))
        if isinstance(room, Quantized):
            filled = _tokens(room, 0, tokens)
            return self._by_rows(q, lambda some: _carried([(filled, 0, 1)], some, q.dtype), tokens, **options)
        keys, values = (half for half in halves if isinstance(half, Tensor))
        return attention.decode(q, keys.unsqueeze(1), values.unsqueeze(1), tokens=tokens, **options)

    def _attend_carried(
        self,
        place: Place,
        turn: int,
        tier: str,
        q: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        new_tokens: int,
        **options: Any,
    ) -> Tensor:
        """Attention over what was loaded and one token more, which is left in the record buffer for :meth:`store`."""
        road, memory = self._road(place, tier), self._staged(place, turn, tier)
        _wait(self._records_leaving, turn)
        record = road.record(self._recorded(place, turn, tier))
        for half, new in zip(keys_and_values(record), (key, value), strict=True):
            write(new.squeeze(1), half)
        # What was stored, not what was to be stored: in 4 bits the two differ, and every tier must give the same.
        pieces = [(road.prompt(memory), 0, 1)]
        if new_tokens > 1:
            pieces.append((road.records(memory, new_tokens - 1), 1, 2))
        pieces.append((record, 0, 1))
        return self._by_rows(q, lambda some: _carried(pieces, some, q.dtype), new_tokens, **options)

    def _by_rows(
        self,
        q: Tensor,
        parts: Callable[[slice], list[tuple[Tensor, Tensor]]],
        copied_tokens: int,
        *,
        scale: float,
        mask: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        """Attention over ``parts`` of a few rows at a time, so that what they copy stays small."""
        vector_bytes = self._format.head_dim * q.dtype.itemsize
        at_once = max(1, COPIED_BYTES[q.device.type] // (2 * copied_tokens * vector_bytes))
        out = torch.empty_like(q)
        for first in range(0, len(q), at_once):
            some = slice(first, min(len(q), first + at_once))
            out[some] = attention.decode_in_parts(
                q[some],
                parts(some),
                scale=scale,
                mask=None if mask is None else mask[some],
                bias=None if bias is None else bias[some],
            )
        return out

    # ---------------------------------------------------------------- moving

    def load(self, place: Place, turn: int, new_tokens: int) -> None:
        """Begin to bring the carried rows, ``new_tokens`` after the prompt included, to where they are attended."""
        after = [*self._stored.pop(place, ()), *self._prompts_leaving.pop(turn % 2, ())]
        if self._relays:  # a record may still be on its way to disk through the relay of this turn
            after += self._records_leaving.get(turn % 2, ())
        pending = self._loading.setdefault(turn, [])
        name = f"cache {place[0]}.{place[1]}"
        if place in self._host and self.shares[place].cpu:
            nbytes = self._road(place, "cpu").filled_bytes(new_tokens)
            target, source = self._staged(place, turn, "cpu")[:nbytes], self._host[place][:nbytes]
            pending.append(self._movers.up(target, source, after=after, name=name))
        if self.shares[place].disk and self.file is not None:
            nbytes = self._road(place, "disk").filled_bytes(new_tokens)
            target = self._staged(place, turn, "disk")[:nbytes]
            relay = self._relays[turn % 2][:nbytes] if self._relays else None
            offset = self._file_offsets[place]
            after += self._loading.get(turn - 2, ())
            pending.append(self._movers.load(self.file, offset, target, relay=relay, after=after, name=name))

    def finish(self, turn: int) -> None:
        """Wait for the load of this turn."""
        for pending in self._loading.get(turn, ()):
            pending.wait()
        self._loading.pop(turn - 2, None)

    def store(self, place: Place, turn: int, new_tokens: int) -> None:
        """Begin to send off what the computation of ``turn`` left: the prompt (0 new tokens), or the latest token."""
        name = f"cache {place[0]}.{place[1]}"
        pending: list[Pending] = []
        for tier in ("cpu", "disk"):
            road = self._road(place, tier)
            if not road.rows or (tier == "cpu" and self._in_place):
                continue
            if new_tokens == 0:
                source, start = self._staged(place, turn, tier)[: road.prompt_bytes], 0
            else:
                source, start = self._recorded(place, turn, tier), road.filled_bytes(new_tokens - 1)
            if tier == "cpu":
                pending.append(self._movers.down(self._host[place][start : start + source.nbytes], source, name=name))
            elif self.file is not None:
                relay = self._relays[turn % 2][: source.nbytes] if self._relays else None
                for loading in self._loading.get(turn, ()):
                    loading.synchronize()
                offset = self._file_offsets[place] + start
                pending.append(self._movers.store(self.file, offset, source, relay=relay, name=name))
        leaving = self._records_leaving if new_tokens else self._prompts_leaving
        leaving.setdefault(turn % 2, []).extend(pending)
        self._stored.setdefault(place, []).extend(pending)

    def drain(self) -> None:
        """Wait for whatever is on its way."""
        for group in (self._loading, self._prompts_leaving, self._records_leaving, self._stored):
            for pendings in group.values():
                for pending in pendings:
                    pending.synchronize()
            group.clear()

    # ---------------------------------------------------------------- memory

    def _rooms(self, tier: str, device: torch.device) -> dict[Place, Values]:
        """Rooms (2, rows, room, head dim) of a tier that is attended to in place, out of one buffer."""
        sizes = {
            place: 2 * getattr(share, tier) * self.shape.room(place[1]) * self._format.vector_bytes
            for place, share in self.shares.items()
        }
        total = sum(round_up(size, FIELD_ALIGNMENT) for size in sizes.values())
        pinned = self._movers.device.type != "cpu" and device.type == "cpu"
        memory = host_buffer(total, pinned=pinned) if device.type == "cpu" else device_buffer(total, device).zero_()
        rooms, position = {}, 0
        for place, size in sizes.items():
            rows = getattr(self.shares[place], tier)
            if rows:
                part = memory[position : position + size]
                rooms[place] = self._format.values(part, 2, rows, self.shape.room(place[1]))
            position += round_up(size, FIELD_ALIGNMENT)
        self.bytes_on[tier] += sum(sizes.values())
        return rooms

    def _carried_in_host_memory(self) -> dict[Place, Tensor]:
        roads = {place: self._road(place, "cpu") for place in self.shares}
        total = sum(road.nbytes for road in roads.values())
        memory = host_buffer(total, pinned=self._movers.device.type != "cpu")
        parts, position = {}, 0
        for place, road in roads.items():
            parts[place] = memory[position : position + road.nbytes]
            position += road.nbytes
        self.bytes_on["cpu"] += total
        return parts

    def _carried_on_disk(self, directory: Path) -> tuple[DiskFile | None, dict[Place, int]]:
        offsets, total = {}, 0
        for place in self.shares:
            offsets[place] = total
            total += self._road(place, "disk").nbytes
        self.bytes_on["disk"] += total
        return (self._movers.nameless_file(directory, total) if total else None), offsets

    def _road(self, place: Place, tier: str) -> RoadLayout:
        return RoadLayout(
            format=self._format,
            rows=getattr(self.shares[place], tier),
            prompt_len=self.shape.prompt_lens[place[1]],
            new_tokens=self.shape.new_tokens,
            alignment=ALIGNMENT if tier == "disk" else FIELD_ALIGNMENT,
        )

    def _roads(self, place: Place) -> list[RoadLayout]:
        """The carried parts of a place in the order in which they lie in a staging buffer."""
        return [self._road(place, tier) for tier in (("disk",) if self._in_place else ("cpu", "disk"))]

    def _staged(self, place: Place, turn: int, tier: str) -> Tensor:
        before = 0 if tier == "cpu" or self._in_place else round_up(self._road(place, "cpu").nbytes)
        return self._staging[turn % 2][before : before + self._road(place, tier).nbytes]

    def _recorded(self, place: Place, turn: int, tier: str) -> Tensor:
        before = 0 if tier == "cpu" or self._in_place else round_up(self._road(place, "cpu").record_bytes)
        return self._records[turn % 2][before : before + self._road(place, tier).record_bytes]

    def _homes_of_prompts(self, place: Place, turn: int, tokens: int) -> list[tuple[int, int, Values]]:
        """Where prompts are written by the computation: (first row, rows, (2, rows, tokens, head dim)) by tier."""
        share, homes, first = self.shares[place], [], 0
        for tier, count in (("gpu", share.gpu), ("cpu", share.cpu), ("disk", share.disk)):
            if count:
                room = (
                    self._resident.get(place)
                    if tier == "gpu"
                    else self._host_rooms.get(place)
                    if tier == "cpu"
                    else None
                )
                if room is None:
                    into = self._road(place, tier).prompt(self._staged(place, turn, tier))
                else:
                    into = _tokens(room, 0, tokens)
                homes.append((first, count, into))
                first += count
        return homes


def _carried(pieces: list[tuple[Values, int, int]], some: slice, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values (rows, 1, tokens, head dim) of some rows of (values, dimension of keys and values, of rows).

    All after the first piece become one: products over records, whose rows lie far apart, take ten times as long.
    """
    found: list[list[Tensor]] = []
    for values, both_dim, row_dim in pieces:
        part = narrow(values, row_dim, some)
        halves = (plain(half, dtype) for half in keys_and_values(part, dim=both_dim))
        if row_dim == 2:  # records: (tokens, rows, head dim)
            found.append([half.transpose(0, 1) for half in halves])
        else:
            found.append([half if half.dim() == 3 else half.unsqueeze(1) for half in halves])
    later = [torch.cat(parts, dim=1) for parts in zip(*found[1:], strict=True)]
    pairs = [found[0], later] if later else [found[0]]
    return [(keys.unsqueeze(1), values.unsqueeze(1)) for keys, values in pairs]


def _wait(leaving: dict[int, list[Pending]], turn: int) -> None:
    """Before a buffer is written again, what was in it must have left."""
    for pending in leaving.pop(turn % 2, ()):
        pending.synchronize()


def _tokens(values: Values, start: int, stop: int) -> Values:
    """A range of tokens of values (…, tokens, head dim), as a view."""
    return values.tokens(start, stop) if isinstance(values, Quantized) else values[..., start:stop, :]


def _device_of(values: Values) -> torch.device:
    return values.packed.device if isinstance(values, Quantized) else values.device


def _moved(tensors: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (tensor.to(device) for tensor in tensors)
    return first, second, third
