"""The published runs under both cost models: errors, and where each second goes."""

from collections.abc import Sequence

import pandas as pd

from costmodel.calibrate.published import Run, predict
from costmodel.estimate import estimate
from costmodel.formulations import FORMULATIONS, get
from costmodel.formulations.base import RESOURCES
from costmodel.hardware import Hardware


def error_table(runs: Sequence[Run], hardware: Hardware) -> pd.DataFrame:
    """One row a run: published throughput, and for each cost model its prediction and relative error."""
    rows = []
    for run in runs:
        predictions = {name: predict(run, hardware, get(name))[0] for name in FORMULATIONS}
        rows.append(
            {
                "run": run.name,
                "model": run.model.name,
                "prompt_len": run.workload.prompt_len,
                "published_tok_per_s": run.throughput_tok_per_s,
                **{f"{name}_tok_per_s": predicted for name, predicted in predictions.items()},
                **{
                    f"{name}_error": predicted / run.throughput_tok_per_s - 1 for name, predicted in predictions.items()
                },
            }
        )
    return pd.DataFrame(rows)


def seconds_table(runs: Sequence[Run], hardware: Hardware) -> pd.DataFrame:
    """Where each second goes: one row for each run, phase and resource.

    ``busy_s`` are the seconds of a block for which the resource works, ``phase_s`` the seconds of the phase,
    ``busy_share`` their ratio; shares do not sum to 1, because resources work side by side.
    """
    rows = []
    for run in runs:
        cost = estimate(run.policy, hardware=hardware, model=run.model, workload=run.workload)
        for phase, seconds in (("prefill", cost.prefill_s), ("decode", cost.decode_s)):
            shares = cost.busy_share(phase)
            rows += [
                {
                    "run": run.name,
                    "phase": phase,
                    "resource": resource,
                    "busy_s": cost.busy_s[phase][resource],
                    "busy_share": shares[resource],
                    "phase_s": seconds,
                    "phase_share": seconds / cost.latency_s,
                    "bottleneck": resource == cost.bottleneck.get(phase),
                }
                for resource in RESOURCES
            ]
    return pd.DataFrame(rows)
