"""Conversion: a checkpoint's tensors, in the type and order of an image, a bounded part in memory at a time."""

from collections.abc import Callable, Iterator
from types import TracebackType

import torch
from torch import Tensor

from runtime.architecture import Architecture, TensorSpec
from runtime.checkpoint import Checkpoint, row_chunks
from runtime.disk import DiskFile, DiskPool
from runtime.layout import GROUP_SIZE, ImageLayout, UnitLayout, parameter_dtype
from runtime.pending import Arrived, Pending
from runtime.quantization import LINEAR_BLOCK, pack_linear, quantize
from runtime.tiers import ALIGNMENT, host_buffer

CHUNK_BYTES = 32 * 2**20
"""Written at a time, while the next part is made: enough for the disk's full rate."""


class ImageWriter:
    """Writes tensors at offsets of a file, past the page cache, the last one on its way while the next is made.

    Memory: two buffers of :data:`CHUNK_BYTES`. ``written`` is called with the bytes that each call of
    :meth:`put` adds. Leaving the context waits for the last write.
    """

    def __init__(self, file: DiskFile, *, written: Callable[[int], None] | None = None) -> None:
        self._file, self._written = file, written
        self._pool = DiskPool()
        self._rooms = [host_buffer(CHUNK_BYTES + ALIGNMENT) for _ in range(2)]
        self._pending: list[Pending] = [Arrived(), Arrived()]
        self._next = 0

    def put(self, offset: int, values: Tensor, dtype: torch.dtype) -> None:
        """Write values of any shape and type, in ``dtype``, from ``offset`` on; they may be reused on return."""
        flat = values.reshape(-1)
        step = CHUNK_BYTES // dtype.itemsize
        for start in range(0, len(flat), step):
            self._put_part(offset + start * dtype.itemsize, flat[start : start + step], dtype)

    def _put_part(self, offset: int, values: Tensor, dtype: torch.dtype) -> None:
        slot, self._next = self._next, 1 - self._next
        self._pending[slot].wait()
        # Direct I/O wants memory as far from a page as the file is.
        first = offset % ALIGNMENT
        part = self._rooms[slot][first : first + len(values) * dtype.itemsize]
        part.view(dtype).copy_(values)
        self._pending[slot] = self._pool.write(self._file, offset, part)
        if self._written is not None:
            self._written(part.nbytes)

    def finish(self) -> None:
        """Return once everything is on the disk."""
        for pending in self._pending:
            pending.wait()
        self._file.drop_cache()

    def __enter__(self) -> "ImageWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.close(cancel=error is not None)


def image_tensors(
    architecture: Architecture, layout: ImageLayout
) -> Iterator[tuple[str, UnitLayout, TensorSpec, int | None]]:
    """Every tensor of a model in the order of the image: its unit's name and layout, itself, its layer or None."""
    plain = {
        "table": (architecture.table,),
        "positions": () if architecture.positions is None else (architecture.positions,),
        "embedding": architecture.embedding,
        "head": architecture.head,
    }
    for name, unit in layout.units:
        layer = int(name.removeprefix("layers.")) if name.startswith("layers.") else None
        for tensor in plain[name] if layer is None else architecture.layer:
            yield name, unit, tensor, layer


def convert(checkpoint: Checkpoint, architecture: Architecture, layout: ImageLayout, writer: ImageWriter) -> None:
    """Write all tensors of a checkpoint to an image.

    4-bit matrices are quantised from the values as stored (not from their rounding to the image's type),
    with scales and minima in :func:`~runtime.layout.parameter_dtype`. Memory: one chunk of a matrix and
    what it is converted to, and the scales of the matrix.
    """
    for name, unit, tensor, layer in image_tensors(architecture, layout):
        offset = layout.offsets[name]
        names = {field.name for field in unit.fields}
        if tensor.name in names:
            field = unit.field(tensor.name)
            at = offset + field.offset
            for chunk in row_chunks(checkpoint, architecture, tensor, layer):
                writer.put(at, chunk, field.dtype)
                at += chunk.numel() * field.dtype.itemsize
        else:
            chunks = row_chunks(checkpoint, architecture, tensor, layer, multiple=LINEAR_BLOCK)
            _put_quantized(writer, offset, unit, tensor.name, chunks, parameter_dtype(layout.dtype))


def _put_quantized(
    writer: ImageWriter, offset: int, unit: UnitLayout, name: str, chunks: Iterator[Tensor], dtype: torch.dtype
) -> None:
    """Quantise chunks of whole blocks of rows; those of the scales lie side by side, so they are written last."""
    scales, packed = unit.field(f"{name}:scales"), unit.field(f"{name}:packed")
    at = offset + packed.offset
    parts = []
    for chunk in chunks:
        part = pack_linear(quantize(chunk, group_size=GROUP_SIZE, parameter_dtype=dtype))
        writer.put(at, part.packed, packed.dtype)
        at += part.packed.nbytes
        parts.append(part.scales_and_zeros)
    writer.put(offset + scales.offset, torch.cat(parts, dim=1), scales.dtype)
