"""Fits recover the constants that made the samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.fit import fit_line, unhidden_share

SIZES = tuple(2**exponent for exponent in range(12, 29, 2))
latencies = st.floats(1e-6, 1e-2)
bandwidths = st.floats(1e8, 1e12)


@given(latency_s=latencies, bytes_per_s=bandwidths)
def test_exact_samples_give_back_their_constants(latency_s: float, bytes_per_s: float) -> None:
    found = fit_line(SIZES, [latency_s + size / bytes_per_s for size in SIZES])
    # Only what the samples show can be found: a latency that is a millionth of every time is not there.
    if latency_s > 0.01 * SIZES[0] / bytes_per_s:
        assert found.latency_s == pytest.approx(latency_s, rel=1e-3)
    if SIZES[-1] / bytes_per_s > 0.01 * latency_s:
        assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=1e-3)
    assert found.error < 1e-3


@given(latency_s=latencies, bytes_per_s=bandwidths, seed=st.integers(0, 2**32 - 1))
def test_noisy_samples_give_back_their_constants(latency_s: float, bytes_per_s: float, seed: int) -> None:
    noise = np.random.default_rng(seed).uniform(0.97, 1.03, len(SIZES))
    found = fit_line(SIZES, [(latency_s + size / bytes_per_s) * n for size, n in zip(SIZES, noise, strict=True)])
    if latency_s > SIZES[0] / bytes_per_s:
        assert found.latency_s == pytest.approx(latency_s, rel=0.15)
    if SIZES[-1] / bytes_per_s > latency_s:
        assert found.bytes_per_s == pytest.approx(bytes_per_s, rel=0.15)
    assert found.error < 0.15


@given(latency_s=st.floats(1e-5, 1e-3), bytes_per_s=st.floats(1e9, 1e11), spoiled=st.integers(0, len(SIZES) - 1))
def test_one_spoiled_size_is_discounted(latency_s: float, bytes_per_s: float, spoiled: int) -> None:
    times = [(latency_s + size / bytes_per_s) * (3.0 if index == spoiled else 1.0) for index, size in enumerate(SIZES)]
    found = fit_line(SIZES, times)
    expected = [latency_s + size / bytes_per_s for size in SIZES]
    told = [found.latency_s + size / found.bytes_per_s for size in SIZES]
    misses = [abs(line / time - 1) for line, time in zip(told, expected, strict=True)]
    assert sorted(misses)[len(misses) // 2] < 0.1


def test_one_size_has_no_latency() -> None:
    found = fit_line([1000, 1000], [1.0, 1.0])
    assert (found.latency_s, found.bytes_per_s) == (0.0, pytest.approx(1000.0))


def test_proportional_times_have_no_latency() -> None:
    found = fit_line([10**6, 10**7, 10**8], [1e-3, 1e-2, 1e-1])
    assert found.latency_s < 1e-6
    assert found.bytes_per_s == pytest.approx(1e9, rel=1e-3)


@pytest.mark.parametrize(("sizes", "times"), [([], []), ([1], [1, 2]), ([0], [1]), ([1], [0])])
def test_samples_are_checked(sizes: list[float], times: list[float]) -> None:
    with pytest.raises(ValueError, match=r"needed|greater than 0"):
        fit_line(sizes, times)


@given(one_s=st.floats(0.01, 100.0), other_s=st.floats(0.01, 100.0), share=st.floats(0.0, 1.0))
def test_unhidden_share_is_what_lengthens_the_longer_work(one_s: float, other_s: float, share: float) -> None:
    both_s = max(one_s, other_s) + share * min(one_s, other_s)
    assert unhidden_share(both_s, one_s, other_s) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(
    ("both", "one", "other", "share"),
    [
        (3.0, 3.0, 1.0, 0.0),
        (3.5, 3.0, 1.0, 0.5),
        (3.5, 1.0, 3.0, 0.5),
        (4.0, 3.0, 1.0, 1.0),
        (9.0, 3.0, 1.0, 1.0),
        (2.5, 3.0, 1.0, 0.0),
    ],
)
def test_unhidden_share_by_hand(both: float, one: float, other: float, share: float) -> None:
    assert unhidden_share(both, one, other) == pytest.approx(share)


@pytest.mark.parametrize("times", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, -1.0)])
def test_times_are_checked(times: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="greater than 0"):
        unhidden_share(*times)
