"""The loop closed on a tiny model: predict, run, report; killed and resumed; what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from costmodel.hardware import Gpu, Hardware
from costmodel.units import GiB
from costmodel.validation import Validation
from runtime import budgets, own_process
from runtime.host_memory import HostMemory
from runtime.shared_cache import Watch
from runtime.validate import main
from runtime.validation_runs import TimeLimit

TINY = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 96,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(autouse=True)
def _all_runs_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the cores of the machine that the tests run on share."""
    monkeypatch.setattr(Watch, "between", lambda self, start, stop: [])


@pytest.fixture
def flags(tmp_path: Path) -> list[str]:
    """A model of 0.2 MB in 13 MiB, up to 12.5 of them for kernels, and 1 MiB, on a machine of the catalogue."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "laptop.json").write_text(json.dumps(Hardware.from_catalog("cpu-laptop").to_dict()))
    (tmp_path / "offload").mkdir()
    return [
        *("--model", f"dummy:{tmp_path / 'tiny.json'}", "--hardware", str(tmp_path / "laptop.json")),
        *("--device", "cpu", "--dtype", "bfloat16", "--offload-dir", str(tmp_path / "offload")),
        *("--gpu-memory", "13MiB", "--cpu-memory", "1MiB", "--runs", "6", "--seed", "3"),
        *("--prompt-len", "8", "--gen-len", "4", "--max-seconds", "0.05", "--out", str(tmp_path / "v.json")),
    ]


def test_policies_are_predicted_run_and_reported(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, "--plot", str(tmp_path / "v.png")]) == 0
    told = capsys.readouterr()
    found = Validation.from_file(tmp_path / "v.json")
    assert len(found.measurements) == len(found.drawn) == 6
    for drawn, one in zip(found.drawn, found.measurements, strict=True):
        assert one.policy == drawn.policy
        assert one.predicted.feasible
        assert one.predicted.latency_s <= 0.05
        assert one.measured.latency_s > 0
        assert one.workload.num_prompts == one.policy.block_size
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    for text in (
        "Errors of 6 runs",
        "prefill time",
        "peak disk",
        "Throughput by measured bottleneck",
        "6 policies for",
    ):
        assert text in told.out
    assert "Kendall's tau" in told.out
    lines = [line for line in told.err.splitlines() if "/6 " in line]
    assert [line.split("/")[0] for line in lines] == list("123456")
    assert "searched: best" in lines[0]


def test_an_interrupted_validation_goes_on(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = own_process.call, iter(range(100))

    def call(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(own_process, "call", call)
        assert main(flags) == 130
    assert "v.json: --resume goes on with them" in capsys.readouterr().err
    first = Validation.from_file(tmp_path / "v.json")
    assert len(first.measurements) == 2
    assert main(flags) == 2
    assert "that file exists; --resume goes on with it" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert "has 2 of 6 runs" in capsys.readouterr().err
    whole = Validation.from_file(tmp_path / "v.json")
    assert whole.drawn == first.drawn
    assert whole.measurements[:2] == first.measurements
    assert len(whole.measurements) == 6
    # The same seed draws the same policies; a finished one is only reported again.
    assert main([*flags, "--out", str(tmp_path / "again.json")]) == 0
    assert Validation.from_file(tmp_path / "again.json").drawn == whole.drawn
    assert main([*flags, "--resume"]) == 0
    assert Validation.from_file(tmp_path / "v.json") == whole


def test_repeats_go_in_rounds_and_are_gone_on_with_in_the_second(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--runs", "2", "--repeats", "2"]
    left = iter([True, True, True, False])
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "allows", lambda self, expected_s: next(left))
        assert main([*flags, "--time-limit", "10min"]) == 75
    assert "v.json has 3 of 4 runs; --resume goes on with them" in capsys.readouterr().err
    first = Validation.from_file(tmp_path / "v.json")
    assert [len(runs) for runs in first.by_policy] == [2, 1]
    assert main([*flags, "--resume", "--repeats", "3"]) == 2
    assert "--repeats is 3, but" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    told = capsys.readouterr()
    assert "has 3 of 4 runs" in told.err
    assert [line.split("/4 ")[0] for line in told.err.splitlines() if "/4 " in line] == ["4"]
    assert "Errors of 2 runs, the middle one of each policy" in told.out
    assert "2 more runs of the same policies" in told.out
    whole = Validation.from_file(tmp_path / "v.json")
    assert whole.runs[:3] == first.runs
    assert [one.policy for one in whole.runs] == [one.policy for one in (*whole.drawn, *whole.drawn)]
    for runs, one in zip(whole.by_policy, whole.measurements, strict=True):
        assert one.measured.latency_s == min(run.measured.latency_s for run in runs)


def test_a_run_while_the_cores_shared_no_cache_is_set_aside(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[float] = []

    def between(watch: Watch, start: float, stop: float) -> list[float]:
        asked.append(stop - start)
        return [2e9, 2e9] if len(asked) == 2 else [18e9, 20e9]

    monkeypatch.setattr(Watch, "between", between)
    assert main([*flags, "--runs", "1", "--repeats", "3"]) == 0
    found = Validation.from_file(tmp_path / "v.json")
    assert found.apart == {1}
    assert found.by_policy == ((found.runs[0], found.runs[2]),)
    assert not found.left, "two of three count"
    assert asked == pytest.approx([one.measured.latency_s for one in found.runs])
    told = capsys.readouterr().out
    assert "1 run of 3: the cores shared no cache meanwhile" in " ".join(told.split())


def test_a_file_from_before_repeats_is_gone_on_with(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--runs", "2"]
    assert main(flags) == 0
    data = json.loads((tmp_path / "v.json").read_text())
    del data["repeats"], data["request"]["repeats"], data["measurements"][1]
    (tmp_path / "v.json").write_text(json.dumps(data))
    assert main([*flags, "--resume", "--repeats", "2"]) == 2
    assert "--repeats is 2, but" in capsys.readouterr().err
    assert main([*flags, "--resume"]) == 0
    assert "has 1 of 2 runs" in capsys.readouterr().err
    assert len(Validation.from_file(tmp_path / "v.json").runs) == 2


def killed_once_there(command: list[str], path: Path) -> None:
    """Run a Python program of this source tree, and kill it as soon as there is a file at ``path``."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        patience = time.monotonic() + 120
        while not path.exists() and process.poll() is None and time.monotonic() < patience:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()


