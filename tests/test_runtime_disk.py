"""Disk transfers: what is written is what is read, whatever the offset; errors of threads reach the caller."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime import tiers
from runtime.disk import DiskError, DiskFile, DiskPool, pieces

CHUNK = 16 * 4096


def random_bytes(nbytes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def aligned(content: torch.Tensor, shift: int = 0) -> torch.Tensor:
    """The content in a buffer whose address is ``shift`` bytes after a page."""
    buffer = tiers.host_buffer(content.nbytes + shift)[shift:]
    return buffer.copy_(content)


@given(
    offset=st.integers(0, 3 * CHUNK),
    nbytes=st.integers(0, 5 * CHUNK),
    address=st.integers(0, 2**20),
    chunk=st.sampled_from((4096, CHUNK)),
    direct=st.booleans(),
)
def test_pieces_cover_a_transfer_once_and_in_order(
    offset: int, nbytes: int, address: int, chunk: int, direct: bool
) -> None:
    found = list(pieces(offset, nbytes, address, chunk_bytes=chunk, direct=direct))
    edges = [0, *(piece.stop for piece in found)]
    assert [piece.start for piece in found] == edges[:-1]
    assert edges[-1] == nbytes
    assert all(0 < piece.stop - piece.start <= max(chunk, 4096) for piece in found)


@given(offset=st.integers(0, 3 * CHUNK), nbytes=st.integers(0, 5 * CHUNK), address=st.integers(0, 2**20))
def test_direct_pieces_are_aligned_in_file_and_memory(offset: int, nbytes: int, address: int) -> None:
    for piece in pieces(offset, nbytes, address, chunk_bytes=CHUNK, direct=True):
        if piece.direct:
            assert [n % 4096 for n in (offset + piece.start, offset + piece.stop, address + piece.start)] == [0, 0, 0]


@pytest.mark.parametrize(
    ("offset", "nbytes", "address", "expected"),
    [
        (0, 8192, 4096, [(0, 8192, True)]),
        (0, 5000, 4096, [(0, 4096, True), (4096, 5000, False)]),
        (100, 8192, 100, [(0, 3996, False), (3996, 8092, True), (8092, 8192, False)]),
        (100, 50, 100, [(0, 50, False)]),
        (0, 8192, 7, [(0, 8192, False)]),
        (
            4096,
            2 * CHUNK,
            0,
            [(0, CHUNK - 4096, True), (CHUNK - 4096, 2 * CHUNK - 4096, True), (2 * CHUNK - 4096, 2 * CHUNK, True)],
        ),
        (0, 0, 0, []),
    ],
)
def test_pieces_by_hand(offset: int, nbytes: int, address: int, expected: list[tuple[int, int, bool]]) -> None:
    found = pieces(offset, nbytes, address, chunk_bytes=CHUNK, direct=True)
    assert [(piece.start, piece.stop, piece.direct) for piece in found] == expected


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(
    ("offset", "nbytes", "shift"), [(0, 10 * CHUNK, 0), (4096, 70001, 0), (777, 200_003, 777), (5, 17, 3)]
)
def test_what_is_written_is_read_back(tmp_path: Path, offset: int, nbytes: int, shift: int, direct: bool) -> None:
    content = random_bytes(nbytes)
    with DiskFile(tmp_path / "f", writable=True, direct=direct) as file, DiskPool(threads=3, chunk_bytes=CHUNK) as pool:
        file.allocate(offset + nbytes)
        pool.write(file, offset, aligned(content, shift)).wait()
        found = aligned(torch.zeros(nbytes, dtype=torch.uint8), shift)
        pool.read(file, offset, found).wait()
    assert torch.equal(found, content)
    assert (tmp_path / "f").read_bytes()[offset : offset + nbytes] == content.numpy().tobytes()


def test_tensors_of_any_dtype_and_shape(tmp_path: Path) -> None:
    content = torch.randn(33, 65, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    with DiskFile(tmp_path / "f", writable=True) as file, DiskPool() as pool:
        pool.write(file, 0, content).wait()
        found = torch.empty_like(content)
        pool.read(file, 0, found).wait()
        pool.read(file, 0, torch.empty(0)).wait()
    assert torch.equal(found, content)


def test_many_transfers_in_flight(tmp_path: Path) -> None:
    parts = [aligned(random_bytes(3 * CHUNK, seed)) for seed in range(8)]
    with DiskFile(tmp_path / "f", writable=True) as file, DiskPool(threads=4, chunk_bytes=CHUNK) as pool:
        writes = [pool.write(file, index * part.nbytes, part) for index, part in enumerate(parts)]
        for write in writes:
            write.wait()
        assert all(write.done() for write in writes)
        found = [tiers.host_buffer(part.nbytes) for part in parts]
        for read in [pool.read(file, index * into.nbytes, into) for index, into in enumerate(found)]:
            read.wait()
    assert all(torch.equal(one, other) for one, other in zip(parts, found, strict=True))


def test_buffered_transfers_of_a_direct_file(tmp_path: Path) -> None:
    content = aligned(random_bytes(5 * CHUNK))
    with DiskFile(tmp_path / "f", writable=True) as file, DiskPool() as pool:
        pool.write(file, 0, content, direct=False).wait()
        file.drop_cache()
        found = tiers.host_buffer(content.nbytes)
        pool.read(file, 0, found).wait()
    assert torch.equal(found, content)


def test_file_system_that_opens_but_refuses_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = aligned(random_bytes(2 * CHUNK))
    file = DiskFile(tmp_path / "f", writable=True)
    refusing = file._direct_fd
    real = os.pwritev

    def pwritev(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd == refusing:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "pwritev", pwritev)
    with file, DiskPool(threads=2, chunk_bytes=CHUNK) as pool:
        pool.write(file, 0, content).wait()
        assert not file.direct
    assert (tmp_path / "f").read_bytes() == content.numpy().tobytes()


def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(random_bytes(CHUNK).numpy().tobytes())
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset))
    with DiskFile(tmp_path / "f") as file, DiskPool() as pool:
        found = tiers.host_buffer(CHUNK)
        pool.read(file, 0, found).wait()
    assert torch.equal(found, random_bytes(CHUNK))


def test_truncated_file_is_an_error_in_the_caller(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 5000)
    with DiskFile(tmp_path / "f") as file, DiskPool(threads=2, chunk_bytes=4096) as pool:
        read = pool.read(file, 0, tiers.host_buffer(3 * CHUNK))
        with pytest.raises(
            DiskError, match=r"f: reading 4 KiB at byte \d+ ended after .* the file has only 5000 bytes"
        ):
            read.wait()
        assert read.done()


@pytest.mark.parametrize(
    ("code", "told"), [(errno.EIO, "Input/output error"), (errno.ENOSPC, "No space left on device")]
)
def test_error_of_a_thread_is_raised_by_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: str
) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        if offset == CHUNK:
            raise OSError(code, os.strerror(code))
        return len(buffers[0])

    monkeypatch.setattr(os, "pwritev", fail)
    with DiskFile(tmp_path / "f", writable=True) as file, DiskPool(threads=2, chunk_bytes=CHUNK) as pool:
        write = pool.write(file, 0, tiers.host_buffer(4 * CHUNK))
        with pytest.raises(DiskError, match=f"writing 64 KiB at byte {CHUNK} failed: {told}"):
            write.wait()


def test_missing_file_names_the_reason(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="missing: cannot be opened: No such file or directory"):
        DiskFile(tmp_path / "missing")


def test_full_disk_is_found_when_space_is_reserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with (
        DiskFile(tmp_path / "f", writable=True) as file,
        pytest.raises(DiskError, match="reserving 1 GiB failed: No space left on device"),
    ):
        file.allocate(2**30)


def test_leaving_after_an_error_drops_what_has_not_begun_and_ends_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def slow(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(offset)
        begun.set()
        assert go_on.wait(30)
        return len(buffers[0])

    monkeypatch.setattr(os, "pwritev", slow)
    before = threading.active_count()
    with DiskFile(tmp_path / "f", writable=True) as file:
        pool = DiskPool(threads=1, chunk_bytes=CHUNK)
        write = pool.write(file, 0, tiers.host_buffer(50 * CHUNK))
        assert begun.wait(30)
        threading.Timer(0.05, go_on.set).start()
        pool.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
        assert write.done()
        assert len(calls) < 50
    assert threading.active_count() <= before + 1  # the timer may still be leaving


def test_memory_that_threads_cannot_reach_is_refused(tmp_path: Path) -> None:
    with DiskFile(tmp_path / "f", writable=True) as file, DiskPool() as pool:
        with pytest.raises(ValueError, match="contiguous tensor in host memory"):
            pool.read(file, 0, torch.empty(4, 4).t()[:, :2])
        with pytest.raises(ValueError, match="contiguous tensor in host memory"):
            pool.read(file, 0, torch.empty(4, device="meta"))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        DiskPool(threads=0)
    with pytest.raises(ValueError, match="chunk_bytes is 1000: it must be a multiple of 4096"):
        DiskPool(chunk_bytes=1000)
