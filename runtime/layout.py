"""Layout: where every tensor lies in the flat bytes of its unit, and every unit in the image of a model.

An *image* is one file that holds a model as the tiers want it: a unit's tensors side by side in the
order of use, in the type that is computed with, units at multiples of :data:`runtime.tiers.ALIGNMENT`. A
split cuts each unit in two places, and only between rows of a matrix (in 4 bits: between blocks of 64) or
between tensors, so that either side can be multiplied with as it lies.
"""

import bisect
from dataclasses import dataclass
from functools import cached_property

import torch

from costmodel.errors import InputError
from costmodel.policy import Split
from runtime.architecture import LAYER_MATRICES, Architecture, TensorSpec
from runtime.quantization import LINEAR_BLOCK
from runtime.tiers import round_up

FIELD_ALIGNMENT = 64
"""Tensors start at multiples of a cache line."""

GROUP_SIZE = 64
"""Values that share a scale and a minimum in a compressed weight, as the cost model counts them."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """One tensor of a unit: bytes ``offset`` to ``offset + nbytes``; cut at multiples of ``piece_bytes`` only.

    A compressed weight is two fields, ``NAME:scales`` and ``NAME:packed``, shaped as in
    :class:`runtime.quantization.Quantized4bitLinear`; ``rows`` is the number of rows of the matrix.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    piece_bytes: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return values_of(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Offset of the first byte behind."""
        return self.offset + self.nbytes


@dataclass(frozen=True, kw_only=True)
class UnitLayout:
    """The tensors of one unit. Its offset in a file is a multiple of the page size, its length need not be one."""

    fields: tuple[Field, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes from the first tensor to the end of the last; a file pads them to a multiple of the page size."""
        return self.fields[-1].stop if self.fields else 0

    def field(self, name: str) -> Field:
        """The field of this name."""
        return next(field for field in self.fields if field.name == name)

    def cut(self, target: float) -> int:
        """The offset nearest to ``target`` bytes at which the unit may be cut."""
        if target <= 0 or not self.fields:
            return 0
        if target >= self.nbytes:
            return self.nbytes
        starts = [field.offset for field in self.fields]
        field = self.fields[max(0, bisect.bisect_right(starts, target) - 1)]
        behind = next((start for start in starts if start > field.offset), self.nbytes)
        last = field.stop - field.piece_bytes  # the piece below a target in the gap behind the tensor
        low = min(field.offset + int(target - field.offset) // field.piece_bytes * field.piece_bytes, last)
        high = behind if low == last else low + field.piece_bytes
        return min(low, high, key=lambda offset: abs(offset - target))


@dataclass(frozen=True, kw_only=True)
class ImageLayout:
    """Where the units of a model lie in its image; ``layers`` are all alike."""

    dtype: torch.dtype
    compressed: bool
    num_layers: int
    table: UnitLayout
    positions: UnitLayout
    embedding: UnitLayout
    layer: UnitLayout
    head: UnitLayout

    @cached_property
    def units(self) -> tuple[tuple[str, UnitLayout], ...]:
        """Every unit by name, in the order of the file: ``layers.0`` is the first layer."""
        layers = ((f"layers.{number}", self.layer) for number in range(self.num_layers))
        return (
            ("table", self.table),
            ("positions", self.positions),
            ("embedding", self.embedding),
            *layers,
            ("head", self.head),
        )

    @cached_property
    def offsets(self) -> dict[str, int]:
        """File offset of every unit, a multiple of the page size."""
        found, offset = {}, 0
        for name, unit in self.units:
            found[name] = offset
            offset += round_up(unit.nbytes)
        return found

    def cuts(self, split: Split) -> tuple[tuple[int, int], ...]:
        """Of every unit, where the first tier's part ends, and the second's: [0, a), [a, b), [b, nbytes).

        What rounding to whole pieces leaves over is owed to the next unit, so that the whole model misses the split
        by no more than a piece.
        """
        found: list[tuple[int, int]] = []
        gpu_owed = cpu_owed = 0.0
        for _, unit in self.units:
            gpu_owed, cpu_owed = gpu_owed + split.gpu * unit.nbytes, cpu_owed + split.cpu * unit.nbytes
            first = unit.nbytes if split.gpu == 1 else unit.cut(gpu_owed)
            second = unit.nbytes if split.disk == 0 else max(first, unit.cut(first + cpu_owed))
            gpu_owed, cpu_owed = gpu_owed - first, cpu_owed - (second - first)
            found.append((first, second))
        return tuple(found)

    @cached_property
    def nbytes(self) -> int:
        """Length of the image file."""
        return sum(round_up(unit.nbytes) for _, unit in self.units)


def image_layout(architecture: Architecture, *, dtype: torch.dtype, compressed: bool) -> ImageLayout:
    """The layout of a model in ``dtype``; ``compressed`` keeps the matrices of the layers in 4 bits."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"dtype is {dtype}: it must be float32, bfloat16 or float16")
    plain = [(architecture.table,), (architecture.positions,) if architecture.positions else (), architecture.embedding]
    table, positions, embedding = (_unit(tensors, dtype) for tensors in plain)
    return ImageLayout(
        dtype=dtype,
        compressed=compressed,
        num_layers=architecture.spec.num_layers,
        table=table,
        positions=positions,
        embedding=embedding,
        layer=_unit(architecture.layer, dtype, compressed=compressed),
        head=_unit(architecture.head, dtype),
    )


def parameter_dtype(dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of scales and minima beside values computed in ``dtype``."""
    return torch.bfloat16 if dtype == torch.float32 else dtype


def is_compressible(tensor: TensorSpec) -> bool:
    """Whether a layer's tensor is one of its matrices."""
    name, _, part = tensor.name.rpartition(".")
    return part == "weight" and name in LAYER_MATRICES


def _unit(tensors: tuple[TensorSpec, ...], dtype: torch.dtype, *, compressed: bool = False) -> UnitLayout:
    fields: list[Field] = []

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype, rows: int, *, whole: bool) -> None:
        offset = round_up(fields[-1].stop, FIELD_ALIGNMENT) if fields else 0
        nbytes = values_of(shape) * dtype.itemsize
        piece_bytes = nbytes if whole else nbytes // shape[0]
        fields.append(
            Field(name=name, offset=offset, shape=shape, dtype=dtype, piece_bytes=max(1, piece_bytes), rows=rows)
        )

    for tensor in tensors:
        rows = tensor.shape[0]
        if compressed and is_compressible(tensor):
            columns, blocks = tensor.shape[1], -(-rows // LINEAR_BLOCK)
            groups = -(-columns // GROUP_SIZE)
            scales = (groups, blocks * LINEAR_BLOCK, 2)
            add(f"{tensor.name}:scales", scales, parameter_dtype(dtype), rows, whole=True)
            add(f"{tensor.name}:packed", (blocks, columns, LINEAR_BLOCK // 2), torch.uint8, rows, whole=False)
        else:
            add(tensor.name, tensor.shape, dtype, rows, whole=len(tensor.shape) == 1)
    return UnitLayout(fields=tuple(fields))


def values_of(shape: tuple[int, ...]) -> int:
    """How many values a tensor of this shape has."""
    count = 1
    for extent in shape:
        count *= extent
    return count
