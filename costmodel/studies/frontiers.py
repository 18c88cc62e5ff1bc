"""Frontiers of the paper's machine under two engines, and the published runs as points among them."""

from collections.abc import Mapping

import pandas as pd

from costmodel.calibrate.published import baselines, runs
from costmodel.frontier import frontier
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.studies.paper import HALF_DIGIT, OTHER_SYSTEMS, PLAIN, kept_in
from costmodel.workload import Workload

IN_16_BITS, FREE = "16-bit", "free to compress"


def frontiers(model: str, machines: Mapping[str, Hardware], *, points: int = 9) -> pd.DataFrame:
    """Frontiers :data:`IN_16_BITS` and :data:`FREE` of each machine, for the paper's prompts of 512 and 32 new tokens.

    ``curve`` names machine and compression; the other columns are those of :meth:`Frontier.to_frame`. Whoever is free
    to compress may also leave it, so that a free curve takes up what the 16-bit one found at its own latencies.
    """
    workload = Workload(prompt_len=512, gen_len=32)
    tables = []
    for name, machine in machines.items():
        plain, free = (
            frontier(
                hardware=machine,
                model=ModelSpec.from_catalog(model),
                workload=workload,
                points=points,
                switches=switches,
            ).to_frame()
            for switches in (PLAIN, {})
        )
        free = pd.concat([plain, free]).sort_values(["latency_s", "throughput_tok_per_s"], ascending=[True, False])
        best_before = free["throughput_tok_per_s"].cummax().shift(fill_value=0.0)
        free = free[free["throughput_tok_per_s"] > best_before]
        tables += [plain.assign(curve=f"{name}, {IN_16_BITS}"), free.assign(curve=f"{name}, {FREE}")]
    return pd.concat(tables, ignore_index=True)


def published_points(model: str, *, prompt_len: int = 512) -> pd.DataFrame:
    """Every published run of a model and prompt length: ``system``, ``kept``, ``prompts`` of a block, and two figures.

    Latency (``latency_s``) is not printed: it is the tokens of a block over its throughput. ``low`` and ``high``
    bound the throughput before it was rounded.
    """
    rows: list[tuple[str, str, int, int, float]] = [
        ("FlexGen", kept_in(run.policy), run.policy.block_size, run.workload.gen_len, run.throughput_tok_per_s)
        for run in runs()
        if (run.model.name, run.workload.prompt_len) == (model, prompt_len)
    ]
    rows += [
        (OTHER_SYSTEMS[run.system], "16-bit", run.prompts, run.workload.gen_len, run.throughput_tok_per_s)
        for run in baselines()
        if (run.model, run.workload.prompt_len) == (model, prompt_len) and run.system in OTHER_SYSTEMS
    ]
    table = pd.DataFrame(rows, columns=["system", "kept", "prompts", "gen_len", "throughput_tok_per_s"])
    rate = table["throughput_tok_per_s"]
    return table.assign(
        latency_s=table["prompts"] * table["gen_len"] / rate, low=rate - HALF_DIGIT, high=rate + HALF_DIGIT
    )


def above_table(curves: Mapping[str, pd.DataFrame], points: Mapping[str, pd.DataFrame], machine: str) -> pd.DataFrame:
    """FlexGen's published runs beside the frontier of ``machine``: what was predicted to be possible in their time.

    ``predicted_tok_per_s`` is the best policy on the curve that takes no longer than the run; a run that kept
    anything in 4 bits is compared with the curve that is free to. NaN where no point of the curve is as fast.
    """
    tables = []
    for model, published in points.items():
        flexgen = published[published["system"] == "FlexGen"]
        best = []
        for kept, latency_s in zip(flexgen["kept"], flexgen["latency_s"], strict=True):
            curve = curves[model]
            named = curve["curve"] == f"{machine}, {IN_16_BITS if kept == IN_16_BITS else FREE}"
            best.append(curve.loc[named & (curve["latency_s"] <= latency_s), "throughput_tok_per_s"].max())
        columns = ["kept", "prompts", "latency_s", "throughput_tok_per_s"]
        tables.append(flexgen[columns].assign(predicted_tok_per_s=best, model=model))
    return pd.concat(tables, ignore_index=True)
