"""Weights placed by a split: a part of every unit resident, a part in host memory, the rest in the image on disk.

What is not resident is streamed, one layer ahead, into one of two staging buffers. Byte j of a unit lies
at an address that equals j modulo the page size wherever it is, so that the disk writes into place.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from costmodel.policy import Split
from runtime.image import Image
from runtime.layers import EmbeddingWeights, HeadWeights, LayerWeights, RowParts, Weight
from runtime.layout import GROUP_SIZE, Field, UnitLayout
from runtime.movers import Movers
from runtime.pending import Pending, drain
from runtime.quantization import LINEAR_BLOCK, Quantized4bitLinear
from runtime.tables import Table
from runtime.tiers import ALIGNMENT, device_buffer, host_buffer, round_up, side_by_side

BOUNCE_BYTES = 16 * 2**20
"""Host memory through which resident weights pass on their way to a CUDA device, once."""


@dataclass(frozen=True, kw_only=True)
class PlacedUnit:
    """A unit cut in three: [0, resident) on the first tier, [resident, host) on the second, the rest on disk.

    ``file_offset`` is where the unit begins in the image. A tensor that is read where it lies begins at
    ``memory_start`` of its unit: buffers hold whole pages.
    """

    name: str
    layout: UnitLayout
    file_offset: int
    resident: int
    host: int

    @property
    def nbytes(self) -> int:
        """Bytes of the unit."""
        return self.layout.nbytes

    @property
    def streamed(self) -> int:
        """Bytes that every use must load."""
        return self.nbytes - self.resident

    @property
    def page(self) -> int:
        """Offset of the page in which the streamed part begins."""
        return self.resident // ALIGNMENT * ALIGNMENT

    @property
    def staging_bytes(self) -> int:
        """Whole pages around the streamed part."""
        return round_up(self.nbytes) - self.page if self.streamed else 0

    @property
    def disk_pages(self) -> tuple[int, int]:
        """What to read, in whole pages where that overwrites nothing of the second tier's part; empty if nothing."""
        if self.host == self.nbytes:
            return self.host, self.host
        return self.page if self.host == self.resident else self.host, round_up(self.nbytes)


