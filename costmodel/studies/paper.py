"""The paper's results, beside what the cost model predicts of them and what a better policy would reach.

Published throughputs are printed with two decimals, so each stands for an interval (``HALF_DIGIT``); where it
decides what can be said, the tables carry it. All predictions of one published run count its decode steps as its
authors did (:func:`costmodel.calibrate.published.predict`), so that both sides are the same quantity.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from costmodel import words
from costmodel.calibrate.published import Run, baselines, predict, runs
from costmodel.estimate import estimate
from costmodel.formulations import get
from costmodel.hardware import Hardware
from costmodel.overrides import with_overrides
from costmodel.policy import Policy
from costmodel.search import search
from costmodel.units import GB, format_bytes

HALF_DIGIT = 0.005
"""Half a unit of the last digit printed (token/s)."""

WHOLE = "all optimizations"
"""The ablation table's name for the run that nothing was taken from."""

NO_DISK = "no disk"
"""Its name for a machine without one; where the policy used none, this is the same run again."""

PLAIN = {"compress_weights": False, "compress_cache": False}


def machine_lines(*machines: Hardware) -> list[str]:
    """What the machines hold and how fast their disks read, a line each."""
    return [
        f"{one.name}: {format_bytes(one.capacity_bytes['gpu'])} of GPU memory, "
        f"{format_bytes(one.capacity_bytes['cpu'])} of CPU memory, "
        f"disk read {one.links.disk_read.bytes_per_s.effective / GB:.2f} GB/s"
        for one in machines
    ]


# ------------------------------------------------------------------ throughput beside other systems


def systems_table(engine: Hardware, ours: Hardware) -> pd.DataFrame:
    """One row a published FlexGen run (token/s), the other systems' runs of the same model and prompt beside it.

    ``predicted``: the very policy that was run, and its ``error``. ``best_engine``: the best policy that the search
    finds for the same machine and engine; ``best_ours``: the same for ``ours``. The search may compress where the
    published run compressed anything, and nothing where it did not. ``memory_share`` is the published policy's
    fullest tier as a share of all of its memory, ``summed_tok_per_s`` its prediction with every decode step's own
    context.
    """
    rows = []
    for run in runs():
        cost = estimate(run.policy, hardware=engine, model=run.model, workload=run.workload, usable_fraction=1.0)
        row: dict[str, object] = {
            "model": run.model.name,
            "prompt_len": run.workload.prompt_len,
            "kept": kept_in(run.policy),
            "block": _shape(run.policy),
            "projected": run.projected,
            **_others(run),
            "flexgen_tok_per_s": run.throughput_tok_per_s,
            "predicted_tok_per_s": as_published(run, run.policy, engine),
            "summed_tok_per_s": cost.throughput_tok_per_s,
            "memory_share": max(cost.peak_bytes[tier] / cost.limit_bytes[tier] for tier in cost.peak_bytes),
        }
        for name, machine in (("best_engine", engine), ("best_ours", ours)):
            policy = best_policy(run, machine)
            row |= {f"{name}_tok_per_s": as_published(run, policy, machine), f"{name}_block": _shape(policy)}
        rows.append(row)
    table = pd.DataFrame(rows)
    table["error"] = table["predicted_tok_per_s"] / table["flexgen_tok_per_s"] - 1
    return table


OTHER_SYSTEMS = {"accelerate": "Accelerate", "deepspeed-zero-inference": "DeepSpeed"}
"""The systems that ran on one T4 as the data call them, and as people do. Petals used six and is left out."""


def _others(run: Run) -> dict[str, object]:
    """Throughput (token/s) of the other systems, which compress nothing; NaN where the data hold none."""
    found = {
        one.system: one.throughput_tok_per_s
        for one in baselines()
        if (one.model, one.workload) == (run.model.name, run.workload)
    }
    return {f"{label.lower()}_tok_per_s": found.get(system, math.nan) for system, label in OTHER_SYSTEMS.items()}


def kept_in(policy: Policy) -> str:
    """What is in 4 bits: ``"16-bit"`` for nothing, ``"4-bit"`` for weights and cache."""
    kept = words.compressed(policy)
    return {"–": "16-bit", "both": "4-bit"}.get(kept, f"4-bit {kept}")


def _shape(policy: Policy) -> str:
    return f"{policy.gpu_batch_size} × {policy.num_gpu_batches}"


def _compresses(policy: Policy) -> bool:
    return policy.compress_weights or policy.compress_cache


