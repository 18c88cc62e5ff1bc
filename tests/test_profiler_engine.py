"""The engine's own time: what lies between two layers is not counted, and nothing is left behind."""

import dataclasses
from pathlib import Path

import pytest
import torch

from profiler import engine
from profiler.effort import EFFORTS
from profiler.timing import Results, Timer

EFFORT = dataclasses.replace(EFFORTS["quick"], hidden_size=256, working_set_bytes=2**20)
TICK_S, PAUSE_S = 1e-3, 7.0


class Clock:
    """A millisecond from one reading to the next, so that nothing depends on the machine."""

    now_s = 0.0

    def __call__(self) -> float:
        self.now_s += TICK_S
        return self.now_s


def test_every_cache_is_timed_and_what_comes_between_layers_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, pauses = Clock(), []

    def pause() -> None:
        pauses.append(PAUSE_S)
        clock.now_s += PAUSE_S

    monkeypatch.setattr(engine.EngineLayers, "_between", lambda self, compressed: pause)
    probe = engine.EngineLayers(torch.device("cpu"), EFFORT, tmp_path, weight=1.0)
    found = [(dict(reading.at), reading.samples) for reading in probe.run(Timer(now=clock), 0.0, Results())]
    readings = {(at["weights"], at["cache"]): samples for at, samples in found}
    caches = [engine.STAYS, engine.CARRIED, engine.COMPRESSED, engine.PARTS, engine.COMPRESSED_PARTS]
    timed = [*((engine.PLAIN_WEIGHTS, cache) for cache in caches), (engine.COMPRESSED_WEIGHTS, engine.STAYS)]
    assert list(readings) == timed
    passes = 1 + 3  # prefill, and the fewest steps of decode
    assert len(pauses) == 2 * 2 + len(timed) * passes * engine.NUM_LAYERS
    for samples in readings.values():
        assert samples == pytest.approx([TICK_S] * (passes - 1) * (engine.NUM_LAYERS - 1))
    assert list(tmp_path.iterdir()) == []


def test_more_time_means_more_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.EngineLayers, "_between", lambda self, compressed: lambda: None)
    probe = engine.EngineLayers(torch.device("cpu"), EFFORT, tmp_path, weight=1.0)
    short, long = (probe.run(Timer(), budget_s, Results()) for budget_s in (0.0, 900.0))
    assert all(len(more.samples) > len(few.samples) for few, more in zip(short, long, strict=True))
