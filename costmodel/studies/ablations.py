"""The paper's ablations: one thing taken from a policy, published, predicted, and with the rest searched again."""

import math
from collections.abc import Mapping

import pandas as pd

from costmodel.calibrate.published import Run, ablated_runs, ablations, published_ablation
from costmodel.errors import InfeasibleError
from costmodel.estimate import estimate
from costmodel.hardware import Hardware
from costmodel.overrides import with_overrides
from costmodel.studies.paper import NO_DISK, WHOLE, as_published, best_policy


def ablations_table(engine: Hardware, ours: Hardware) -> pd.DataFrame:
    """One row a variant and model of the paper's ablation table (token/s); NaN where memory does not suffice.

    ``predicted``: the published policy with the one thing changed. ``ours``: the best policy of ``ours`` under
    the same restriction, all else searched anew; "DeepSpeed policy" leaves nothing to search.
    """
    varied: dict[tuple[str, str], Run] = {}
    for model, run in ablated_runs().items():
        varied |= {(WHOLE, model): run, (NO_DISK, model): run}
    varied |= {(one.variant, one.run.model.name): one.run for one in ablations()}
    rows = []
    for variant in VARIANTS:
        for model in ablated_runs():
            run, published = varied[variant, model], published_ablation(variant, model)
            machine = with_overrides(engine, disk=0.0) if variant == NO_DISK else engine
            predicted = _where_it_fits(run, machine)
            rows.append(
                {
                    "variant": variant,
                    "model": model,
                    "published_tok_per_s": math.nan if published is None else published,
                    "predicted_tok_per_s": predicted,
                    "error": math.nan if published is None else predicted / published - 1,
                    "ours_tok_per_s": _restricted(variant, run, ours),
                }
            )
    return pd.DataFrame(rows)


VARIANTS = (WHOLE, "no overlapping", "no CPU compute", NO_DISK, "DeepSpeed policy")
"""The rows of the ablation table, as the paper calls them."""

_RESTRICTIONS: Mapping[str, Mapping[str, bool]] = {
    "no overlapping": {"overlap": False},
    "no CPU compute": {"cpu_attention": False},
}


def _where_it_fits(run: Run, hardware: Hardware) -> float:
    """As published (token/s); NaN where the machine's whole memory does not hold it."""
    cost = estimate(run.policy, hardware=hardware, model=run.model, workload=run.workload, usable_fraction=1.0)
    return as_published(run, run.policy, hardware) if cost.feasible else math.nan


def _restricted(variant: str, run: Run, hardware: Hardware) -> float:
    """The best throughput (token/s) of 16-bit policies under a variant's restriction."""
    if variant == "DeepSpeed policy":
        return _where_it_fits(run, hardware)
    machine = with_overrides(hardware, disk=0.0) if variant == NO_DISK else hardware
    try:
        return as_published(run, best_policy(run, machine, **_RESTRICTIONS.get(variant, {})), machine)
    except InfeasibleError:
        return math.nan