def as_published(run: Run, policy: Policy, hardware: Hardware) -> float:
    """Throughput (token/s) of a policy for the run's workload, its decode steps counted as the authors counted."""
    return predict(replace(run, policy=policy), hardware, get("roofline"))[0]


def best_policy(run: Run, hardware: Hardware, **switches: bool) -> Policy:
    """The best policy for the run's workload; it compresses only where the run does."""
    kept: Mapping[str, bool] = {} if _compresses(run.policy) else PLAIN
    return search(
        hardware=hardware,
        model=run.model,
        workload=run.workload,
        switches={**kept, **switches},
        with_prices=False,
    ).policy


def ratios_table(systems: pd.DataFrame) -> pd.DataFrame:
    """How many times the better of the other systems each column of :func:`systems_table` is.

    Only rows for which another system was run. ``low`` and ``high`` bound the ``published`` ratio, both of whose
    numbers were rounded.
    """
    names = [f"{label.lower()}_tok_per_s" for label in OTHER_SYSTEMS.values()]
    table = systems[systems[names].notna().any(axis=1)].reset_index(drop=True)
    other, flexgen = table[names].max(axis=1), table["flexgen_tok_per_s"]
    ratios = table[["model", "prompt_len", "kept"]].assign(
        other_tok_per_s=other,
        published=flexgen / other,
        low=(flexgen - HALF_DIGIT) / (other + HALF_DIGIT),
        high=(flexgen + HALF_DIGIT) / (other - HALF_DIGIT),
    )
    for name in ("predicted", "best_engine", "best_ours"):
        ratios[name] = table[f"{name}_tok_per_s"] / other
    return ratios


def slower_disk_table(systems: pd.DataFrame, engine: Hardware, ours: Hardware) -> pd.DataFrame:
    """The runs of ``systems`` for which FlexGen kept weights on disk, and ``ours`` with the disk of ``engine``.

    ``best_ours_same_disk_tok_per_s`` differs from ``best_ours_tok_per_s`` by nothing but the rate of disk reads.
    """
    same = with_overrides(ours, disk_read=engine.links.disk_read.bytes_per_s.effective)
    rates = {
        number: as_published(run, best_policy(run, same), same)
        for number, run in enumerate(runs())
        if run.policy.weights.disk > 0
    }
    columns = ["model", "prompt_len", "flexgen_tok_per_s", "best_engine_tok_per_s", "best_ours_tok_per_s"]
    return systems.loc[list(rates), columns].assign(best_ours_same_disk_tok_per_s=list(rates.values()))


def findings(systems: pd.DataFrame, ablated: pd.DataFrame) -> list[str]:
    """What the tables say, a sentence each. Ablations printed as 0.01 are too coarse to have an error."""
    sizes = systems["error"].abs()
    unfitted = ablated[~ablated["variant"].isin([WHOLE, NO_DISK]) & (ablated["published_tok_per_s"] > 2 * HALF_DIGIT)]
    missed = unfitted["error"].abs()
    worst = unfitted.to_dict("records")[int(missed.to_numpy().argmax())]
    gain = systems["best_engine_tok_per_s"] / systems["predicted_tok_per_s"]
    own = systems["best_ours_tok_per_s"] / systems["flexgen_tok_per_s"]
    projected = systems[systems["projected"]]
    flattery = projected["predicted_tok_per_s"] / projected["summed_tok_per_s"] - 1
    ratios = ratios_table(systems)
    (large,) = ratios[(ratios["model"] == "opt-175b") & (ratios["kept"] == "16-bit")].to_dict("records")
    return [
        f"FlexGen's own policies: {len(systems)} predictions are off by {sizes.mean():.1%} in the mean and "
        f"{sizes.max():.1%} at most (its machine was fitted to them).",
        f"Its ablations, never fitted: {missed.mean():.1%} in the mean, {missed.max():.1%} at most "
        f"({worst['model']}, {worst['variant']}).",
        f"On FlexGen's engine the best policy is predicted to be {gain.min():.2f} to {gain.max():.2f} times as fast as "
        "the published one.",
        f"Tierwise's engine is predicted at {own.min():.2f} to {own.max():.2f} times FlexGen's published throughput; "
        "no T4 has confirmed it.",
        f"OPT-175B in 16 bits was published at {large['published']:.0f} times the other systems; rounding allows "
        f"{large['low']:.0f} to {large['high']:.0f}.",
        f"Projecting from the first decode step flatters a run by {flattery.max():.1%} at most.",
    ]
