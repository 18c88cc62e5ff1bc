"""Rows of an embedding table on three tiers: the right ones, and no page of the disk that holds none of them."""

from pathlib import Path

import pytest
import torch

from runtime import tables
from runtime.movers import Movers
from runtime.tables import Table
from runtime.tiers import ALIGNMENT
from runtime.timeline import Timeline

NUM_ROWS = 3000


def _gather(path: Path, table: torch.Tensor, cuts: tuple[int, int], wanted: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The gathered rows, and the bytes that were read for them."""
    offset = 2 * ALIGNMENT
    data = table.view(torch.uint8).numpy().tobytes()
    path.write_bytes(bytes(offset) + data + bytes(-len(data) % ALIGNMENT))
    timeline = Timeline()
    with Movers(torch.device("cpu"), timeline=timeline) as movers:
        placed = Table(
            resident=table[: cuts[0]].clone(),
            host=table[cuts[0] : cuts[1]].clone(),
            file=movers.open(path),
            file_offset=offset,
            num_rows=NUM_ROWS,
            movers=movers,
        )
        return placed.gather(wanted), timeline.bytes_moved["disk_read"]


@pytest.mark.parametrize("width", [96, 768, 2048, 2560])
@pytest.mark.parametrize("density", [0.01, 0.2, 3.0])
@pytest.mark.parametrize("cuts", [(0, 0), (700, 1100), (2999, 2999)])
def test_gathered_rows_are_the_tables_and_only_their_pages_are_read(
    width: int, density: float, cuts: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "BUFFER_BYTES", 8 * ALIGNMENT)
    monkeypatch.setattr(tables, "RUN_BYTES", 3 * ALIGNMENT)
    generator = torch.Generator().manual_seed(width)
    table = torch.randn((NUM_ROWS, width), generator=generator).bfloat16()
    wanted = torch.randint(NUM_ROWS, (2, max(1, int(density * NUM_ROWS) // 2)), generator=generator)
    found, read_bytes = _gather(tmp_path / "table", table, cuts, wanted)
    assert torch.equal(found, table[wanted])
    pages = {
        byte // ALIGNMENT
        for row in wanted.unique().tolist()
        if row >= cuts[1]
        for byte in (row * width * 2, (row + 1) * width * 2 - 1)
    }
    most_twice = sum(
        row >= cuts[1] and row * width * 2 % ALIGNMENT > 0 for row in wanted.unique().tolist()
    )  # a page between two reads belongs to both
    assert len(pages) * ALIGNMENT <= read_bytes <= (len(pages) + most_twice) * ALIGNMENT


def test_sparse_rows_cost_a_page_each_and_a_whole_table_is_read_once(tmp_path: Path) -> None:
    table = torch.randn((NUM_ROWS, 2048)).bfloat16()
    _, read_bytes = _gather(tmp_path / "few", table, (0, 0), torch.arange(0, NUM_ROWS, 100))
    assert read_bytes == 30 * ALIGNMENT
    _, read_bytes = _gather(tmp_path / "all", table, (0, 0), torch.arange(NUM_ROWS).repeat(3))
    assert read_bytes == NUM_ROWS * ALIGNMENT
