"""Hashes of files: those of sha256sum, remembered until a file changes."""

import os
import subprocess
from pathlib import Path

import pytest

from costmodel.errors import InputError
from runtime import content
from runtime.content import hashes


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the hashes of files however new they are."""
    monkeypatch.setattr(content, "SETTLED_NS", -(10**12))


def test_hashes_are_sha256(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "CHUNK_BYTES", 8192)
    sizes = (0, 1, 8192, 8193, 40_000)
    paths = [tmp_path / f"{nbytes}" for nbytes in sizes]
    for path, nbytes in zip(paths, sizes, strict=True):
        path.write_bytes(os.urandom(nbytes))
    told = subprocess.run(["sha256sum", *paths], capture_output=True, text=True, check=True).stdout
    expected = {path: line.split()[0] for path, line in zip(paths, told.splitlines(), strict=True)}
    assert hashes(paths, memory=tmp_path / "hashes.json") == expected


def test_hashes_are_remembered_until_a_file_changes(tmp_path: Path, settled: None) -> None:
    path, memory = tmp_path / "f", tmp_path / "hashes.json"
    path.write_bytes(b"content")
    done: list[int] = []
    first = hashes([path], memory=memory, progress=lambda what, now, total: done.append(now))
    assert done == [7]
    assert hashes([path], memory=memory, progress=lambda what, now, total: done.append(now)) == first
    assert done == [7]
    path.write_bytes(b"CONTENT")
    assert hashes([path], memory=memory) != first
    for damaged in ("", "[]", "{}", '{"schema": "tierwise.hashes/1", "files": [3]}'):
        memory.write_text(damaged)
        assert len(hashes([path], memory=memory)) == 1
    assert hashes([path], memory=memory) == hashes([path], memory=tmp_path / "other.json")


def test_a_file_that_just_changed_is_not_remembered(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"content")
    hashes([tmp_path / "f"], memory=tmp_path / "hashes.json")
    assert not (tmp_path / "hashes.json").exists()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing: cannot be read: No such file or directory"):
        hashes([tmp_path / "nothing"], memory=tmp_path / "hashes.json")
