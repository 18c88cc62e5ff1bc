"""Loads behind computation: every kind of step runs, is timed, and leaves nothing behind."""

import dataclasses
import threading
from pathlib import Path

import pytest
import torch

from profiler import hidden_loads
from profiler.effort import EFFORTS
from profiler.timing import Reading, Results, Timer

EFFORT = dataclasses.replace(EFFORTS["quick"], hidden_size=256, ffn_size=512, head_dim=64)
READ_BYTES_PER_S = 1e9


def before(*, flops_per_s: float = 1e11) -> Results:
    """What the probes before this one found: a disk of 1 GB/s, and products that take as long for any rows."""
    found = Results()
    read = Reading(name="disk_read", at=(), unit="bytes/s", work=READ_BYTES_PER_S, samples=(1.0,))
    at = (("device", "cpu"), ("dtype", "bfloat16"))
    products = [
        Reading(name="matmul", at=(*at, ("rows", rows)), unit="FLOP/s", work=flops_per_s, samples=(1.0,))
        for rows in (1, 64, 128, 1024)
    ]
    found.add([read, *products])
    return found


def probe(folder: Path) -> hidden_loads.HiddenLoads:
    settings = {"disk_threads": 2, "chunk_bytes": 2**20}
    return hidden_loads.HiddenLoads(torch.device("cpu"), EFFORT, folder, lambda: settings, weight=1.0)


def test_each_kind_of_step_is_timed_and_nothing_is_left(tmp_path: Path) -> None:
    found = probe(tmp_path).run(Timer(), 0.5, before())
    steps = {dict(reading.at)["does"]: reading.samples for reading in found}
    assert set(steps) == {hidden_loads.COMPUTE, hidden_loads.LOAD, hidden_loads.BOTH}
    assert len({len(samples) for samples in steps.values()}) == 1
    assert all(seconds > 0 for samples in steps.values() for seconds in samples)
    assert list(tmp_path.iterdir()) == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("tierwise")] == []


@pytest.mark.parametrize(("flops_per_s", "prompts"), [(1e9, 1), (70e9, 64), (1e11, 128), (1e15, 128)])
def test_as_many_prompts_as_compute_for_as_long_as_the_weights_are_read(
    tmp_path: Path, flops_per_s: float, prompts: int
) -> None:
    """FLOP/s over bytes/s is the number of rows in 16 bits; more than :data:`hidden_loads.MOST_PROMPTS` are not run."""
    found = probe(tmp_path).run(Timer(), 0.0, before(flops_per_s=flops_per_s))
    assert {dict(reading.at)["prompts"] for reading in found} == {prompts}


def test_later_rounds_measure_the_same(tmp_path: Path) -> None:
    one = probe(tmp_path)
    first, second = one.run(Timer(), 0.0, before()), one.run(Timer(), 0.0, before(flops_per_s=1e9))
    assert [reading.at for reading in first] == [reading.at for reading in second]


def test_the_image_has_room_in_time_and_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = dataclasses.replace(EFFORT, hidden_size=4096, ffn_size=16384)
    one = hidden_loads.HiddenLoads(torch.device("cpu"), wide, tmp_path, dict, weight=1.0)

    def image_bytes(most_bytes: float) -> int:
        hidden, ffn = one._widths(most_bytes)
        assert ffn == 4 * hidden
        return hidden_loads.NUM_LAYERS * 2 * (4 * hidden**2 + 2 * hidden * ffn)

    assert hidden_loads.MOST_BYTES / 4 < image_bytes(1e12) <= hidden_loads.MOST_BYTES
    assert 25e6 < image_bytes(1e8) <= 1e8
    monkeypatch.setattr(hidden_loads, "free_bytes", lambda folder: 4e7)
    assert image_bytes(1e12) <= 1e7
