"""The bench command: what it refuses before anything is loaded, and what it says of a run that took too much."""

import dataclasses
from pathlib import Path

import pytest

from costmodel.errors import InputError
from costmodel.policy import Policy, Split
from runtime import bench
from runtime.execute import BlockTimes
from runtime.measure import Meter
from runtime.timeline import Timeline
from tests.measured import measured_machine, measurement

IN_MEMORY = Split(gpu=1.0, cpu=0.0, disk=0.0)
POLICY = Policy(weights=IN_MEMORY, cache=IN_MEMORY, activations=IN_MEMORY, gpu_batch_size=2, num_gpu_batches=2)

NO_EFFECT = [
    ("--percent 50 0 100 0 100 0", "--percent"),
    ("--gpu-batch-size 8", "--gpu-batch-size"),
    ("--num-gpu-batches 2", "--num-gpu-batches"),
    ("--compress-weights on", "--compress-weights"),
    ("--overlap off", "--overlap"),
    ("--max-latency 1min", "--max-latency"),
    (
        "--num-gpu-batches 2 --compress-cache off --gpu-batch-size 8 --cpu-attention on",
        "--compress-cache, --cpu-attention, --gpu-batch-size, --num-gpu-batches",
    ),
]


@pytest.mark.parametrize(("flags", "named"), NO_EFFECT, ids=[flags for flags, _ in NO_EFFECT])
def test_flags_without_effect_beside_a_policy_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    POLICY.save("policy.json")
    assert bench.main(["--model", "dummy:opt-125m", "--policy", "policy.json", *flags.split()]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert told == [f"error: --policy is policy.json: it decides everything, so {named} cannot take effect"]
    assert [path.name for path in tmp_path.iterdir()] == ["policy.json"]


def test_switches_at_auto_go_with_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    POLICY.save(tmp_path / "policy.json")
    given: list[dict[str, object]] = []

    def measure(args: object, fixed: dict[str, object]) -> None:
        given.append(fixed)
        raise InputError("far enough")

    monkeypatch.setattr(bench, "_measure", measure)
    flags = ["--model", "dummy:opt-125m", "--policy", str(tmp_path / "policy.json"), "--overlap", "auto"]
    assert bench.main(flags) == 2
    assert given == [{}]


def test_a_tier_that_was_overfull_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    machine = measured_machine()
    run = measurement(POLICY, really=machine, planned=machine)
    limits = {"gpu": 100 * 2**20, "cpu": 50 * 2**20, "disk": 2**40}
    predicted = dataclasses.replace(run.predicted, limit_bytes=limits)
    for gpu_bytes, cpu_bytes, told in (
        (limits["gpu"], limits["cpu"] + 512, []),  # what rounding adds
        (limits["gpu"] + 3 * 2**20, limits["cpu"], ["peak GPU memory is 3 MiB above the 100 MiB"]),
        (0, limits["cpu"] + 2**19, ["peak CPU memory is 512 KiB above the 50 MiB"]),
    ):
        peaks = {"gpu": gpu_bytes, "cpu": cpu_bytes, "disk": 0}
        meter = Meter(Timeline())
        meter.add(BlockTimes(prefill_s=1.0, decode_s=1.0, steps=2))
        took = meter.estimate(2, peaks, limits, prompts=1)
        found = dataclasses.replace(
            run,
            predicted=predicted,
            measured=took,
            origin={"cpu": {"name": "made up"}, "commit": "none", "date": "2026-11-23"},
        )
        bench.show(found, [])
        out = " ".join(capsys.readouterr().out.split())
        assert [line for line in told if line in out] == told
        assert out.count(" above the ") == len(told)
