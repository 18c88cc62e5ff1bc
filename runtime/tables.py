"""Rows of an embedding table that lies on three tiers, gathered without loading the table."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from runtime.disk import DiskFile
from runtime.movers import Movers
from runtime.tiers import ALIGNMENT, host_buffer, round_up

READ_BYTES = 16 * 2**20
"""Rows on disk are read in runs of at most this many bytes, through a buffer that lasts for one call."""


class Table:
    """A table (rows, width) whose first rows are on the first tier, the next in host memory, the rest in a file."""

    def __init__(
        self, *, resident: Tensor, host: Tensor, file: DiskFile, file_offset: int, num_rows: int, movers: Movers
    ) -> None:
        self._resident, self._host = resident, host
        self._file, self._file_offset, self.num_rows = file, file_offset, num_rows
        self._movers = movers
        self._width, self._dtype = resident.shape[1], resident.dtype
        self._row_bytes = self._width * self._dtype.itemsize

    def gather(self, indices: Tensor, *, streamed: Tensor | None = None) -> Tensor:
        """Rows (…, width) of ``indices`` (…), on the first tier.

        ``streamed`` (rows not resident, width) spares the disk where the rest of the table was just loaded.
        """
        flat = indices.reshape(-1)
        first = self._resident.shape[0]
        if first == self.num_rows:
            return functional.embedding(indices, self._resident)
        rows = torch.empty((len(flat), self._width), dtype=self._dtype, device=self._resident.device)
        here = flat < first
        rows[here] = self._resident[flat[here]]
        if streamed is not None:
            rows[~here] = streamed[flat[~here] - first]
            return rows.view(*indices.shape, self._width)
        wanted = flat.cpu()
        last = first + self._host.shape[0]
        in_host = (wanted >= first) & (wanted < last)
        if bool(in_host.any()):
            rows[in_host.to(rows.device)] = self._host[wanted[in_host] - first].to(rows.device)
        on_disk = wanted >= last
        if bool(on_disk.any()):
            rows[on_disk.to(rows.device)] = self._from_disk(wanted[on_disk]).to(rows.device)
        return rows.view(*indices.shape, self._width)

    def _from_disk(self, wanted: Tensor) -> Tensor:
        """Rows of a file, each read once."""
        unique, inverse = torch.unique(wanted, return_inverse=True)
        found = torch.empty((len(unique), self._width), dtype=self._dtype)
        buffer = host_buffer(READ_BYTES + 2 * ALIGNMENT + round_up(self._row_bytes))
        for start, stop in _runs(unique.tolist(), READ_BYTES // self._row_bytes):
            first, last = int(unique[start]), int(unique[stop - 1]) + 1
            begin = first * self._row_bytes // ALIGNMENT * ALIGNMENT
            end = round_up(last * self._row_bytes)
            self._movers.disk.read(
                self._file, self._file_offset + begin, buffer[: end - begin], name="embedding rows"
            ).synchronize()
            skip = first * self._row_bytes - begin
            rows = buffer[skip : skip + (last - first) * self._row_bytes].view(self._dtype).view(-1, self._width)
            found[start:stop] = rows[unique[start:stop] - first]
        return found[inverse]


def _runs(rows: list[int], most: int) -> Iterator[tuple[int, int]]:
    """Cut sorted rows into runs that span at most ``most`` rows; as (start, stop) of the list."""
    start = 0
    for position in range(1, len(rows) + 1):
        if position == len(rows) or rows[position] - rows[start] >= max(1, most):
            yield start, position
            start = position
