"""What fills each tier at its fullest moment: weights, KV cache, activations, and buffers for the rest."""

from dataclasses import replace
from typing import Protocol

from costmodel.estimate import Estimate, case_of
from costmodel.formulations import get
from costmodel.formulations.base import Amounts, PerTier, amounts_of
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy
from costmodel.workload import Workload

KINDS = ("weights", "cache", "activations", "buffers")


class Plan(Protocol):
    """A policy with what it costs and what that was computed for; a search result is one."""

    @property
    def policy(self) -> Policy:
        """Where everything lives."""

    @property
    def estimate(self) -> Estimate:
        """What it costs."""

    @property
    def hardware(self) -> Hardware:
        """The machine, as used."""

    @property
    def model(self) -> ModelSpec:
        """The model."""

    @property
    def workload(self) -> Workload:
        """The prompts."""

    @property
    def formulation(self) -> str:
        """The cost model's name."""

    @property
    def usable_fraction(self) -> float:
        """The share of each capacity that may be used."""


def residency(plan: Plan) -> dict[str, dict[str, float]]:
    """Bytes by tier and kind at the tier's fullest moment; the kinds of a tier sum to its peak.

    The peaks are linear in the amounts, so each kind's part is the peak of that kind alone. What no
    amount on the tier explains (staging buffers, workspaces) is ``"buffers"``.
    """
    chosen = get(plan.formulation)
    case = case_of(plan.policy, plan.hardware, plan.model, plan.workload)
    amounts = amounts_of(plan.policy)
    peaks = chosen.peaks(case, amounts)
    found = {}
    for tier in TIERS:
        fullest = max((i for i, peak in enumerate(peaks) if peak.tier == tier), key=lambda i: float(peaks[i].bytes))
        parts = {kind: float(chosen.peaks(case, _only(amounts, kind, tier))[fullest].bytes) for kind in KINDS[:-1]}
        parts["buffers"] = max(0.0, float(peaks[fullest].bytes) - sum(parts.values()))
        found[tier] = parts
    return found


def _only(amounts: Amounts[float], kind: str, tier: str) -> Amounts[float]:
    """One amount, everything else zero."""
    nothing: PerTier[float] = PerTier(0.0, 0.0, 0.0)
    alone = replace(nothing, **{tier: getattr(getattr(amounts, kind), tier)})
    weights, cache, activations = (alone if name == kind else nothing for name in KINDS[:-1])
    return Amounts(weights, cache, activations, prompts=0.0, blocks=0.0)
