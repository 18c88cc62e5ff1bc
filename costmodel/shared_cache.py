"""Whether a machine's cores shared a cache while something ran: how fast one overwrites what another has just read.

The host of a virtual machine moves its processors over cores of its own. Two of them that come to lie under different
last-level caches pass data to each other through memory: for seconds or minutes everything that threads share is
slower, and nothing inside the machine shows why. On an AMD EPYC such a write falls from 10 to 80 GB/s to 2 or 3, copies
between two tiers of host memory from 25 to 5, and a layer of prefill over 128 rows of 4-bit weights takes 92 ms in
place of 54. A machine that is always in one of the two states shows no difference, and nothing here judges it.
"""

from collections.abc import Sequence

ORIGIN_KEY = "shared_write_bytes_per_s"
"""Under which a measurement's origin holds the rates that were seen beside the run."""

APART_FACTOR = 5.0
"""A rate so many times below the machine's best was taken while the cores were apart. Cores that share a cache come to
half to a fifth of it beside a run that keeps all of them busy, others to a tenth."""

MOST_APART, LEAST_LOOKS = 0.2, 2
"""A run during more of which the cores were apart is no measurement of the machine that was profiled; a single look
says nothing."""


def best_rate(rates: Sequence[float]) -> float:
    """The rate of cores that share a cache, as far as these rates show it: the 90th percentile of at least one."""
    import numpy as np

    return float(np.quantile(rates, 0.9))


def is_apart(rate: float, best: float) -> bool:
    """Whether the cores shared no cache when this rate was taken; ``best`` is of :func:`best_rate`."""
    return rate < best / APART_FACTOR


def ran_apart(rates: Sequence[float], best: float) -> bool:
    """Whether the cores were apart for too much of a run beside which these rates were taken."""
    looks = sum(is_apart(rate, best) for rate in rates)
    return looks >= LEAST_LOOKS and looks > MOST_APART * len(rates)
