"""Where the KV cache of one block lies: rooms, homes of what is carried, and the buffers that it passes through.

Rows on the first tier stay in a room; so do those in host memory where the CPU attends. All others are carried:
their home is in host memory or in a nameless file, and staging buffers bring them to where they are attended to.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from costmodel.policy import TIERS, Split
from runtime.cache_format import RoadLayout, Values
from runtime.cache_shape import CacheShape, Place, shares
from runtime.layout import FIELD_ALIGNMENT
from runtime.movers import Movers
from runtime.tiers import ALIGNMENT, device_buffer, host_buffer, side_by_side


@dataclass(frozen=True, kw_only=True, eq=False)
class Carried:
    """Rows that are stored when computed and loaded before use.

    ``home`` is their part of host memory, or the offset of their part of the file. ``staging`` and ``records`` are
    their parts of the two buffers that they pass through, and of those in which their newest token is left.
    """

    road: RoadLayout
    home: Tensor | int
    staging: tuple[Tensor, Tensor]
    records: tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A range of the rows of one layer and batch, which lie on one tier and are attended to on ``device``.

    What stays has its room (2, rows, room, head dim) there.
    """

    rows: slice
    device: torch.device
    kept: Values | Carried


class CacheMemory:
    """All memory of a block's cache, allocated when made.

    ``parts`` are those of every layer and batch in the order of their rows; ``file`` holds what is on disk, and on
    CUDA ``relays`` are two host buffers through which that passes. ``bytes_on`` counts rows by tier, without buffers.
    """

    def __init__(
        self, shape: CacheShape, split: Split, *, cpu_attention: bool, movers: Movers, directory: Path
    ) -> None:
        self._shape, self._movers = shape, movers
        self._shares = shares(shape, split)
        host = torch.device("cpu")
        self._staging_device = host if cpu_attention else movers.device
        self.bytes_on = dict.fromkeys(TIERS, 0)
        kept_on = {"gpu": movers.device, "cpu": host} if cpu_attention else {"gpu": movers.device}
        rooms = {tier: self._rooms(tier, device) for tier, device in kept_on.items()}
        roads = {
            place: {tier: self._road(place, tier) for tier in TIERS if tier not in kept_on} for place in self._shares
        }
        homes: dict[str, dict[Place, Tensor] | dict[Place, int]] = {}
        if "cpu" not in kept_on:
            homes["cpu"] = self._host_memory({place: road["cpu"].nbytes for place, road in roads.items()})
        on_disk = {place: road["disk"].nbytes for place, road in roads.items()}
        self.bytes_on["disk"] = sum(on_disk.values())
        self.file, offsets = movers.nameless_parts(directory, on_disk.values())
        homes["disk"] = dict(zip(roads, offsets, strict=True))
        self._staging = self._buffers([road.nbytes for road in by_tier.values()] for by_tier in roads.values())
        self._records = self._buffers([road.record_bytes for road in by_tier.values()] for by_tier in roads.values())
        relayed = max(on_disk.values()) if self._staging_device.type != "cpu" else 0
        self.relays = [host_buffer(relayed, pinned=True) for _ in range(2)] if relayed else []
        self.parts: dict[Place, list[Part]] = {}
        for place, by_tier in roads.items():
            kept: dict[str, Values | Carried] = {tier: found[place] for tier, found in rooms.items() if place in found}
            kept |= self._carried(by_tier, {tier: home[place] for tier, home in homes.items()})
            self.parts[place] = self._in_order(place, kept)

    @property
    def buffer_bytes(self) -> dict[str, int]:
        """Bytes of the buffers that carried rows pass through, by tier."""
        staging = sum(buffer.nbytes for buffer in (*self._staging, *self._records))
        on_gpu = self._staging_device == self._movers.device
        relays = sum(relay.nbytes for relay in self.relays)
        return {"gpu": staging if on_gpu else 0, "cpu": relays + (0 if on_gpu else staging)}

    def carried(self, place: Place) -> list[Carried]:
        """The rows of a place that do not stay where they are attended to."""
        return [part.kept for part in self.parts[place] if isinstance(part.kept, Carried)]

    def _road(self, place: Place, tier: str) -> RoadLayout:
        return RoadLayout(
            format=self._shape.format,
            rows=getattr(self._shares[place], tier),
            prompt_len=self._shape.prompt_lens[place[1]],
            new_tokens=self._shape.new_tokens,
            alignment=ALIGNMENT if tier == "disk" else FIELD_ALIGNMENT,
        )

    def _buffers(self, sizes: Iterable[list[int]]) -> tuple[Tensor, Tensor]:
        """For every second turn, with room for the largest row of parts, where carried rows are attended to."""
        nbytes = max(side_by_side(parts)[1] for parts in sizes)
        return device_buffer(nbytes, self._staging_device), device_buffer(nbytes, self._staging_device)

    def _host_memory(self, sizes: dict[Place, int]) -> dict[Place, Tensor]:
        """Homes of these sizes out of one buffer."""
        offsets, total = side_by_side(sizes.values(), FIELD_ALIGNMENT)
        memory = host_buffer(total, pinned=self._movers.device.type != "cpu")
        self.bytes_on["cpu"] += total
        starts = zip(sizes.items(), offsets, strict=True)
        return {place: memory[start : start + nbytes] for (place, nbytes), start in starts}

    def _rooms(self, tier: str, device: torch.device) -> dict[Place, Values]:
        """Rooms (2, rows, room, head dim) of a tier that is attended to in place, out of one buffer."""
        sizes = {
            place: 2 * getattr(share, tier) * self._shape.room(place[1]) * self._shape.format.vector_bytes
            for place, share in self._shares.items()
        }
        offsets, total = side_by_side(sizes.values(), FIELD_ALIGNMENT)
        pinned = self._movers.device.type != "cpu" and device.type == "cpu"
        memory = host_buffer(total, pinned=pinned) if device.type == "cpu" else device_buffer(total, device).zero_()
        self.bytes_on[tier] += sum(sizes.values())
        return {
            place: self._shape.format.values(
                memory[start : start + nbytes], 2, getattr(self._shares[place], tier), self._shape.room(place[1])
            )
            for (place, nbytes), start in zip(sizes.items(), offsets, strict=True)
            if nbytes
        }

    def _carried(self, roads: dict[str, RoadLayout], homes: dict[str, Tensor | int]) -> dict[str, Carried]:
        """The carried rows of one place by tier; they lie in this order in the buffers."""
        staged, _ = side_by_side(road.nbytes for road in roads.values())
        recorded, _ = side_by_side(road.record_bytes for road in roads.values())
        return {
            tier: Carried(
                road=road,
                home=homes[tier],
                staging=_both(self._staging, in_staging, road.nbytes),
                records=_both(self._records, in_records, road.record_bytes),
            )
            for (tier, road), in_staging, in_records in zip(roads.items(), staged, recorded, strict=True)
            if road.rows
        }

    def _in_order(self, place: Place, kept: dict[str, Values | Carried]) -> list[Part]:
        """The parts of a place in the order of their rows: that of the tiers."""
        parts, first = [], 0
        for tier in TIERS:
            count = getattr(self._shares[place], tier)
            if count:
                device = self._movers.device if tier == "gpu" else self._staging_device
                parts.append(Part(rows=slice(first, first + count), device=device, kept=kept[tier]))
            first += count
        return parts


def _both(buffers: tuple[Tensor, Tensor], start: int, nbytes: int) -> tuple[Tensor, Tensor]:
    first, second = (buffer[start : start + nbytes] for buffer in buffers)
    return first, second
