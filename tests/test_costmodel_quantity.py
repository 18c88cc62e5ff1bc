"""One number of a hardware file: what of its value is planned with, and its rate between the knots of a curve."""

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel.quantity import Quantity, Rate
from tests.instances import quantity, rate


def test_the_effective_value_is_value_times_efficiency() -> None:
    assert Quantity(value=320e9, source="x", efficiency=0.8, efficiency_source="y").effective == pytest.approx(256e9)
    assert quantity(7).effective == 7


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (1, 2.0),  # the knots
        (16, 10.0),
        (64, 6.0),
        (0.1, 2.0),  # outside them: the nearest
        (1e9, 6.0),
        (4, 6.0),  # halfway in log(rows) from 1 to 16
        (2, 4.0),  # a quarter
        (32, 8.0),  # halfway down again from 16 to 64
    ],
)
def test_a_curve_is_linear_in_log_rows(rows: float, expected: float) -> None:
    measured = rate(100, (1, 2.0), (16, 10.0), (64, 6.0))
    assert measured.at(rows) == pytest.approx(expected)
    assert dataclasses.replace(measured, efficiency=0.5, efficiency_source="test").at(rows) == pytest.approx(
        expected / 2
    )


def test_without_a_curve_the_rate_is_constant() -> None:
    assert {rate(7.0).at(rows) for rows in (1, 10, 1e6)} == {7.0}
    assert rate(7.0).best_between(1, 9) == 7.0


CURVES = st.lists(
    st.tuples(st.integers(1, 10_000), st.floats(1e-3, 1e3)), min_size=1, max_size=6, unique_by=lambda knot: knot[0]
).map(lambda knots: rate(1.0, *((float(row), value) for row, value in sorted(knots))))


@given(curve=CURVES, low=st.floats(0.5, 20_000), ratio=st.floats(1, 100), share=st.floats(0, 1))
def test_the_best_rate_of_a_range_bounds_all_of_it(curve: Rate, low: float, ratio: float, share: float) -> None:
    high = low * ratio
    best = curve.best_between(low, high)
    assert curve.at(min(high, low * ratio**share)) <= best * (1 + 1e-12)
    # It is reached: at an end or at a knot in between.
    knots = [row for row, _ in curve.curve or () if low <= row <= high]
    assert best == pytest.approx(max(curve.at(rows) for rows in (low, high, *knots)))


@given(curve=CURVES, rows=st.floats(0.5, 20_000))
def test_a_curve_stays_between_its_knots(curve: Rate, rows: float) -> None:
    rates = [value for _, value in curve.curve or ()]
    assert min(rates) * (1 - 1e-12) <= curve.at(rows) <= max(rates) * (1 + 1e-12)
    assert math.isfinite(curve.at(rows))