class Weights:
    """The weights of one model on three tiers.

    ``num_loads`` counts what is streamed in turn: every layer, then the head (with the token table where
    they are tied). :meth:`start` begins a part of a load, :meth:`finish` waits for all of its parts, and
    only then may its weights be used, until the load after the next one begins.
    """

    def __init__(self, image: Image, split: Split, movers: Movers) -> None:
        self.image, self.split, self._movers = image, split, movers
        self.architecture = image.architecture
        self.units = [
            PlacedUnit(
                name=name,
                layout=unit,
                file_offset=image.layout.offsets[name],
                resident=cuts[0],
                host=cuts[1],
            )
            for (name, unit), cuts in zip(image.layout.units, image.layout.cuts(split), strict=True)
        ]
        by_name = {unit.name: unit for unit in self.units}
        layers = [[by_name[f"layers.{number}"]] for number in range(image.layout.num_layers)]
        head = [by_name["head"]] + ([by_name["table"]] if self.architecture.tied_head else [])
        self.loads: list[list[PlacedUnit]] = [*layers, head]
        self.num_loads = len(self.loads)
        self._file = movers.open(image.path)
        device = movers.device
        self._slots, resident_bytes = _slots(self.units, lambda unit: unit.resident)
        self._resident = device_buffer(resident_bytes, device)
        self._host_slots, host_bytes = _slots(self.units, _host_pages)
        self._host = host_buffer(host_bytes, pinned=device.type != "cpu")
        self.staging_bytes = max(sum(unit.staging_bytes for unit in load) for load in self.loads)
        self._staging = [device_buffer(self.staging_bytes, device) for _ in range(2)]
        self.relay_bytes = 0
        if device.type != "cpu":
            self.relay_bytes = max(sum(_disk_bytes(unit) for unit in load) for load in self.loads)
        self._relays = [host_buffer(self.relay_bytes, pinned=True) for _ in range(2)]
        self._waiting: dict[int, list[Pending]] = {}
        self._relay_users: dict[int, list[Pending]] = {}
        self._views: dict[tuple[int, int], Mapping[str, Weight]] = {}

    @cached_property
    def bytes_on(self) -> dict[str, int]:
        """Bytes of weights by tier, without the pages' slack."""
        return {
            "gpu": sum(unit.resident for unit in self.units),
            "cpu": sum(unit.host - unit.resident for unit in self.units),
            "disk": sum(unit.nbytes - unit.host for unit in self.units),
        }

    @property
    def buffer_bytes(self) -> dict[str, int]:
        """Bytes of the buffers that loads pass through, by tier."""
        return {"gpu": 2 * self.staging_bytes, "cpu": 2 * self.relay_bytes}

    def fill(self) -> None:
        """Read what stays in memory from the image; to be called once, before anything else."""
        for unit in self.units:
            if unit.resident:
                slot = self._slots[unit.name]
                target = self._resident[slot : slot + round_up(unit.resident)]
                self._read_resident(unit.file_offset, target)
                _part_scales(unit, target)
            if unit.host > unit.resident:
                slot = self._host_slots[unit.name]
                target = self._host[slot : slot + _host_pages(unit)]
                self._movers.disk.read(self._file, unit.file_offset + unit.page, target).synchronize()

    def _read_resident(self, offset: int, target: Tensor) -> None:
        """Fill a part of the first tier; on CUDA through a small buffer."""
        if target.device.type == "cpu":
            self._movers.disk.read(self._file, offset, target, name="resident weights").synchronize()
            return
        bounce = host_buffer(min(BOUNCE_BYTES, target.nbytes), pinned=True)
        for start in range(0, target.nbytes, BOUNCE_BYTES):
            piece = bounce[: min(BOUNCE_BYTES, target.nbytes - start)]
            self._movers.disk.read(self._file, offset + start, piece, name="resident weights").synchronize()
            self._movers.copier.copy(target[start : start + piece.nbytes], piece).synchronize()

    # ------------------------------------------------------------ streaming

    def start(self, load: int, turn: int, *, part: int = 0, parts: int = 1) -> None:
        """Begin to move one of ``parts`` shares of a load; ``turn`` counts loads and picks the buffer."""
        position, relayed = 0, 0
        pending = self._waiting.setdefault(turn, [])
        self._relay_users.pop(turn - 3, None)
        for unit in self.loads[load]:
            target = self._staging[turn % 2][position : position + unit.staging_bytes]
            name = f"weights {unit.name}"
            first, last = _share(unit.resident, unit.host, part, parts)
            if last > first:
                source = self._host[self._host_slots[unit.name] :]
                places = slice(first - unit.page, last - unit.page)
                pending.append(self._movers.up(target[places], source[places], name=name))
            begin, end = unit.disk_pages
            first, last = _share(begin, end, part, parts)
            if last > first:
                into = target[first - unit.page : last - unit.page]
                # As far from a page as the file is, or the disk is read through the page cache.
                relay = self._relay(turn, relayed + first - begin // ALIGNMENT * ALIGNMENT, last - first)
                after = self._relay_users.get(turn - 2, ())
                loaded = self._movers.load(
                    self._file, unit.file_offset + first, into, relay=relay, after=after, name=name
                )
                pending.append(loaded)
                if self.relay_bytes:
                    self._relay_users.setdefault(turn, []).append(loaded)
            relayed += _disk_bytes(unit)
            position += unit.staging_bytes

    def _relay(self, turn: int, start: int, nbytes: int) -> Tensor | None:
        return self._relays[turn % 2][start : start + nbytes] if self.relay_bytes else None

    def finish(self, turn: int) -> None:
        """Wait until every part of this turn's load that was started has arrived."""
        for pending in self._waiting.pop(turn, ()):
            pending.wait()

    def drain(self) -> None:
        """Wait for whatever is on its way and forget it."""
        drain(self._waiting)

    # ---------------------------------------------------------------- views

    def layer(self, number: int, turn: int) -> LayerWeights:
        """The weights of a layer whose load has finished."""
        return self.architecture.layer_weights(self._tensors(number, turn))

    def head(self, turn: int) -> HeadWeights:
        """The head, after its load has finished."""
        tensors = dict(self._tensors(self.num_loads - 1, turn))
        if self.architecture.tied_head:
            tensors["matrix.weight"] = tensors.pop("tokens")
        return self.architecture.head_weights(tensors)

    def streamed_table(self, turn: int) -> Tensor | None:
        """Rows of the token table that came with the head, behind the resident ones; ``None`` if none did."""
        if not self.architecture.tied_head:
            return None
        tokens = self._tensors(self.num_loads - 1, turn)["tokens"]
        if isinstance(tokens, RowParts):
            tokens = tokens.parts[-1]
        assert isinstance(tokens, Tensor)
        return tokens

    def embedding(self) -> EmbeddingWeights:
        """What follows the tables; small, so it is read when a block begins."""
        unit = next(unit for unit in self.units if unit.name == "embedding")
        buffer = host_buffer(round_up(unit.nbytes))
        if unit.nbytes:
            self._movers.disk.read(self._file, unit.file_offset, buffer).synchronize()
        here = buffer.to(self._movers.device)
        return self.architecture.embedding_weights(
            {field.name: _tensor(field, here[field.offset :]) for field in unit.layout.fields}
        )

    def table(self, name: str) -> Table | None:
        """The rows of ``"table"`` or ``"positions"``, wherever they lie; ``None`` if there is none."""
        unit = next(unit for unit in self.units if unit.name == name)
        if not unit.layout.fields:
            return None
        (field,) = unit.layout.fields
        row = field.piece_bytes
        slot = self._slots[name]
        resident = _tensor(field, self._resident[slot:], rows=unit.resident // row)
        host_rows = (unit.host - unit.resident) // row
        slot = self._host_slots[name] + unit.resident - unit.page
        host = _tensor(field, self._host[slot:], rows=host_rows)
        return Table(
            resident=resident,
            host=host,
            file=self._file,
            file_offset=unit.file_offset,
            num_rows=field.shape[0],
            movers=self._movers,
        )

    def _tensors(self, load: int, turn: int) -> Mapping[str, Weight]:
        key = (load, turn % 2 if self.staging_bytes else 0)
        if key not in self._views:
            found: dict[str, Weight] = {}
            position = 0
            for unit in self.loads[load]:
                staged = self._staging[turn % 2][position : position + unit.staging_bytes]
                found |= self._unit_tensors(unit, staged)
                position += unit.staging_bytes
            self._views[key] = found
        return self._views[key]

    def _unit_tensors(self, unit: PlacedUnit, staged: Tensor) -> dict[str, Weight]:
        slot = self._slots[unit.name]
        resident = self._resident[slot : slot + round_up(unit.resident)]

        def plain(field: Field) -> Tensor | RowParts:
            if field.stop <= unit.resident:
                return _tensor(field, resident[field.offset :])
            if field.offset >= unit.resident:
                return _tensor(field, staged[field.offset - unit.page :])
            rows = (unit.resident - field.offset) // field.piece_bytes
            first = _tensor(field, resident[field.offset :], rows=rows)
            last = _tensor(field, staged[unit.resident - unit.page :], rows=field.shape[0] - rows)
            return RowParts((first, last))

        found: dict[str, Weight] = {}
        for field in unit.layout.fields:
            name, _, kind = field.name.partition(":")
            if not kind:
                found[name] = plain(field)
            elif kind == "packed":
                scales = plain(unit.layout.field(f"{name}:scales"))
                assert isinstance(scales, Tensor)
                found[name] = _compressed(plain(field), scales, field.rows)
        return found


def _compressed(packed: Tensor | RowParts, scales: Tensor, rows: int) -> Weight:
    if isinstance(packed, Tensor):
        return _four_bit(packed, scales, rows)
    first, last = packed.parts
    assert isinstance(first, Tensor)
    assert isinstance(last, Tensor)
    edge = first.shape[0] * LINEAR_BLOCK
    halves = zip((first, last), _parted(scales, edge), (edge, rows - edge), strict=True)
    return RowParts(tuple(_four_bit(*half) for half in halves))


def _part_scales(unit: PlacedUnit, resident: Tensor) -> None:
    """Lay the scales of a matrix that is cut so that each part's are contiguous, as the 4-bit kernel wants them.

    They lie before the matrix and therefore before the cut: resident, and rearranged once.
    """
    for field in unit.layout.fields:
        name, _, kind = field.name.partition(":")
        if kind == "packed" and field.offset < unit.resident < field.stop:
            place = unit.layout.field(f"{name}:scales")
            scales = _tensor(place, resident[place.offset :])
            edge = (unit.resident - field.offset) // field.piece_bytes * LINEAR_BLOCK
            sources = [scales[:, :edge].clone(), scales[:, edge:].clone()]
            for part, source in zip(_parted(scales, edge), sources, strict=True):
                part.copy_(source)


def _parted(scales: Tensor, edge: int) -> tuple[Tensor, Tensor]:
    """The memory of scales (groups, features, 2) as those of the features before ``edge``, then those behind it."""
    groups, flat = scales.shape[0], scales.view(-1)
    values = groups * edge * 2
    return flat[:values].view(groups, edge, 2), flat[values:].view(groups, -1, 2)


def _four_bit(packed: Tensor, scales: Tensor, rows: int) -> Quantized4bitLinear:
    return Quantized4bitLinear(packed=packed, scales_and_zeros=scales, out_features=rows, group_size=GROUP_SIZE)


def _slots(units: list[PlacedUnit], nbytes: Callable[[PlacedUnit], int]) -> tuple[dict[str, int], int]:
    """Where a part of every unit begins in one buffer for all, in whole pages, and the bytes of that buffer."""
    offsets, total = side_by_side(nbytes(unit) for unit in units)
    return {unit.name: offset for unit, offset in zip(units, offsets, strict=True)}, total


def _share(start: int, stop: int, part: int, parts: int) -> tuple[int, int]:
    """One of ``parts`` equal shares of a range, cut between pages."""
    edges = [(start + (stop - start) * number // parts) // ALIGNMENT * ALIGNMENT for number in (part, part + 1)]
    first = start if part == 0 else max(start, edges[0])
    last = stop if part + 1 == parts else max(start, edges[1])
    return first, last


def _host_pages(unit: PlacedUnit) -> int:
    """Bytes of whole pages around the second tier's part, from the page in which the streamed part begins."""
    return round_up(unit.host) - unit.page if unit.host > unit.resident else 0


def _disk_bytes(unit: PlacedUnit) -> int:
    """Bytes of the whole pages around what is read from the disk; none where nothing is."""
    start, stop = unit.disk_pages
    return round_up(stop) - start // ALIGNMENT * ALIGNMENT if stop > start else 0


def _tensor(field: Field, memory: Tensor, rows: int | None = None) -> Tensor:
    """The first bytes of flat memory as the field's tensor, or as its first ``rows``."""
    shape = field.shape if rows is None else (rows, *field.shape[1:])
    nbytes = field.nbytes if rows is None else rows * field.piece_bytes
    return memory[:nbytes].view(field.dtype).view(shape)
