"""What the notebooks' figures draw is what their tables hold, and a print without colour still tells series apart."""

import itertools
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from costmodel import Hardware
from costmodel.figures import dots, machine, published, purchase, searches, style

PROFILE = Path(__file__).resolve().parent.parent / "benchmarks/results/2026-11-23-epyc-2-cores-profile.json"


@pytest.fixture
def axes() -> Axes:
    return Figure().subplots()


def markers(axes: Axes, marker: str) -> list[list[float]]:
    """x and y of every point drawn with this marker."""
    points = [line.get_xydata() for line in axes.lines if line.get_marker() == marker]
    return np.concatenate(points).tolist()


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


# ------------------------------------------------------------------ the style


def test_marks_differ_in_every_way() -> None:
    for attribute in ("colour", "marker", "dashes", "hatch"):
        assert len({str(getattr(mark, attribute)) for mark in style.MARKS}) == len(style.MARKS), attribute


def test_the_first_marks_differ_in_lightness() -> None:
    """Blue, orange and green are told apart in grey by at least a tenth of the range from black to white."""
    weights = (0.2126, 0.7152, 0.0722)  # Rec. 709
    grey = sorted(float(np.dot(weights, to_rgb(mark.colour))) for mark in style.MARKS[:3])
    assert min(b - a for a, b in itertools.pairwise(grey)) > 0.1


def test_paper_figures_show_the_bytes_of_their_files() -> None:
    figure = style.paper_figure(style.COLUMN, 2.0)
    style.dress(figure.subplots(), title="title", x="x", y="y")
    before = dict(mpl.rcParams)
    assert figure._repr_png_() == style.render(figure, "png")
    assert figure._repr_pdf_() == style.render(figure, "pdf")
    assert dict(mpl.rcParams) == before
    assert b"/Type3" not in figure._repr_pdf_(), "publishers refuse Type 3 fonts"


# ------------------------------------------------------------------ the machine


def test_products_are_drawn_where_they_were_measured(axes: Axes) -> None:
    machine.draw_products(axes, Hardware.from_file(PROFILE))
    drawn = markers(axes, "o")
    assert [1, 20.407] in drawn
    assert [256, 428.33] in drawn
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} >= {"layer", "LM head", "layer, float32"}


def test_links_of_a_machine_without_a_gpu_are_called_copies(axes: Axes) -> None:
    machine.draw_links(axes, Hardware.from_file(PROFILE))
    legend = axes.get_legend()
    assert legend is not None
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["copy, tier 2 → 1", "copy, tier 1 → 2", "disk read", "disk write"]


def test_sharing_marks_every_tier_that_is_there(axes: Axes) -> None:
    table = pd.DataFrame(
        {
            "machine": ["a", "b"],
            "gpu_prompts": [10.0, 20.0],
            "cpu_prompts": [100.0, None],
            "disk_prompts": [900.0, 50.0],
        }
    )
    machine.draw_sharing(axes, table)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a"]
    assert markers(axes, "o") == [[20, 0], [10, 1]]
    assert markers(axes, "^") == [[50, 0], [900, 1]]


# ------------------------------------------------------------------ published runs


def test_errors_are_drawn_in_percent_first_run_on_top(axes: Axes) -> None:
    table = pd.DataFrame({"run": ["a", "b"], "flexgen_error": [0.5, -0.2], "roofline_error": [0.02, 0.03]})
    published.draw_errors(axes, table)
    assert markers(axes, "D") == [[50, 1], [-20, 0]]
    assert markers(axes, "o") == [[2, 1], [3, 0]]


def test_seconds_are_shares_with_the_bottleneck_in_bold(axes: Axes) -> None:
    busy = {"gpu_compute": 0.97, "cpu_compute": 0.0, "cpu_to_gpu": 0.41, "gpu_to_cpu": 0.0, "disk_read": 0.0,
            "disk_write": 0.002}  # fmt: skip
    rows = [
        {"run": "a", "phase": "decode", "resource": name, "busy_share": share, "phase_share": 0.6,
         "bottleneck": name == "gpu_compute"}
        for name, share in busy.items()
    ]  # fmt: skip
    published.draw_seconds(axes, pd.DataFrame(rows), "decode")
    assert texts(axes) == ["97", "41", "60"], "the busy ones, then the share of the block"
    assert [text.get_fontweight() for text in axes.texts] == ["bold", "normal", "normal"]


# ------------------------------------------------------------------ searches


def results() -> pd.DataFrame:
    """Two cases; nothing fits the second."""
    known = {
        "case": "a", "throughput_tok_per_s": 12.5, "gpu_batch_size": 8, "num_gpu_batches": 3,
        "compress_weights": True, "compress_cache": False,
        "weights_gpu_percent": 20.0, "weights_cpu_percent": 70.0, "weights_disk_percent": 10.0,
    }  # fmt: skip
    return pd.DataFrame([known, {"case": "b"}])


def test_placement_bars_are_the_percentages(axes: Axes) -> None:
    searches.draw_split(axes, results(), "weights")
    widths = [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert widths == [20, 0, 70, 0, 10, 0]
    assert texts(axes) == ["4"]


def test_speed_of_what_does_not_fit_is_said(axes: Axes) -> None:
    searches.draw_speed(axes, results())
    assert texts(axes) == ["12.5  (8 × 3)", "does not fit"]
    assert markers(axes, "o") == [[12.5, 1]]


def test_prices_of_every_case(axes: Axes) -> None:
    rows = [("m", "1 GiB more GPU memory", 0.02), ("n", "1 GiB more GPU memory", 0.01), ("m", "1 GiB more disk", 0.0)]
    table = pd.DataFrame(rows, columns=("case", "what", "gain"))
    figure = searches.prices_figure({"one": table, "two": table})
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["one", "two"]
    drawn = {round(y): x for x, y in markers(figure.axes[0], "o")}
    assert drawn == {0: 0, 1: 2}, "percent, the largest on top"


# ------------------------------------------------------------------ purchase


def test_ranking_says_what_is_not_known(axes: Axes) -> None:
    table = pd.DataFrame(
        {"machine": ["a", "b"], "paid": ["rented", "bought"], "tok_per_kwh": [1234567.0, None], "model": "m"}
    )
    purchase.draw_ranking(axes, table, "tok_per_kwh", "tokens for a kWh")
    assert texts(axes) == ["1,230,000", "–"]
    assert markers(axes, "s") == [[1234567, 1]]


@pytest.mark.parametrize(("value", "text"), [(0.1, "0.1"), (1000, "1,000"), (1e6, "10⁶"), (1e12, "10¹²")])
def test_powers_of_ten(value: float, text: str) -> None:
    assert dots.power(value) == text
