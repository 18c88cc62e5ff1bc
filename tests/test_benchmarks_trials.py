"""The search for a best batch size stops where it should, and a case is judged by its medians."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import both_sides
from benchmarks.memory_cgroup import LimitedRun
from benchmarks.trials import Case, Outcome, Promise, Run, Trial, best_batch, table
from runtime.shared_cache import Watch

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def trial(batch: int, *rates: float, ended: str = "exit code 0", killed: bool = False) -> Trial:
    ended = "killed: out of memory" if killed else ended
    runs = tuple(Run(tok_per_s=rate, looks=()) for rate in rates)
    return Trial(batch=batch, runs=runs, ended=ended, oom_killed=killed, peak_bytes=None)


NEAR, APART = [20e9] * 9 + [2e9], [20e9] * 7 + [2e9] * 3


@pytest.mark.parametrize(
    ("seen", "repeats", "counting", "aside", "only_apart"),
    [
        ([(9, NEAR)], 1, [9], [], False),
        ([(9, NEAR), (6, APART), (8, NEAR)], 2, [9, 8], [6], False),
        ([(9, NEAR), (6, APART), (7, APART), (5, APART)], 2, [9], [6, 7, 5], False),
        ([(6, APART), (7, APART), (5, APART)], 1, [6, 7, 5], [], True),
        ([(6, [2e9] * 9)], 1, [6], [], False),
        ([(6, [])], 1, [6], [], False),
        ([(6, APART), None], 1, [6], [], True),
        ([None], 1, [], [], False),
    ],
    ids=["good", "one more", "no more than two more", "all apart", "always so", "one core", "one more fails", "fails"],
)
def test_runs_whose_cores_were_apart_are_made_again(
    seen: list[tuple[float, list[float]] | None],
    repeats: int,
    counting: list[float],
    aside: list[float],
    only_apart: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Children stand in for engines; the watch saw beside them what it is told."""
    left = iter(seen)
    looks: list[float] = []

    def run_limited(*_: Any, **__: Any) -> LimitedRun:
        run = next(left)
        looks[:] = run[1] if run else []
        said = json.dumps({"tok_per_s": run[0], "seconds": 1.0}) if run else ""
        return LimitedRun(
            returncode=0 if run else 1,
            stdout=said,
            stderr="",
            wall_s=1.0,
            limit_bytes=1,
            peak_bytes=1,
            oom_killed=False,
            timed_out=False,
        )

    monkeypatch.setattr(both_sides, "run_limited", run_limited)
    monkeypatch.setattr(Watch, "between", lambda self, start, stop: looks)
    bench = both_sides.Bench(
        argparse.Namespace(
            folder=tmp_path,
            repeats=repeats,
            timeout=1.0,
            overhead="1MiB",
            max_latency="1s",
            hardware=None,
            accelerate=None,
        )
    )
    found = bench._trial(["true"], CASE, tmp_path, 4, lambda said: (said["tok_per_s"], said["seconds"]))
    assert list(found.tok_per_s) == counting
    assert [run.tok_per_s for run in found.set_aside] == aside
    assert found.only_apart == only_apart
    assert next(left, None) is None
    assert found.ran == (None not in seen)
    if found.ran:
        assert found.details["tok_per_s"] == counting[-1]
        assert ("shared no cache, each time" in str(found)) == only_apart
        assert ("set aside, the cores shared no cache: 6.00" in str(found)) == bool(aside)


def tried(rates: dict[int, float], first: tuple[int, ...], refine: int = 0) -> list[int]:
    """Sizes tried where a size without a rate is killed for memory."""

    def run(batch: int) -> Trial:
        return trial(batch, rates[batch]) if batch in rates else trial(batch, killed=True)

    return [found.batch for found in best_batch(run, first, refine)]


@pytest.mark.parametrize(
    ("rates", "first", "refine", "expected"),
    [
        ({4: 1, 8: 2, 16: 3}, (4, 8, 16, 32), 0, [4, 8, 16, 32]),
        ({4: 1, 8: 2, 16: 3, 24: 4}, (4, 8, 16, 32), 1, [4, 8, 16, 32, 24]),
        ({4: 1, 8: 2, 16: 3, 24: 4}, (4, 8, 16, 32), 2, [4, 8, 16, 32, 24, 28]),
        ({4: 1, 8: 2, 16: 3, 20: 4}, (4, 8, 16, 32), 2, [4, 8, 16, 32, 24, 20]),
        ({4: 1, 8: 2, 16: 3}, (4, 8), 0, [4, 8, 16, 32]),
        ({4: 3, 8: 2, 16: 1}, (4, 8, 16, 32), 1, [4, 8, 16]),
        ({4: 3, 8: 2, 16: 4}, (4, 8, 16, 32), 0, [4, 8, 16, 32]),
        ({}, (4, 8), 1, [4]),
        ({16: 1}, (16,), 1, [16]),
    ],
)
def test_sizes_tried(rates: dict[int, float], first: tuple[int, ...], refine: int, expected: list[int]) -> None:
    assert tried(rates, first, refine) == expected


CASE = Case(key="x", model="opt-1.3b", limit_bytes=3 * 2**30, prompt_len=32, gen_len=64, batches=(1, 2), target=2.0)


def outcome(ours: float, promised: float) -> Outcome:
    promise = Promise(throughput_tok_per_s=promised, bound_tok_per_s=promised, policy={})
    others = (trial(1, 1.0), trial(2, 2.0, 3.0, 2.5), trial(4, killed=True), trial(8, 9.0, ended="exit code 1"))
    return Outcome(case=CASE, accelerate=others, promise=promise, ours=trial(64, ours))


@pytest.mark.parametrize(
    ("ours", "promised", "met"), [(5.0, 5.5, True), (4.9, 5.5, False), (5.0, 6.0, False), (0.0, 5.0, False)]
)
def test_a_case_is_met_by_its_ratio_and_its_share(ours: float, promised: float, met: bool) -> None:
    found = outcome(ours, promised)
    assert (found.best, found.ratio, found.share) == (found.accelerate[1], ours / 2.5, ours / promised)
    assert found.met is met
    assert table([found])[1].split()[-1] == ("met" if met else "MISSED")


def test_a_case_half_run_has_dashes_and_no_verdict() -> None:
    line = table([Outcome(case=CASE, accelerate=(trial(1, 1.0),))])[1]
    assert line.endswith("85%")
    assert "–" in line


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_tell_nothing_of_the_folders_of_a_machine(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    if "against-accelerate" in path.stem:
        assert json.loads(text)["origin"]["hardware"]
    assert not re.search(r'"/(home|root|tmp|var|work)\b', text)
