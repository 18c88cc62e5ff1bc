"""What goes wrong while a model runs: one clear error, no thread and no file left behind."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import OPTConfig, OPTForCausalLM

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.policy import Policy, Split
from runtime import LLM, SamplingParams
from runtime.disk import DiskError, DiskFile

POLICY = Policy(
    weights=Split(gpu=0.3, cpu=0.2, disk=0.5),
    cache=Split(gpu=0.2, cpu=0.3, disk=0.5),
    activations=Split(gpu=0.5, cpu=0.2, disk=0.3),
    gpu_batch_size=2,
    num_gpu_batches=2,
)
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(1)
    config = OPTConfig(
        vocab_size=97,
        hidden_size=64,
        word_embed_proj_dim=64,
        num_attention_heads=4,
        ffn_dim=96,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    OPTForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    end = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before


def engine(folder: Path, offload: Path, **options) -> LLM:
    settings = {"policy": POLICY, "hardware": Hardware.from_catalog("cpu-laptop"), "dtype": "float32", **options}
    return LLM(folder, offload_dir=offload, device="cpu", gpu_memory="1GiB", cpu_memory="1GiB", **settings)


def left_behind(offload: Path) -> list[str]:
    return [path.name for path in offload.iterdir() if path.name != "models"]


def failing_reads(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Every read after the first ``after`` fails as a broken disk's does."""
    real, count = os.preadv, iter(range(10**9))

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        if next(count) >= after:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def test_a_read_error_in_a_thread_is_raised_where_it_matters(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(folder, tmp_path) as llm:
        expected = llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
        with monkeypatch.context() as patch:
            failing_reads(patch, after=20)
            with pytest.raises(DiskError, match=r"reading .* failed: Input/output error"):
                llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True))
        # A disk that works again is used again: nothing of the failed block is left.
        assert llm.generate(PROMPTS, SamplingParams(max_new_tokens=4, ignore_eos=True)) == expected
    assert left_behind(tmp_path) == []


def test_a_truncated_image_is_named(folder: Path, tmp_path: Path) -> None:
    with engine(folder, tmp_path) as llm:
        llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))
        path = llm.image.path
        os.truncate(path, path.stat().st_size // 2)
        with pytest.raises(DiskError, match="image.bin: reading .* the file has only"):
            llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))


def test_a_full_disk_is_said_before_anything_runs(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(folder, tmp_path) as llm:
        llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))

        def full(self: DiskFile, nbytes: int) -> None:
            raise self.failed("reserving", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

        monkeypatch.setattr(DiskFile, "allocate", full)
        with pytest.raises(DiskError, match="reserving failed: No space left on device"):
            llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))
    assert left_behind(tmp_path) == []


def test_an_offload_directory_that_vanishes_is_named(folder: Path, tmp_path: Path) -> None:
    offload = tmp_path / "offload"
    offload.mkdir()
    with engine(folder, offload) as llm:
        llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))
        shutil.rmtree(offload)
        with pytest.raises(DiskError, match="offload: no file can be made there"):
            llm.generate(PROMPTS, SamplingParams(max_new_tokens=2))


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_wrong_offload_directory_is_refused(folder: Path, tmp_path: Path, kind: str) -> None:
    offload = tmp_path / "offload"
    if kind == "file":
        offload.write_text("x")
    with pytest.raises(InputError, match="offload_dir is .*/offload: (there is no such directory|that is a file)"):
        engine(folder, offload)


def test_an_answer_can_be_stopped_and_the_model_used_again(folder: Path, tmp_path: Path) -> None:
    calls = iter(range(10**6))

    def stop(done: int, most: int) -> None:
        if next(calls) == 3:
            raise KeyboardInterrupt

    with engine(folder, tmp_path) as llm:
        expected = llm.generate(PROMPTS, SamplingParams(max_new_tokens=5, ignore_eos=True))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, SamplingParams(max_new_tokens=5, ignore_eos=True), on_progress=stop)
        assert llm.generate(PROMPTS, SamplingParams(max_new_tokens=5, ignore_eos=True)) == expected
    assert left_behind(tmp_path) == []


CHILD = """
import sys, time
from costmodel.hardware import Hardware
from costmodel.policy import Policy
from runtime import LLM, SamplingParams
folder, offload, policy = sys.argv[1:4]
with LLM(folder, policy=policy, hardware=Hardware.from_catalog("cpu-laptop"), dtype="float32", device="cpu",
         gpu_memory="1GiB", cpu_memory="1GiB", offload_dir=offload) as llm:
    for turn in range(int(sys.argv[4])):
        found = llm.generate([[5, 6, 7], [8, 9], [10, 11, 12, 13]], SamplingParams(max_new_tokens=6, ignore_eos=True))
        print([one.token_ids for one in found], flush=True)
"""


def child(folder: Path, offload: Path, policy: Path, turns: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(CHILD), str(folder), str(offload), str(policy), str(turns)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_share_one_offload_directory(folder: Path, tmp_path: Path) -> None:
    policy, offload = tmp_path / "policy.json", tmp_path / "offload"
    POLICY.save(policy)
    offload.mkdir()
    both = [child(folder, offload, policy, 5) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    lines = {line for out, _ in said for line in out.splitlines()}
    assert len(lines) == 1
    assert left_behind(offload) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_no_file(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    policy, offload = tmp_path / "policy.json", tmp_path / "offload"
    POLICY.save(policy)
    offload.mkdir()
    process = child(folder, offload, policy, 10**6)
    assert process.stdout is not None
    for _ in range(3):
        assert process.stdout.readline()
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert left_behind(offload) == []
