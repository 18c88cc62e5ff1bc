"""What the report and the figure of a validation say is what was measured."""

import dataclasses
import re

import numpy as np
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from test_costmodel_figures import texts
from test_costmodel_validation import LAPTOP, POLICY, cost, of_throughput, run

from costmodel.commands import terminal, validation_report
from costmodel.estimate import Estimate
from costmodel.figures import render
from costmodel.figures.validation import MOST_SHOWN, draw_errors, draw_throughput, validation_figure
from costmodel.formulations.base import LINKS
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.validation import Drawn, Validation


def of(*runs: Measurement, hardware: Hardware = LAPTOP, left: int = 0) -> Validation:
    drawn = [Drawn(origin="drawn", about="", policy=one.policy) for one in runs]
    more = [Drawn(origin="drawn", about="", policy=POLICY.replace(gpu_batch_size=64 + i)) for i in range(left)]
    return Validation(request={}, hardware=hardware, drawn=(*drawn, *more), runs=runs)


def reading(measured: Estimate) -> Estimate:
    return Estimate(**{**vars(measured), "bytes_moved": {**dict.fromkeys(LINKS, 0.0), "disk_read": 1e6}})


def three() -> Validation:
    """Predicted 30 20 10, measured 24 25 10: the first two in the wrong order."""
    computing, disk = {"gpu_compute": 0.8}, {"disk_read": 1.3}
    first = run(cost(throughput=30, decode=computing), cost(throughput=24, decode=computing))
    second = run(
        cost(throughput=20, decode=disk), reading(cost(throughput=25, decode_s=1.5, decode={"disk_read": 1.7}))
    )
    return of(first, second, of_throughput(10, 10, decode={"gpu_compute": 0.9}))


def three_times_two() -> Validation:
    """Two policies, three times each. Measured: 10, 8, 5 with the middle 8, and 20, 25, 40 with the middle 25."""
    seconds = {1: (2.0, 2.5, 4.0), 2: (2.0, 1.6, 1.0)}
    found = Validation(
        request={},
        hardware=LAPTOP,
        drawn=tuple(Drawn(origin="drawn", about="", policy=POLICY.replace(gpu_batch_size=size)) for size in seconds),
        repeats=3,
    )
    for turn in range(3):
        for size, took in seconds.items():
            tokens, took_s = (20, took[turn]) if size == 1 else (40, took[turn])
            measured = cost(prefill_s=took_s / 2, decode_s=took_s / 2, throughput=tokens / took_s)
            found = found.with_run(run(cost(throughput=10.0 * size), measured, POLICY.replace(gpu_batch_size=size)))
    return found


def test_three_sentences_say_what_happened() -> None:
    what, how_far, following = validation_report.sentences(three())
    assert what == (
        "3 policies for opt-125m were predicted, then run in 200 MiB of memory and 100 MiB of a second tier of memory; "
        "1 of them streamed what did not fit from disk."
    )
    # Errors 25 %, −20 % and 0. The third run's processor was at work for 0.9 s that were not predicted.
    assert how_far == (
        "Predicted throughput is off by 20.0 % in the median and by 25.0 % at the most; the largest difference is GPU "
        "and CPU compute in decode: 900 ms more than predicted in all runs together."
    )
    assert following == (
        "The policy predicted best ran at 24 token/s, 4.0 % below the fastest that was measured, 25 token/s "
        "(Kendall's tau 0.33, where 1 is the same order)."
    )


def test_the_sentences_hold_however_it_went() -> None:
    """Of few runs the worst is told, of many the ninth in ten; a direction only where all runs share it."""
    slow = of(*(of_throughput(10 * factor, 10) for factor in (2, 3, 7)))
    assert validation_report.sentences(slow)[1].startswith(
        "Predicted throughput is off by 200.0 % in the median and by 600.0 % at the most, always too high"
    )
    fast = of(*(of_throughput(9, 10) for _ in range(10)))
    assert validation_report.sentences(fast)[1].startswith(
        "Predicted throughput is off by 10.0 % in the median, nine times in ten by less than 10.0 %, always too low"
    )
    assert validation_report.sentences(of(of_throughput(15, 10)))[1].startswith(
        "Predicted throughput is off by 50.0 %, too high"
    )
    right = of(of_throughput(20, 20), of_throughput(10, 10))
    assert validation_report.sentences(right)[1] == (
        "Predicted throughput is off by 0.0 % in the median and by 0.0 % at the most."
    )
    wrong = of(*(of_throughput(predicted, 21 - predicted) for predicted in range(1, 11)))
    assert validation_report.sentences(wrong)[2] == (
        "The policy predicted best ran at 11 token/s, 45.0 % below the fastest that was measured, 20 token/s "
        "(Kendall's tau -1.00, where 1 is the same order)."
    )


def test_a_right_order_and_a_single_run_have_their_sentences() -> None:
    right = of(of_throughput(30, 25), of_throughput(10, 10))
    expected = "The policy predicted best was the fastest that was measured, 25 token/s (Kendall's tau 1.00"
    assert validation_report.sentences(right)[2].startswith(expected)
    alone = of(of_throughput(30, 25), hardware=Hardware.from_catalog("t4"))
    what, _, following = validation_report.sentences(alone)
    assert what.startswith("1 policy for opt-125m was predicted, then run in 15 GiB of GPU memory and ")
    assert "give more --runs" in following