def test_a_killed_validation_loses_one_run_at_most(flags: list[str], tmp_path: Path) -> None:
    path = tmp_path / "v.json"
    killed_once_there(["-m", "runtime.validate", *flags, "--runs", "20"], path)
    killed = Validation.from_file(path)
    assert 1 <= len(killed.measurements) < 20
    assert main([*flags, "--runs", "20", "--resume"]) == 0
    whole = Validation.from_file(path)
    assert whole.measurements[: len(killed.measurements)] == killed.measurements
    assert len(whole.measurements) == len(whole.drawn) == len(killed.drawn)


def test_a_time_limit_ends_between_two_runs(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = iter([True, True, False])
    with monkeypatch.context() as patch:
        patch.setattr(TimeLimit, "allows", lambda self, expected_s: next(left))
        assert main([*flags, "--time-limit", "10min"]) == 75
    told = capsys.readouterr()
    assert "no time is left for the next run, which should take" in told.err
    assert "--time-limit is reached" in told.err
    assert "v.json has 2 of 6 runs; --resume goes on with them" in told.err
    assert told.out == ""
    assert main([*flags, "--time-limit", "10min", "--resume"]) == 0
    assert len(Validation.from_file(tmp_path / "v.json").measurements) == 6


def test_the_limit_goes_by_the_slowest_run_so_far() -> None:
    now_s = 100.0
    limit = TimeLimit(60.0, now=lambda: now_s)
    assert limit.allows(40.0)
    assert not limit.allows(40.1)  # half as much again is kept for what is not known yet
    limit.learn(10.0, 5.0)
    assert limit.allows(60.0)  # faster than expected is no reason to expect more than that
    limit.learn(10.0, 30.0)
    limit.learn(10.0, 20.0)
    assert limit.allows(20.0)
    now_s = 101.0
    assert not limit.allows(20.0)


def test_runs_on_a_gpu_leave_room_for_its_libraries(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free before the first run is not free after it, and a budget beyond what is free is refused."""
    at = flags.index("--gpu-memory")
    flags = [*flags[:at], *flags[at + 2 :], "--runs", "1"]
    host = HostMemory(total_bytes=8 * GiB, available_bytes=4 * GiB, limited_by="")
    monkeypatch.setattr(budgets, "host_memory", lambda: host)
    assert main(flags) == 0
    assert Validation.from_file(tmp_path / "v.json").hardware.capacity_bytes["gpu"] == 0.8 * 4 * GiB - 2**20
    (tmp_path / "v.json").unlink()
    monkeypatch.setattr(Gpu, "is_host_memory", False)  # as on a machine with a GPU
    assert main(flags) == 0
    assert Validation.from_file(tmp_path / "v.json").hardware.capacity_bytes["gpu"] == 0.8 * 4 * GiB - 2**20 - GiB


def test_a_file_of_other_flags_is_not_gone_on_with(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*flags, "--runs", "1"]
    assert main(flags) == 0
    assert main([*flags, "--resume", "--seed", "4"]) == 2
    assert "--seed is 4, but" in capsys.readouterr().err
    other = Hardware.from_catalog("cpu-laptop").replace("links.disk_read.bytes_per_s", 1e9, source="test")
    (tmp_path / "laptop.json").write_text(json.dumps(other.to_dict()))
    assert main([*flags, "--resume"]) == 2
    assert "was begun with other rates" in capsys.readouterr().err


def test_a_median_error_above_the_limit_fails(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The catalogue's laptop computes without any overhead of a call: a tiny model is hundreds of percent off."""
    assert main([*flags, "--runs", "2", "--fail-above", "0.001"]) == 1
    assert "error: the median error of throughput is" in capsys.readouterr().err
    assert main([*flags, "--runs", "2", "--resume", "--fail-above", "1000000"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--fail-above", "0"], "--fail-above is 0: it must be greater than 0"),
        (["--runs", "0"], "--runs is 0: it must be at least 1"),
        (["--repeats", "0"], "--repeats is 0: it must be at least 1"),
        (["--policy", "auto"], "unknown flag --policy"),
        (["--plot", "figure.txt"], "--plot is figure.txt: the name must end in one of"),
        (["--gen-len", "100"], "model 'tiny' has 64 positions"),
    ],
)
def test_wrong_flags_are_one_sentence(
    flags: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*flags, *more]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""


def test_nothing_that_fits_is_said(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*flags, "--max-seconds", "0.0000001"]) == 3
    assert "raise --max-seconds to at least" in capsys.readouterr().err
