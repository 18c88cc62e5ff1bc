"""Images appear whole or not at all, and are made once for each content, however many processes want one."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from costmodel.errors import InputError
from runtime import content, conversion
from runtime.checkpoint import CheckpointError
from runtime.disk import DiskError
from runtime.image import Image, open_image
from tests.checkpoints import save
from tests.images import DTYPES, left, made


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The image of the model in float32, made in peace."""
    return made(folder, tmp_path_factory.mktemp("peace")).path.read_bytes()


# --- made once -------------------------------------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remember the hashes of files however new they are."""
    monkeypatch.setattr(content, "SETTLED_NS", -(10**12))


def test_an_image_is_made_once(tmp_path: Path, folder: Path, settled: None) -> None:
    calls: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        assert 0 <= done <= total
        calls.append(f"{what} to the end" if done == total else what)

    def opened() -> Image:
        return open_image(str(folder), directory=tmp_path, dtype=torch.bfloat16, compressed=False, progress=progress)

    image = opened()
    assert calls[0].startswith("hashing")
    assert [call for call in calls if call.endswith("to the end")] == ["hashing to the end", "converting to the end"]
    before = image.path.stat()
    calls.clear()
    assert opened() == image
    assert calls == []
    assert image.path.stat() == before
    assert left(tmp_path) == [image.path.parent.name]


def test_manifest(tmp_path: Path, folder: Path) -> None:
    image = made(folder, tmp_path, dtype=torch.bfloat16, compressed=True)
    manifest = json.loads((image.path.parent / "manifest.json").read_text())
    assert manifest["schema"] == "tierwise.image/1"
    assert (manifest["model"], manifest["dtype"], manifest["compressed"]) == ("opt-tiny", "bfloat16", True)
    assert manifest["nbytes"] == image.layout.nbytes == image.path.stat().st_size
    assert manifest["source"] == str(folder)
    assert manifest["config"] == image.config == json.loads((folder / "config.json").read_text())
    assert image.path.parent.name == f"opt-tiny-bfloat16-4bit-{manifest['key']}"
    assert image.path == tmp_path / "models" / image.path.parent.name / "image.bin"


def test_each_form_is_another_image(tmp_path: Path, folder: Path) -> None:
    paths = {made(folder, tmp_path, dtype=dtype, compressed=flag).path for dtype in DTYPES for flag in (False, True)}
    assert len(paths) == 6


def test_one_changed_byte_makes_another_image(tmp_path: Path, model: PreTrainedModel, settled: None) -> None:
    folder = save(model, tmp_path / "m")
    first = made(folder, tmp_path)
    path = folder / "model.safetensors"
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # even if its time is set back
    second = made(folder, tmp_path)
    assert second.path != first.path
    differing = [one != other for one, other in zip(first.path.read_bytes(), second.path.read_bytes(), strict=True)]
    assert sum(differing) == 1


def test_another_config_makes_another_image(tmp_path: Path, model: PreTrainedModel) -> None:
    folder = save(model, tmp_path / "m")
    first = made(folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))
    assert made(folder, tmp_path).path != first.path


def test_the_same_content_elsewhere_is_the_same_image(tmp_path: Path, folder: Path) -> None:
    first = made(folder, tmp_path)
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)
    second = made(tmp_path / "elsewhere" / folder.name, tmp_path)
    assert second == first


@pytest.mark.parametrize("damage", ["shorter", "no manifest", "other manifest", "half a manifest", "no image"])
def test_damaged_image_is_made_again(tmp_path: Path, folder: Path, whole: bytes, damage: str) -> None:
    image = made(folder, tmp_path)
    manifest = image.path.parent / "manifest.json"
    match damage:
        case "shorter":
            os.truncate(image.path, image.layout.nbytes - 1)
        case "no manifest":
            manifest.unlink()
        case "other manifest":
            manifest.write_text(manifest.read_text().replace('"key": "', '"key": "x'))
        case "half a manifest":
            os.truncate(manifest, 100)
        case _:
            image.path.unlink()
    assert made(folder, tmp_path).path.read_bytes() == whole
    assert left(tmp_path) == [image.path.parent.name]


