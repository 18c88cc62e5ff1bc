"""Results as pandas DataFrames, units in the column names."""

from collections.abc import Sequence

import pandas as pd

from costmodel.estimate import Estimate
from costmodel.formulations.base import SWITCHES
from costmodel.policy import TIERS, Policy
from costmodel.units import GiB


def policy_frame(costed: Sequence[tuple[Policy, Estimate]]) -> pd.DataFrame:
    """One row for each policy with its estimate."""
    return pd.DataFrame([policy_row(policy, cost) for policy, cost in costed])


def policy_row(policy: Policy, cost: Estimate) -> dict[str, object]:
    """The columns of one policy: speed, batch shape, splits in percent, switches, peaks, bottlenecks."""
    row: dict[str, object] = {
        "throughput_tok_per_s": cost.throughput_tok_per_s,
        "latency_s": cost.latency_s,
        "prefill_s": cost.prefill_s,
        "decode_s": cost.decode_s,
        "gpu_batch_size": policy.gpu_batch_size,
        "num_gpu_batches": policy.num_gpu_batches,
    }
    for kind in ("weights", "cache", "activations"):
        for tier in TIERS:
            row[f"{kind}_{tier}_percent"] = getattr(getattr(policy, kind), tier) * 100
    row |= {name: getattr(policy, name) for name in SWITCHES}
    row |= {f"peak_{tier}_GiB": cost.peak_bytes[tier] / GiB for tier in TIERS}
    row |= {f"bottleneck_{phase}": resource for phase, resource in cost.bottleneck.items()}
    row["feasible"] = cost.feasible
    return row
