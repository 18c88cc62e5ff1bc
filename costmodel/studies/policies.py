"""The best policy over models, prompt lengths and memory sizes, with what it rests on."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from costmodel.errors import InfeasibleError
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from costmodel.search import SearchResult, search
from costmodel.tables import policy_row
from costmodel.units import GiB
from costmodel.workload import Workload

FAMILIES = {
    "OPT": "opt-30b",
    "BLOOM": "bloom-7b1",
    "CodeGen": "codegen-16b",
    "GLM": "glm-4-9b",
    "GLM-4": "glm-4-32b-0414",
    "Llama 2": "llama-2-70b",
    "Llama 3.1": "llama-3.1-70b",
    "Mistral": "mistral-7b-v0.3",
    "Qwen2.5": "qwen2.5-32b",
}
"""A model of the catalogue for each family, of at least 7 billion parameters: 14 GB of weights in 16 bits."""


def result_table(found: Iterable[tuple[str, SearchResult | None]]) -> pd.DataFrame:
    """One row a case: what was asked, the best policy with its estimate, and its certificate.

    ``None`` is a case that nothing fits: its numbers are missing.
    """
    return pd.DataFrame([{"case": case, **({} if result is None else _row(result))} for case, result in found])


def _row(result: SearchResult) -> dict[str, object]:
    return {
        "model": result.model.name,
        "machine": result.hardware.name,
        "prompt_len": result.workload.prompt_len,
        "bound_tok_per_s": result.bound_tok_per_s,
        "gap": result.gap,
        "linear_programs": result.linear_programs,
        "search_s": result.seconds,
        "block_prompts": result.policy.block_size,
        **policy_row(result.policy, result.estimate),
    }


def best(
    hardware: Hardware, model: ModelSpec, workload: Workload, *, switches: Mapping[str, bool] | None = None
) -> SearchResult | None:
    """The best policy, or ``None`` where nothing fits; without prices, which the tables have no use for."""
    try:
        return search(hardware=hardware, model=model, workload=workload, switches=switches, with_prices=False)
    except InfeasibleError:
        return None


def over_prompts(hardware: Hardware, models: Sequence[str], lengths: Sequence[int], workload: Workload) -> pd.DataFrame:
    """Every model at every prompt length."""
    cases = [(ModelSpec.from_catalog(name), length) for name in models for length in lengths]
    return result_table(
        (model.name, best(hardware, model, replace(workload, prompt_len=length))) for model, length in cases
    )


IN_16_BITS = {"compress_weights": False, "compress_cache": False}
"""Switches of a search that may not use lossy compression."""


def over_memory(
    hardware: Hardware,
    model: str,
    workload: Workload,
    *,
    gpu_gib: Sequence[float],
    cpu_gib: Sequence[float],
    switches: Mapping[str, bool] | None = None,
) -> pd.DataFrame:
    """Every size of GPU memory with every size of CPU memory; ``gpu_gib`` and ``cpu_gib`` are columns."""
    sizes = [(gpu, cpu) for cpu in cpu_gib for gpu in gpu_gib]
    spec = ModelSpec.from_catalog(model)
    machines = [with_overrides(hardware, gpu_memory=gpu * GiB, cpu_memory=cpu * GiB) for gpu, cpu in sizes]
    found = [best(machine, spec, workload, switches=switches) for machine in machines]
    table = result_table((f"{gpu:g} + {cpu:g} GiB", result) for (gpu, cpu), result in zip(sizes, found, strict=True))
    return table.assign(gpu_gib=[gpu for gpu, _ in sizes], cpu_gib=[cpu for _, cpu in sizes])


def over_families(cards: Sequence[Hardware], workload: Workload) -> pd.DataFrame:
    """The best policy for one model of each family on every card; ``family`` is a column."""
    cases = [(family, name, card) for card in cards for family, name in FAMILIES.items()]
    table = result_table(
        (f"{name} on {card.name}", best(card, ModelSpec.from_catalog(name), workload)) for _, name, card in cases
    )
    return table.assign(family=[family for family, _, _ in cases], card=[card.name for _, _, card in cases])


def price_table(found: Iterable[tuple[str, SearchResult]]) -> pd.DataFrame:
    """What more would bring: one row a case and price, ``gain`` relative."""
    return pd.DataFrame(
        [
            {"case": case, "what": f"{price.amount} more {price.what}", "gain": price.gain, "method": price.method}
            for case, result in found
            for price in result.prices
        ]
    )
