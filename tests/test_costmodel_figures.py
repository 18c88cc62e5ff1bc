"""What the figures show is what the estimates say; and nothing global is touched."""

import io
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from costmodel import Frontier, Hardware, ModelSpec, Policy, SearchResult, Workload, estimate, figures, frontier, search
from costmodel.commands.estimate import EstimatedPolicy
from costmodel.figures import frontier as frontier_figures
from costmodel.figures import policy as policy_figures
from costmodel.figures import style
from costmodel.formulations import FORMULATIONS
from costmodel.overrides import with_overrides
from costmodel.policy import TIERS
from costmodel.residency import KINDS, residency
from costmodel.units import GiB

T4 = with_overrides(Hardware.from_catalog("t4"), gpu_memory=2 * GiB, cpu_memory=3 * GiB, disk=4 * GiB)
MODEL = ModelSpec.from_catalog("opt-1.3b")


@pytest.fixture(scope="module")
def result() -> SearchResult:
    return search(hardware=T4, model=MODEL)


@pytest.fixture(scope="module")
def curve() -> Frontier:
    return frontier(hardware=T4, model=MODEL, points=6)


def planned(
    percent: tuple[float, ...], *, formulation: str = "roofline", gen_len: int = 32, **shape: Any
) -> EstimatedPolicy:
    """A fixed policy with its estimate."""
    given: dict[str, Any] = {"gpu_batch_size": 4, "num_gpu_batches": 3, **shape}
    policy = Policy.from_percent(percent, **given)
    workload = Workload(gen_len=gen_len)
    return EstimatedPolicy(
        policy=policy,
        estimate=estimate(policy, hardware=T4, model=MODEL, workload=workload, formulation=formulation),
        hardware=T4,
        model=MODEL,
        workload=workload,
        formulation=formulation,
        usable_fraction=FORMULATIONS[formulation].default_usable_fraction,
        notes=(),
    )


def bars(axes: Axes) -> list[Rectangle]:
    return [patch for patch in axes.patches if isinstance(patch, Rectangle)]