def test_the_report_has_every_table(capsys: pytest.CaptureFixture[str]) -> None:
    runs = (*three().measurements, run(cost(), cost(peaks=(132, 0, 0))))
    terminal.show(*validation_report.report(of(*runs, left=2), written=["v.json"]))
    told = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in told.splitlines()]
    assert ["throughput", "4", "10.0 %", "23.5 %", "+25.0 %", "0.0 %"] in rows
    assert ["disk read", "1", "20.0 %", "20.0 %", "-20.0 %", "-20.0 %"] in rows
    assert ["decode", "disk read", "1", "1.3 s", "1.7 s", "1.31", "+400 ms"] in rows
    unwrapped = " ".join(told.split())
    assert "1 run took more than the usable part of a budget, 10.0 % at the most" in unwrapped
    assert "2 runs still to be made (--resume)" in unwrapped
    assert max(map(len, told.splitlines())) <= terminal.WIDTH


def test_repeats_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    found = three_times_two()
    what, how_far, following = validation_report.sentences(found)
    assert what.startswith("2 policies for opt-125m were predicted, then run 3 times each in 200 MiB of memory")
    # The middle runs: 10 / 8 and 20 / 25. The others are off theirs by 2/8, −3/8, −5/25 and 15/25.
    assert how_far.startswith(
        "Predicted throughput is off by 22.5 % in the median and by 25.0 % at the most (run again, the same policy "
        "differs by 31.2 % in the median); the largest difference is "
    )
    assert how_far.endswith("in the middle runs together.")
    assert "was the fastest that was measured, 25 token/s" in following
    terminal.show(*validation_report.report(found, written=["v.json"]))
    told = " ".join(capsys.readouterr().out.split())
    assert "Errors of 2 runs, the middle one of each policy: predicted / measured − 1" in told
    assert "(busy seconds of the middle runs)" in told
    differs = "of the same policies: throughput differs from the middle run's by"
    assert f"Run again 4 more runs {differs} 31.2 % in the median and by 60.0 % at the most" in told
    part = dataclasses.replace(found, runs=found.runs[:3])
    assert "run up to 3 times each" in validation_report.sentences(part)[0]
    assert "(run again, the same policy differs by 20.0 %)" in validation_report.sentences(part)[1]
    terminal.show(*validation_report.report(part, written=["v.json"]))
    told = " ".join(capsys.readouterr().out.split())
    assert f"Run again 1 more run {differs} 20.0 % Unfinished 3 runs still to be made" in told


def test_what_did_not_differ_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    """Seconds that sum to a rounding error, and an error that rounds to nothing, are neither more nor less."""
    predicted = cost(throughput=10.0004, decode_s=0.3, decode={"disk_read": 0.1 + 0.2})
    measured = cost(throughput=10.0, decode_s=0.3, decode={"disk_read": 0.3, "gpu_compute": 0.1})
    terminal.show(*validation_report.report(of(run(predicted, measured)), written=["v.json"]))
    told = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in told.splitlines()]
    assert ["decode", "disk read", "1", "300 ms", "300 ms", "1.00", "0 s"] in rows
    assert ["throughput", "1", "0.0 %", "0.0 %", "0.0 %", "0.0 %"] in rows
    assert not re.search(r"[-+−]0(\.0)? ", told)


def test_markers_are_the_runs() -> None:
    axes = draw_throughput(Figure().subplots(), three())
    found = [tuple(point) for line in axes.lines if line.get_linestyle() == "None" for point in line.get_xydata()]
    assert sorted(found) == [(10, 10), (24, 30), (25, 20)]
    assert axes.get_xlim() == axes.get_ylim()
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["GPU compute (2)", "disk read (1)"]


def test_bars_go_from_the_least_to_the_most() -> None:
    found = three_times_two()
    axes = draw_throughput(Figure().subplots(), found)
    (bars,) = [one for one in axes.collections if isinstance(one, LineCollection)]
    assert [segment.tolist() for segment in bars.get_segments()] == [[[5, 10], [10, 10]], [[20, 20], [40, 20]]]
    assert axes.get_xlim()[0] < 5 < 40 < axes.get_xlim()[1]
    assert axes.get_xlabel() == "measured (token/s; bar: its runs)"
    once = draw_throughput(Figure().subplots(), three())
    assert not [one for one in once.collections if isinstance(one, LineCollection)]
    assert once.get_xlabel() == "measured (token/s)"


def test_errors_are_drawn_within_the_axes() -> None:
    axes = draw_errors(Figure().subplots(), of(of_throughput(30, 10), of_throughput(9, 10)))
    points = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "None"]
    assert np.isclose(points, MOST_SHOWN).sum() == 1
    assert np.isclose(points, -10).sum() == 1
    assert [label.get_text() for label in axes.get_yticklabels()][::-1] == [
        "throughput",
        "prefill time",
        "decode time",
        "peak GPU memory",
    ]


def test_the_figure_says_how_far_off_and_is_repeatable() -> None:
    told = texts(validation_figure(three()))
    assert "opt-125m on cpu-laptop: predicted throughput is off by 20.0 % in the median" in told
    assert "3 policies, 64 + 8 tokens; 90 % within 24.0 %; Kendall's tau 0.33" in told
    assert render(validation_figure(three()), "svg") == render(validation_figure(three()), "svg")
