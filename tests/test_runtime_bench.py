"""The bench command: what it refuses before anything is loaded."""

from pathlib import Path

import pytest

from costmodel.errors import InputError
from costmodel.policy import Policy, Split
from runtime import bench

IN_MEMORY = Split(gpu=1.0, cpu=0.0, disk=0.0)
POLICY = Policy(weights=IN_MEMORY, cache=IN_MEMORY, activations=IN_MEMORY, gpu_batch_size=2, num_gpu_batches=2)

NO_EFFECT = [
    ("--percent 50 0 100 0 100 0", "--percent"),
    ("--gpu-batch-size 8", "--gpu-batch-size"),
    ("--num-gpu-batches 2", "--num-gpu-batches"),
    ("--compress-weights on", "--compress-weights"),
    ("--overlap off", "--overlap"),
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