def test_weights_that_change_while_they_are_read(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(model, tmp_path / "m")
    real = conversion.convert

    def convert(*arguments: Any) -> None:
        real(*arguments)
        (folder / "model.safetensors").touch()

    monkeypatch.setattr(conversion, "convert", convert)
    with pytest.raises(InputError, match="model.safetensors: changed while it was read: wait until it is complete"):
        made(folder, tmp_path)
    assert left(tmp_path) == []


# --- errors leave nothing --------------------------------------------------------------------------------------------


def test_defect_is_found_before_anything_is_hashed_or_written(tmp_path: Path, model: PreTrainedModel) -> None:
    folder = save(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_dim": 81}))
    with pytest.raises(CheckpointError, match=r"fc1.bias' has shape \[80\]: by config.json \[81\] is expected"):
        open_image(
            str(folder),
            directory=tmp_path / "offload",
            dtype=torch.float32,
            compressed=False,
            progress=lambda *_: pytest.fail("something was done"),
        )
    assert left(tmp_path / "offload") == []


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    monkeypatch.setattr(conversion, "convert", lambda *_: pytest.fail("something was written"))
    told = r"models: the image of opt-tiny takes 1\.\d+ MiB, but only 1 MiB are free: make room or choose another"
    with pytest.raises(DiskError, match=told):
        made(folder, tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwritev", "fdatasync"])
def test_disk_that_fills_up_meanwhile(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskError, match=r"image.bin: .* failed: No space left on device"):
        made(folder, tmp_path)
    monkeypatch.undo()
    assert left(tmp_path) == []


def test_file_size_limit_of_the_system(tmp_path: Path, folder: Path) -> None:
    """A real failure in the middle: the kernel refuses to let the file grow."""
    code = f"""
        import resource, signal, torch
        from pathlib import Path
        from runtime.image import open_image
        from runtime.disk import DiskError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            open_image({str(folder)!r}, directory=Path({str(tmp_path)!r}), dtype=torch.float32, compressed=False)
        except DiskError as error:
            print(error)
    """
    told = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "failed: File too large" in told.stdout
    assert left(tmp_path) == []


def test_interrupt_leaves_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        assert any(name.endswith(".partial") for name in left(tmp_path))
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path)
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["file", "locked"])
def test_directory_that_cannot_be(tmp_path: Path, folder: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "locked").mkdir(mode=0o500)
    if name == "locked" and os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    with pytest.raises(InputError, match="models: cannot be made"):
        made(folder, tmp_path / name)


# --- several processes -----------------------------------------------------------------------------------------------

MAKER = """
    import sys, torch
    from pathlib import Path
    from runtime.image import open_image

    gate = {gate}

    def progress(what, done, total):
        global gate
        print(what, done, total, flush=True)
        if gate and what == "converting":
            gate = False
            sys.stdin.readline()

    image = open_image(
        {folder!r}, directory=Path({directory!r}), dtype=torch.float32, compressed=False, progress=progress
    )
    print("made", image.path, flush=True)
"""


def start(folder: Path, directory: Path, *, gate: bool = False) -> subprocess.Popen[str]:
    """Another process that makes the image; with ``gate`` it stops in the middle, until it is sent a line."""
    code = textwrap.dedent(MAKER).format(folder=str(folder), directory=str(directory), gate=gate)
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f"the process ended without {word!r}")


def test_killed_conversion_leaves_nothing_that_could_be_used(tmp_path: Path, folder: Path, whole: bytes) -> None:
    with start(folder, tmp_path, gate=True) as process:
        read_until(process, "converting")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert len(left(tmp_path)) == 2
    assert all(name.startswith(".") and name.endswith((".partial", ".lock")) for name in left(tmp_path))
    other = made(folder, tmp_path, dtype=torch.bfloat16)  # making any other image removes it
    assert left(tmp_path) == [other.path.parent.name]
    assert made(folder, tmp_path).path.read_bytes() == whole


def test_what_a_killed_process_left_of_the_same_image_is_not_built_on(
    tmp_path: Path, folder: Path, whole: bytes
) -> None:
    with start(folder, tmp_path, gate=True) as process:
        read_until(process, "converting")
        process.send_signal(signal.SIGKILL)
        process.communicate()
    image = made(folder, tmp_path)
    assert image.path.read_bytes() == whole
    assert left(tmp_path) == [image.path.parent.name]


def test_another_image_in_progress_is_left_alone(tmp_path: Path, folder: Path, whole: bytes) -> None:
    with start(folder, tmp_path, gate=True) as process:
        read_until(process, "converting")
        made(folder, tmp_path, dtype=torch.bfloat16)
        assert len(left(tmp_path)) == 3
        told, _ = process.communicate("go on\n")
    assert Path(told.split()[-1]).read_bytes() == whole
    assert len(left(tmp_path)) == 2


def test_two_processes_make_one_image(tmp_path: Path, folder: Path, whole: bytes) -> None:
    with start(folder, tmp_path, gate=True) as first:
        read_until(first, "converting")
        second = start(folder, tmp_path)
        assert read_until(second, "waiting") == f"waiting 0 {len(whole)}\n"
        told_first, _ = first.communicate("go on\n")
        told_second, _ = second.communicate()
    assert "converting" not in told_second
    assert told_first.split()[-1] == told_second.split()[-1]
    assert Path(told_first.split()[-1]).read_bytes() == whole
    assert len(left(tmp_path)) == 1


def test_if_the_maker_is_killed_the_waiting_process_makes_it(tmp_path: Path, folder: Path, whole: bytes) -> None:
    with start(folder, tmp_path, gate=True) as first:
        read_until(first, "converting")
        with start(folder, tmp_path) as second:
            read_until(second, "waiting")
            first.kill()
            told, _ = second.communicate()
        first.communicate()
    assert "converting" in told
    assert Path(told.split()[-1]).read_bytes() == whole
    assert len(left(tmp_path)) == 1
