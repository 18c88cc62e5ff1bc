"""The whole command on a small scale: a valid file that the search takes, and every way of failing."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from costmodel import ModelSpec, Workload, search
from costmodel.hardware import Hardware, quantities
from profiler import command, effort, offload, session
from profiler.timing import Results
from runtime import environment

ROOT = Path(__file__).resolve().parent.parent
KiB, MiB = 2**10, 2**20

TINY = effort.Effort(
    name="quick",
    budget_s=1.0,
    rounds=2,
    hidden_size=256,
    most_rows_cpu=8,
    most_rows_gpu=8,
    contexts=(16, 32),
    prompts=(16, 32),
    copy_bytes=(4 * KiB, 64 * KiB),
    disk_bytes=(64 * KiB, MiB),
    disk_threads=(1, 2),
    disk_chunks=(MiB,),
    file_bytes=64 * MiB,
    in_detail=True,
    working_set_bytes=MiB,
    vocabulary=512,
)


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(effort.EFFORTS, "quick", TINY)
    monkeypatch.setattr(environment, "cache_bytes", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(hardware file, figure, offload directory) of one run."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "disk").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(effort.EFFORTS, "quick", TINY)
        patch.setattr(environment, "cache_bytes", lambda: 0)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        flags = ["--quick", "--out", str(folder / "mine.json"), "--plot", str(folder / "mine.png")]
        budgets = ["--offload-dir", str(folder / "disk"), "--gpu-memory", "2GiB", "--cpu-memory", "512MiB"]
        assert command.main([*flags, *budgets]) == 0
    return folder / "mine.json", folder / "mine.png", folder / "disk"


def test_file_is_valid_and_holds_the_budgets(measured: tuple[Path, Path, Path]) -> None:
    machine = Hardware.from_file(measured[0])
    assert machine.name == "mine"
    assert machine.gpu.kind == "cpu"
    assert machine.capacity_bytes["gpu"] == 2 * 2**30
    assert machine.capacity_bytes["cpu"] == 2**29
    assert machine.capacity_bytes["disk"] > 0
    assert 0 <= machine.engine.unhidden_share.value <= 1


def test_search_takes_the_file(measured: tuple[Path, Path, Path]) -> None:
    machine = Hardware.from_file(measured[0])
    found = search(hardware=machine, model=ModelSpec.load("opt-1.3b"), workload=Workload(prompt_len=32, gen_len=4))
    assert found.estimate.throughput_tok_per_s > 0


def test_every_number_has_an_origin_and_a_date(measured: tuple[Path, Path, Path]) -> None:
    machine = Hardware.from_file(measured[0])
    assert {quantity.source for _, quantity in quantities(machine)} == {"profile", "budget", "engine"}
    assert {source.date for source in machine.sources.values()} == {environment.today()}
    assert f"torch {torch.__version__}" in machine.sources["profile"].title


def test_everything_needed_was_measured(measured: tuple[Path, Path, Path]) -> None:
    record = json.loads(measured[0].read_text())["measured"]
    assert {figure["name"] for figure in record["figures"]} == {
        "cpu_to_gpu",
        "gpu_to_cpu",
        "disk_read",
        "disk_read_setting",
        "disk_write",
        "disk_write_setting",
        "matmul",
        "lm_head",
        "elementwise",
        "read",
        "prefill_attention",
        "decode_attention",
        "attention_call",
        "quantize",
        "dequantize",
        "compressed_attention",
        "linear_4bit",
        "carried_attention",
        "engine_layer",
        "layer_decode",
        "decode_step",
        "slowdown",
    }
    assert all({"median", "interquartile_range", "repeats", "unit"} <= set(figure) for figure in record["figures"])
    assert {"cpu", "torch", "commit", "date", "file_system", "system"} <= set(record["environment"])
    assert "O_DIRECT" in record["disk"]["method"] or "dropped" in record["disk"]["method"]
    assert record["capacity"]["host_available_bytes"] > 0


def test_curves_keep_to_the_unit_of_their_fields(measured: tuple[Path, Path, Path]) -> None:
    machine = Hardware.from_file(measured[0])
    curve = machine.gpu.matmul_flops_per_s.curve
    assert curve is not None
    assert [rows for rows, _ in curve] == [1, 2, 3, 4, 6, 8][: len(curve)]  # as far as the time went
    assert machine.gpu.matmul_flops_per_s.value == max(rate for _, rate in curve)
    assert machine.gpu.attention_flops_per_s.curve is not None
    assert machine.gpu.attention_flops_per_s.curve[0][0] == 16


def test_figure_is_drawn_and_nothing_else_is_left(measured: tuple[Path, Path, Path]) -> None:
    assert measured[1].read_bytes().startswith(b"\x89PNG")
    assert list(measured[2].iterdir()) == []
    assert {path.name for path in measured[0].parent.iterdir()} == {"mine.json", "mine.png", "disk"}
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tierwise")] == []


def test_summary_on_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.json"
    assert command.main(["--quick", "--out", str(out), "--offload-dir", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # however wide the terminal is
    for text in (
        "disk read",
        "matrix products",
        "unhidden share",
        "no GPU",
        "no second tier",
        str(out)[:20],
    ):
        assert text in shown


def test_file_system_without_direct_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "DiskFile", functools.partial(offload.DiskFile, direct=False))
    out = tmp_path / "m.json"
    assert command.main(["--quick", "--out", str(out), "--offload-dir", str(tmp_path)]) == 0
    record = json.loads(out.read_text())["measured"]
    assert "pages dropped before each read" in record["disk"]["method"]
    assert {figure["method"] for figure in record["figures"] if figure["name"] == "disk_read"} == {"buffered"}
    assert any("takes no direct I/O" in note for note in record["notes"])


def test_standard_output_is_json_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--quick", "--out", "-", "--offload-dir", str(tmp_path), "--name", "box"]) == 0
    assert Hardware.from_dict(json.loads(capsys.readouterr().out)).name == "box"


# ---------------------------------------------------------------- failing


def failed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    code = command.main(["--quick", *argv])
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert told.out == ""
    return code, told.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--out", "{dir}/x.json", "--offload-dir", "{dir}/file"], "that is a file, a folder is expected"),
        (["--out", "{dir}/x.json", "--offload-dir", "{dir}/none"], "there is no such folder"),
        (["--out", "{dir}"], "that is a folder, a file is expected"),
        (["--out", "{dir}/none/x.json"], "there is no folder"),
        (["--out", "{dir}/x.png", "--plot", "{dir}/x.png"], "that file is written by --out"),
        (["--out", "{dir}/x.json", "--device", "cuda"], "sees no CUDA device here"),
        (["--out", "{dir}/x.json", "--gpu-memory", "9999GiB"], "--gpu-memory is 9.765 TiB: only"),
        (["--out", "{dir}/x.json", "--gpu-memory", "12"], "is not a quantity in bytes"),
        (["--out", "{dir}/x.json", "--ofload-dir", "x"], "did you mean --offload-dir?"),
        ([], "the following arguments are required: --out"),
    ],
)
def test_bad_input_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    code, told = failed(capsys, *(flag.format(dir=tmp_path) for flag in flags))
    assert code == 2
    assert message in told
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_read_only_folder_for_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, told = failed(capsys, "--out", str(tmp_path / "x.json"), "--offload-dir", str(tmp_path))
    assert (code, "no file can be written in" in told) == (2, True)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")])
def test_failure_leaves_an_existing_file_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*given: object, **more: object) -> Results:
        raise error

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(session, "run_rounds", fail)
    flags = ["--quick", "--out", str(tmp_path / "x.json"), "--offload-dir", str(tmp_path)]
    if isinstance(error, KeyboardInterrupt):
        assert command.main(flags) == 130
        assert capsys.readouterr().err == "error: interrupted\n"
    else:
        with pytest.raises(RuntimeError, match="boom"):
            command.main(flags)
    assert (tmp_path / "x.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def holds_deleted_file(pid: int) -> bool:
    """Whether a process has opened the measurement file, whose name is gone already."""
    try:
        return any(".tierwise-profile-" in str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_tidily(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "x.json").write_text("old")
    flags = ["--thorough", "--out", str(tmp_path / "x.json"), "--offload-dir", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-m", "profiler", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        limit = time.monotonic() + 60
        while not holds_deleted_file(process.pid) and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(0.2)
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (130, "error: interrupted\n")
    assert (tmp_path / "x.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_full_file_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system takes root")
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=False).returncode:
        pytest.skip("this sandbox mounts nothing")
    try:
        code, told = failed(capsys, "--out", str(tmp_path / "x.json"), "--offload-dir", str(place))
        assert code == 2
        assert "it has 8 MiB free, and the measurement needs 256 MiB" in told
        assert list(place.iterdir()) == []
    finally:
        subprocess.run(["umount", place], check=True)


def test_efforts_rise() -> None:
    efforts = list(effort.EFFORTS.values())
    assert [item.name for item in efforts] == ["quick", "default", "thorough"]
    assert [item.budget_s for item in efforts] == sorted(item.budget_s for item in efforts)
    assert all(max(item.disk_bytes) <= item.file_bytes // 2 for item in efforts)
    assert all(item.ffn_size == 4 * item.hidden_size for item in efforts)