def texts(figure: Figure) -> str:
    """Everything written in a figure."""
    found = [text.get_text() for axes in figure.axes for text in axes.texts]
    found += [text.get_text() for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    found += [label.get_text() for axes in figure.axes if (legend := axes.get_legend()) for label in legend.get_texts()]
    return "\n".join([*found, figure.get_suptitle(), *(text.get_text() for text in figure.texts)])


# ------------------------------------------------------------------ residency


@pytest.mark.parametrize("formulation", FORMULATIONS)
@pytest.mark.parametrize(
    "percent",
    [(100, 0, 100, 0, 100, 0), (0, 100, 0, 100, 0, 100), (20, 30, 40, 50, 60, 40), (0, 0, 0, 0, 100, 0)],
    ids=str,
)
def test_kinds_sum_to_the_peak(percent: tuple[float, ...], formulation: str) -> None:
    plan = planned(percent, formulation=formulation, cpu_attention=formulation == "flexgen")
    held = residency(plan)
    for tier in TIERS:
        assert tuple(held[tier]) == KINDS
        assert sum(held[tier].values()) == pytest.approx(plan.estimate.peak_bytes[tier], rel=1e-12, abs=1e-3)
        assert min(held[tier].values()) >= 0


def test_weights_and_cache_are_their_own_bytes() -> None:
    held = residency(planned((25, 50, 0, 75, 100, 0)))
    weights = MODEL.total_params * 2
    cache = MODEL.kv_values_per_token * 2 * MODEL.num_layers * (512 + 32) * 12
    assert [held[tier]["weights"] for tier in TIERS] == pytest.approx([weights / 4, weights / 2, weights / 4])
    assert [held[tier]["cache"] for tier in TIERS] == pytest.approx([0, cache * 3 / 4, cache / 4])


def test_compression_shrinks_what_is_held() -> None:
    plain, small = (
        residency(planned((0, 100, 0, 100, 0, 100), compress_weights=on, compress_cache=on)) for on in (False, True)
    )
    # 4 bits and a 32-bit scale and minimum for 64 values: 4.5 bits of 16, for all of the cache.
    assert small["cpu"]["cache"] / plain["cpu"]["cache"] == pytest.approx(4.5 / 16)
    assert 4.5 / 16 < small["cpu"]["weights"] / plain["cpu"]["weights"] < 0.4


# ------------------------------------------------------------------ the policy's figure


def test_memory_bars_are_shares_of_the_usable_bytes(result: SearchResult) -> None:
    axes = figures.draw_memory(Figure().subplots(), result)
    rows = np.array([bar.get_width() for bar in bars(axes)]).reshape(len(TIERS), len(KINDS))
    cost = result.estimate
    assert rows.sum(axis=1) == pytest.approx([cost.peak_bytes[tier] / cost.limit_bytes[tier] for tier in TIERS])
    assert axes.get_xlim()[1] >= 1


def test_busy_bars_are_shares_of_their_phase(result: SearchResult) -> None:
    axes = figures.draw_busy(Figure().subplots(), result)
    widths = [bar.get_width() for bar in bars(axes)]
    cost = result.estimate
    assert widths == pytest.approx([*cost.busy_share("prefill").values(), *cost.busy_share("decode").values()])
    bold = [text for text in axes.texts if text.get_fontweight() == "bold"]
    assert len(bold) == len(cost.bottleneck) == 2


def test_policy_figure_names_what_it_shows(result: SearchResult) -> None:
    shown = texts(figures.policy_figure(result))
    for said in (
        "opt-1.3b on t4",
        "token/s",
        "512 + 32 tokens",
        "roofline",
        "GPU memory",
        "usable",
        "KV cache",
        "prefill",
    ):
        assert said in shown
    assert f"{result.policy.gpu_batch_size} prompts" in shown


def test_policy_that_does_not_fit_is_drawn_so() -> None:
    plan = planned((100, 0, 100, 0, 100, 0), gpu_batch_size=8)
    figure = figures.policy_figure(plan)
    cost = plan.estimate
    assert cost.violations == ("gpu",)
    assert "does not fit" in texts(figure)
    widths = [bar.get_width() for bar in bars(figure.axes[0])][: len(KINDS)]
    assert sum(widths) == pytest.approx(cost.peak_bytes["gpu"] / cost.limit_bytes["gpu"])


def test_hopeless_policy_is_cut_off_and_a_missing_tier_named() -> None:
    hardware = with_overrides(T4, cpu_memory=0.0)
    policy = Policy.from_percent((50, 50, 100, 0, 100, 0), gpu_batch_size=400, num_gpu_batches=3)
    cost = estimate(policy, hardware=hardware, model=MODEL)
    plan = EstimatedPolicy(
        policy=policy, estimate=cost, hardware=hardware, model=MODEL, workload=Workload(), formulation="roofline",
        usable_fraction=0.9, notes=(),
    )  # fmt: skip
    assert cost.peak_bytes["gpu"] / cost.limit_bytes["gpu"] > policy_figures.FULLEST_SHOWN
    figure = figures.policy_figure(plan)
    assert "needed, none there" in texts(figure)
    rows = np.array([bar.get_width() for bar in bars(figure.axes[0])]).reshape(len(TIERS), len(KINDS))
    assert rows[:2].sum(axis=1) == pytest.approx([policy_figures.FULLEST_SHOWN] * 2)


def test_one_generated_token_leaves_decode_out() -> None:
    figure = figures.policy_figure(planned((0, 100, 0, 100, 0, 100), gen_len=1))
    assert "prefill" in texts(figure)
    assert "decode" not in texts(figure)


# ------------------------------------------------------------------ the frontier


def test_frontier_points_are_where_they_belong(curve: Frontier) -> None:
    axes = figures.draw_frontier(Figure().subplots(), curve)
    markers = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    drawn = np.array([line.get_xydata()[0] for line in markers])
    points = [(point.estimate.latency_s, point.estimate.throughput_tok_per_s) for point in curve.points]
    assert drawn == pytest.approx(np.array(points))
    assert axes.get_xscale() == "log"
    assert "token/s" in axes.get_ylabel()


def test_frontier_tells_switches_apart_by_colour_and_shape(curve: Frontier) -> None:
    axes = figures.draw_frontier(Figure().subplots(), curve)
    legend = axes.get_legend()
    assert legend is not None
    ways = {
        (point.policy.compress_weights, point.policy.compress_cache, point.policy.cpu_attention)
        for point in curve.points
    }
    assert len(legend.get_texts()) == len(ways)
    styles = {(line.get_marker(), line.get_color()) for line in axes.lines[1:]}
    assert len(styles) == len({marker for marker, _ in styles}) == len(ways)


def test_frontier_of_one_point_can_be_drawn(curve: Frontier) -> None:
    alone = Frontier(
        points=curve.points[-1:],
        hardware=curve.hardware,
        model=curve.model,
        workload=curve.workload,
        formulation="roofline",
    )
    assert figures.render(figures.frontier_figure(alone), "png").startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "500 ms"), (1, "1 s"), (30, "30 s"), (60, "1 min"), (1200, "20 min"), (7200, "2 h")]
)
def test_ticks_are_round_times(seconds: float, text: str) -> None:
    assert frontier_figures._round_time(seconds) == text
    assert seconds in frontier_figures._TIMES


# ------------------------------------------------------------------ files


def test_png_has_the_size_of_the_figure_and_is_not_blank(result: SearchResult) -> None:
    figure = figures.policy_figure(result)
    image = Image.open(io.BytesIO(figures.render(figure, "png")))
    width, height = figure.get_size_inches() * style.DOTS_PER_INCH
    assert image.size == (round(width), round(height))
    pixels = np.asarray(image.convert("RGB"))
    for colour in (policy_figures.KIND_COLOURS["weights"], policy_figures.PHASE_COLOURS["prefill"]):
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=2).sum() > 500
    edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (edge == 255).all(), "something is cut off at the border"


@pytest.mark.parametrize("file_format", ["png", "pdf", "svg"])
def test_the_same_figure_gives_the_same_bytes(result: SearchResult, curve: Frontier, file_format: str) -> None:
    for make in (lambda: figures.policy_figure(result), lambda: figures.frontier_figure(curve)):
        assert figures.render(make(), file_format) == figures.render(make(), file_format)


def test_nothing_global_changes(result: SearchResult, curve: Frontier) -> None:
    before = dict(mpl.rcParams)
    figures.render(figures.policy_figure(result), "svg")
    figures.render(figures.frontier_figure(curve), "png")
    assert dict(mpl.rcParams) == before
