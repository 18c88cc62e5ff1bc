"""Rows of an embedding table that lies on three tiers, gathered without loading the table."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from runtime.disk import DiskFile
from runtime.movers import Movers
from runtime.tiers import ALIGNMENT, host_buffer, round_up

BUFFER_BYTES = 2 * 2**20
"""Rows on disk are read through a buffer of this size, which lasts for one call."""

RUN_BYTES = 256 * 2**10
"""The most that one read fetches: several are in flight, whichever rows are wanted."""


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
        """Rows of the file, in the order that is wanted; every page that holds one of them is read, and no other."""
        unique, inverse = torch.unique(wanted, return_inverse=True)
        found = torch.empty((len(unique), self._width), dtype=self._dtype)
        rooms = round_up(self._row_bytes) + ALIGNMENT  # a row may begin in one page and end in another
        buffer = host_buffer(max(BUFFER_BYTES, rooms))
        pages, rows = buffer.numpy(), found.view(torch.uint8).numpy()  # a copy by numpy takes 1 µs, by torch 20
        numbers = unique.tolist()
        for fill in _fills(_runs(unique, self._row_bytes), buffer.nbytes):
            places = [(self._file_offset + run.offset, run.pages_bytes) for run in fill]
            self._movers.disk.read_pages(self._file, places, buffer, name="embedding rows").synchronize()
            first_byte = 0
            for run in fill:
                for number in range(run.start, run.stop):
                    begin = first_byte + numbers[number] * self._row_bytes - run.offset
                    rows[number] = pages[begin : begin + self._row_bytes]
                first_byte += run.pages_bytes
        return found[inverse]


@dataclass(frozen=True)
class _Run:
    """Wanted rows ``start`` to ``stop`` of a sorted list, which lie in neighbouring pages.

    ``pages_bytes`` from ``offset`` on hold them.
    """

    start: int
    stop: int
    offset: int
    pages_bytes: int


def _runs(rows: Tensor, row_bytes: int) -> Iterator[_Run]:
    """Cut sorted rows where the pages of the next one do not follow those of the last, or a read would be too long."""
    begins = rows * row_bytes // ALIGNMENT * ALIGNMENT
    ends = -(-(rows + 1) * row_bytes // ALIGNMENT) * ALIGNMENT
    follows = (begins[1:] <= ends[:-1]).tolist()
    offsets, stops = begins.tolist(), ends.tolist()
    start = 0
    for position in range(1, len(offsets) + 1):
        if (
            position < len(offsets)
            and follows[position - 1]
            and stops[position] - offsets[start] <= max(RUN_BYTES, round_up(row_bytes) + ALIGNMENT)
        ):
            continue
        yield _Run(start, position, offsets[start], stops[position - 1] - offsets[start])
        start = position


def _fills(runs: Iterable[_Run], nbytes: int) -> Iterator[list[_Run]]:
    """The runs, as many at a time as a buffer of so many bytes takes."""
    fill: list[_Run] = []
    taken = 0
    for run in runs:
        if fill and taken + run.pages_bytes > nbytes:
            yield fill
            fill, taken = [], 0
        fill.append(run)
        taken += run.pages_bytes
    if fill:
        yield fill
