"""Tables and figures of a validation against values worked out by hand."""

from itertools import pairwise
from math import nan
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from test_costmodel_figures import bars
from test_costmodel_validation import POLICY, cost, of_throughput, run
from test_costmodel_validation_report import of, three, three_times_two

from costmodel.figures.agreement import agreement_figure, draw_agreement
from costmodel.figures.ranking import draw_order, draw_regret, ranking_figure
from costmodel.figures.residuals import draw_busy_ratios, draw_gaps, residuals_figure
from costmodel.studies import validation as studies
from costmodel.validation.statistics import WAITING


def late() -> pd.DataFrame:
    """One run, 1 + 3 s instead of 1 + 2: the disk took 0.8 s more, 0.2 s more were not hidden behind it."""
    one = run(
        cost(decode_s=2.0, decode={"gpu_compute": 1.5, "disk_read": 1.8}),
        cost(decode_s=3.0, decode={"gpu_compute": 1.0, "disk_read": 2.6}),
    )
    return studies.residuals_table([one])


def test_pairs_hold_both_figures_of_every_quantity() -> None:
    table = studies.pairs_table(three())
    throughput = table[table["quantity"] == "throughput"]
    assert throughput["predicted"].tolist() == [30, 20, 10]
    assert throughput["measured"].tolist() == [24, 25, 10]
    assert throughput["error"].tolist() == pytest.approx([0.25, -0.2, 0])
    assert throughput["regime"].tolist() == ["gpu_compute", "disk_read", "gpu_compute"]
    decode = table[table["quantity"] == "decode"]
    assert decode["measured"].tolist() == [1.0, 1.5, 1.0]


def test_errors_are_by_regime_with_all_runs_first() -> None:
    table = studies.errors_table(three()).set_index(["regime", "quantity"])
    assert table.index[0] == (studies.ALL, "throughput")
    assert table.loc[(studies.ALL, "throughput"), "median"] == pytest.approx(0.2)
    assert table.loc[("GPU compute", "throughput"), ["runs", "worst"]].tolist() == [2, 0.25]
    assert table.loc[("disk read", "decode time"), "bias"] == pytest.approx(1 / 1.5 - 1)


def test_residuals_sum_to_the_difference() -> None:
    table = late()
    decode = table[table["phase"] == "decode"].set_index("resource")
    assert decode.loc["disk_read", "gap_s"] == pytest.approx(0.8)
    assert decode.loc[WAITING, "gap_s"] == pytest.approx(0.2)
    assert decode.loc["gpu_compute", "gap_s"] == 0, "hidden work costs nothing"
    assert decode.loc["gpu_compute", "ratio"] == pytest.approx(1 / 1.5)
    assert table["gap_s"].sum() == pytest.approx(1.0)
    assert table["gap_share"].sum() == pytest.approx(1.0 / 4.0)


def test_causes_are_named_for_people() -> None:
    table = studies.causes_table(three())
    assert set(table["resource"]) <= {"GPU and CPU compute", "disk read", "not hidden"}
    assert table["gap_s"].abs().is_monotonic_decreasing


def test_ranking_is_in_the_predicted_order() -> None:
    table = studies.ranking_table(three())
    assert table["measured_tok_per_s"].tolist() == [24, 25, 10]
    assert table["best_so_far"].tolist() == pytest.approx([24 / 25, 1, 1])
    assert 1 - table["best_so_far"][0] == pytest.approx(three().summary().ranking.regret)  # type: ignore[union-attr]


def test_findings_count() -> None:
    within, places = studies.findings(three())
    assert within.startswith("Throughput is within 10% for 33% of the policies; peak memory is off by 0.0%")
    assert places == "The 3 fastest policies stood at 1, 2, 3 of 3 in the predicted order."


def test_files_are_a_row_each(tmp_path: Path) -> None:
    for name, found in (("a.json", three()), ("b.json", of(of_throughput(11, 10))), ("c.json", three_times_two())):
        found.save(tmp_path / name)
    table = studies.files_table(sorted(tmp_path.glob("*.json")))
    assert table["file"].tolist() == ["a.json", "b.json", "c.json"]
    assert table["throughput_median"].tolist() == pytest.approx([0.2, 0.1, 0.225])
    assert table["regret"].isna().tolist() == [False, True, False]
    assert table["repeatability"].tolist() == pytest.approx([nan, nan, 0.3125], nan_ok=True)


def test_agreement_has_a_panel_a_quantity_and_marks_at_the_runs() -> None:
    table = studies.pairs_table(three())
    assert [axes.get_title(loc="left") for axes in agreement_figure(table).axes if axes.axison] == [
        "Throughput",
        "Prefill time",
        "Decode time",
        "Peak GPU memory",
    ]
    axes = draw_agreement(Figure().subplots(), table[table["quantity"] == "decode"])
    points = [tuple(point) for line in axes.lines if line.get_linestyle() == "None" for point in line.get_xydata()]
    assert sorted(points) == [(1.0, 1.0), (1.0, 1.0), (1.5, 1.0)]


def test_a_tier_that_was_not_used_after_all_is_no_point() -> None:
    table = studies.pairs_table(of(run(cost(peaks=(100, 5, 0)), cost(peaks=(100, 0, 0))), of_throughput(10, 10)))
    assert (table["quantity"] == "peak cpu").sum() == 1
    assert "Peak CPU memory" not in {axes.get_title(loc="left") for axes in agreement_figure(table).axes}


@pytest.mark.parametrize("span", [1.05, 1.3, 3.0, 5.0, 12.0, 300.0, 5000.0])
def test_labels_of_ticks_do_not_touch(span: float) -> None:
    peaks = [(260e6, 0.0, 0.0), (260e6 * span, 0.0, 0.0)]
    runs = [run(cost(peaks=peak), cost(peaks=peak)) for peak in peaks]
    figure = agreement_figure(studies.pairs_table(of(*runs)))
    FigureCanvasAgg(figure).draw()
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == "Peak GPU memory"]
    low, high = axes.get_xlim()
    shown = [tick.label1.get_window_extent() for tick in axes.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert 2 <= len(shown) <= 6
    assert all(one.x1 + 3 < other.x0 for one, other in pairwise(shown))


def test_bars_of_a_run_end_at_its_difference() -> None:
    axes = draw_gaps(Figure().subplots(), late())
    assert sum(bar.get_height() for bar in bars(axes)) == pytest.approx(25.0)
    together = next(line for line in axes.lines if line.get_label() == "together")
    assert list(together.get_ydata()) == pytest.approx([25.0])


def test_ratios_are_drawn_with_their_median() -> None:
    axes = draw_busy_ratios(Figure().subplots(), late())
    decode = next(line for line in axes.lines if str(line.get_label()).startswith("decode"))
    assert sorted(decode.get_xdata()) == pytest.approx([1 / 1.5, 2.6 / 1.8])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["disk read", "GPU and CPU compute"]


def test_order_and_regret_are_drawn() -> None:
    table = studies.ranking_table(three())
    axes = draw_order(Figure().subplots(), table)
    drawn = next(line for line in axes.lines if line.get_label() == "measured, drawn")
    assert list(drawn.get_ydata()) == [24, 25, 10]
    (line,) = draw_regret(Figure().subplots(), table).lines
    assert list(line.get_ydata()) == pytest.approx([96, 100, 100])


def test_one_run_can_be_drawn() -> None:
    alone = of(run(cost(decode={"disk_read": 0.5}), cost(decode={"disk_read": 0.6}), POLICY))
    assert residuals_figure(studies.residuals_table(alone.measurements)).axes
    assert ranking_figure(studies.ranking_table(alone)).axes
