"""What a command says of a run: the policy and its predicted pace before, predicted against measured after."""

import unicodedata
from typing import TYPE_CHECKING

from costmodel import units, words
from costmodel.policy import TIERS, Policy, Split

if TYPE_CHECKING:
    from costmodel.measurement import Measurement
    from runtime.plan import Plan


def policy_lines(policy: Policy) -> list[str]:
    """The shape, the switches and where everything lives."""
    kinds = ("weights", "cache", "activations")
    placed = ", ".join(f"{words.KINDS[kind]} {_shares(getattr(policy, kind))}" for kind in kinds)
    return [f"policy: {words.batches(policy)}", f"  {', '.join(words.switches(policy))}", f"  {placed}"]


def plan_lines(plan: "Plan") -> list[str]:
    """The policy, and what the cost model expects of it."""
    cost = plan.predicted
    block = f"{units.format_seconds(cost.latency_s)} a block"
    return [*policy_lines(plan.policy), f"predicted: {rate(cost.throughput_tok_per_s)}, {block}"]


def pace_line(new_tokens: int, seconds: float, run: "Measurement | None") -> str:
    """New tokens per second: measured, and as predicted where the engine says so.

    Both are the new tokens of all prompts over the seconds of their blocks, prefill and decode; an engine
    that measures nothing is taken at the ``seconds`` of the whole call.
    """
    made = words.counted(new_tokens, "new token")
    if run is None:
        return f"{made} in {units.format_seconds(seconds)}: {rate(new_tokens / max(seconds, 1e-9))}"
    measured, predicted = run.measured, run.predicted.throughput_tok_per_s
    told = f"{made} in {units.format_seconds(measured.job_s or measured.latency_s)}"
    error = words.signed_percent(run.throughput_error, 0)
    return f"{told}: {rate(measured.throughput_tok_per_s)}; predicted: {rate(predicted)} ({error})"


def rate(tokens_per_s: float) -> str:
    """``"12.3 token/s"``."""
    return f"{words.number(float(f'{tokens_per_s:.3g}'))} token/s"


def printable(text: str) -> str:
    """A model's text without the control characters that a terminal would obey."""
    return "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc")


def _shares(split: Split) -> str:
    """``"20 % GPU, 80 % CPU"``."""
    held = [(tier, getattr(split, tier)) for tier in TIERS]
    return " + ".join(f"{words.percent(share)} {words.tier_name(tier)}" for tier, share in held if share > 0)
