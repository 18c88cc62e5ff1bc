"""The search for a best batch size stops where it should, and a case is judged by its medians."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from benchmarks.trials import Case, Outcome, Promise, Run, Trial, best_batch, table, that_count

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def trial(batch: int, *rates: float, ended: str = "exit code 0", killed: bool = False) -> Trial:
    ended = "killed: out of memory" if killed else ended
    return Trial(batch=batch, tok_per_s=rates, ended=ended, oom_killed=killed, peak_bytes=None)


def test_runs_whose_cores_were_apart_do_not_count() -> None:
    near, apart, moved = (
        Run(tok_per_s=rate, looks=looks, details={})
        for rate, looks in ((9.0, [20e9] * 9 + [2e9]), (6.0, [2e9] * 10), (8.0, [20e9] * 7 + [2e9] * 3))
    )
    looks = [look for run in (near, apart, moved) for look in run.looks]
    assert that_count([near, apart, moved], looks) == [near]
    assert that_count([apart], apart.looks) == [apart], "a machine that is always so"
    assert that_count([near, apart], []) == [near, apart], "one core"
    assert "cores shared no cache: 6.00, 8.00)" in str(dataclasses.replace(trial(1, 9.0), set_aside=(6.0, 8.0)))


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
