"""The certified search: the best policy for a machine, a model and a workload, with its proof."""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from costmodel import records
from costmodel.errors import InfeasibleError, InputError
from costmodel.estimate import Estimate, check_workload, estimate, limits_of
from costmodel.formulations import get
from costmodel.formulations.base import PARTS, SWITCHES, Switches, parts_of
from costmodel.hardware import Hardware
from costmodel.linear_program import solve_lexicographic
from costmodel.model import ModelSpec
from costmodel.policy import Policy, Split
from costmodel.search.branch_and_bound import Candidate, Certificate, certify
from costmodel.search.infeasible import explain
from costmodel.search.prices import Price, shadow_prices
from costmodel.search.problem import Decided, Problem
from costmodel.workload import Workload

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "tierwise.search/1"

DEFAULT_GAP = 1e-3
"""The search stops when no policy can be better than the best found by more than this."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best policy, what it costs, and the proof.

    No policy that respects the limits generates more than ``bound_tok_per_s``; ``gap`` is how far the
    policy may be from it. ``alternatives`` are the best policies with other switches, best first.
    """

    policy: Policy
    estimate: Estimate
    bound_tok_per_s: float
    gap: float
    linear_programs: int
    seconds: float
    prices: tuple[Price, ...]
    alternatives: tuple[tuple[Policy, Estimate], ...]
    hardware: Hardware
    model: ModelSpec
    workload: Workload
    formulation: str
    usable_fraction: float
    notes: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "policy": self.policy.to_dict(),
            "estimate": self.estimate.to_dict(),
            "search": {
                "bound_tok_per_s": self.bound_tok_per_s,
                "gap": self.gap,
                "linear_programs": self.linear_programs,
                "seconds": self.seconds,
            },
            "shadow_prices": [price.to_dict() for price in self.prices],
            "alternatives": [
                {"policy": policy.to_dict(), "estimate": cost.to_dict()} for policy, cost in self.alternatives
            ],
            "notes": list(self.notes),
            "formulation": self.formulation,
            "usable_fraction": self.usable_fraction,
            "workload": records.to_dict(self.workload),
            "model": self.model.to_dict(),
            "hardware": self.hardware.to_dict(),
        }

    def to_frame(self) -> "pd.DataFrame":
        """The best policy and its alternatives, one row each, units in the column names."""
        from costmodel.tables import policy_frame

        return policy_frame([(self.policy, self.estimate), *self.alternatives])


def search(
    *,
    hardware: Hardware,
    model: ModelSpec,
    workload: Workload | None = None,
    formulation: str = "roofline",
    usable_fraction: float | None = None,
    gpu_batch_size: int | None = None,
    num_gpu_batches: int | None = None,
    splits: tuple[Split, Split, Split] | None = None,
    switches: Mapping[str, bool] | None = None,
    gap: float = DEFAULT_GAP,
    top: int = 1,
    with_prices: bool = True,
) -> SearchResult:
    """Find the policy with the highest throughput, and prove it within ``gap``.

    What is given (batch shape, ``splits`` of weights, cache and activations, any of the four
    ``switches``) is kept; the rest is searched. ``top`` adds the best policies with other switches.
    Raises :class:`InfeasibleError` where nothing fits, with the least memory that would mend it, and
    :class:`InputError` for requests that contradict themselves, the model or the formulation.
    """
    began = time.perf_counter()
    problem, fraction = _problem(
        hardware,
        model,
        workload or Workload(),
        formulation,
        usable_fraction,
        gpu_batch_size,
        num_gpu_batches,
        splits,
        switches,
    )
    if not 0 < gap < 1:
        raise InputError(f"gap is {gap:g}: it must lie between 0 and 1")
    if top < 1:
        raise InputError(f"top is {top}: it must be at least 1")
    certificate = _certify(problem, gap)
    if certificate.best is None:
        raise explain(problem)
    policy, cost = _finished(problem, certificate.best, fraction)
    programs = certificate.linear_programs
    others: list[tuple[Policy, Estimate]] = []
    remaining = problem
    chosen = Switches.of(policy)
    while len(others) + 1 < top:
        remaining = replace(remaining, switches=tuple(s for s in remaining.switches if s != chosen))
        found = _certify(remaining, gap) if remaining.switches else None
        if found is None or found.best is None:
            break
        programs += found.linear_programs
        others.append(_finished(remaining, found.best, fraction))
        chosen = Switches.of(others[-1][0])
    prices = shadow_prices(problem, certificate.best) if with_prices else ()
    bound = max(certificate.bound, cost.throughput_tok_per_s)
    return SearchResult(
        policy=policy,
        estimate=cost,
        bound_tok_per_s=bound,
        gap=bound / cost.throughput_tok_per_s - 1,
        linear_programs=programs,
        seconds=time.perf_counter() - began,
        prices=prices,
        alternatives=tuple(others),
        hardware=hardware,
        model=model,
        workload=problem.workload,
        formulation=formulation,
        usable_fraction=fraction,
        notes=_notes(problem, top, len(others)),
    )


def least_latency_s(problem: Problem) -> float:
    """Seconds of the fastest block any policy allows: the smallest batch shape, the latency limit aside."""
    from costmodel.search.infeasible import fastest_block_s

    found = fastest_block_s(problem)
    if found is None:
        raise explain(problem)
    return found


def make_problem(
    *,
    hardware: Hardware,
    model: ModelSpec,
    workload: Workload,
    formulation: str = "roofline",
    usable_fraction: float | None = None,
    gpu_batch_size: int | None = None,
    num_gpu_batches: int | None = None,
    splits: tuple[Split, Split, Split] | None = None,
    switches: Mapping[str, bool] | None = None,
) -> Problem:
    """Check a request and turn it into the problem that the search solves."""
    return _problem(
        hardware, model, workload, formulation, usable_fraction, gpu_batch_size, num_gpu_batches, splits, switches
    )[0]


def _problem(
    hardware: Hardware,
    model: ModelSpec,
    workload: Workload,
    formulation: str,
    usable_fraction: float | None,
    gpu_batch_size: int | None,
    num_gpu_batches: int | None,
    splits: tuple[Split, Split, Split] | None,
    switches: Mapping[str, bool] | None,
) -> tuple[Problem, float]:
    chosen = get(formulation)
    check_workload(chosen, hardware, model, workload)
    for name, value in (("gpu_batch_size", gpu_batch_size), ("num_gpu_batches", num_gpu_batches)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}: it must be at least 1")
    if splits is not None and not chosen.activations_on_disk and splits[2].disk > 0:
        raise InputError(
            f"activations on disk are {splits[2].disk:.1%}: the {chosen.name} formulation keeps none there"
        )
    fraction = chosen.default_usable_fraction if usable_fraction is None else usable_fraction
    problem = Problem(
        formulation=chosen,
        hardware=hardware,
        model=model,
        workload=workload,
        limits=limits_of(hardware, chosen, fraction),
        switches=_allowed_switches(chosen, hardware, switches or {}),
        gpu_batch_size=gpu_batch_size,
        num_gpu_batches=num_gpu_batches,
        splits=splits,
    )
    return problem, fraction


def _allowed_switches(formulation: Any, hardware: Hardware, given: Mapping[str, bool]) -> tuple[Switches, ...]:
    """Every combination that the request, the formulation and the machine allow.

    Overlap is never slower and needs no more memory, so it is only off where that is asked for.
    """
    unknown = set(given) - set(SWITCHES)
    if unknown:
        raise records.nearest(sorted(unknown)[0], SWITCHES, what="switch")
    values = [(given[name],) if name in given else (True,) if name == "overlap" else (False, True) for name in SWITCHES]
    asked = [Switches(**dict(zip(SWITCHES, combination, strict=True))) for combination in itertools.product(*values)]
    refusals = {switches: formulation.refusal(switches, hardware) for switches in asked}
    allowed = tuple(switches for switches, refusal in refusals.items() if refusal is None)
    if not allowed:
        raise InputError(next(reason for reason in refusals.values() if reason is not None))
    return allowed


SEGMENTS = (1, 2, 4, 8, 16, 64)
"""Decode contexts that the bounds distinguish, refined until the gap is closed."""


def _certify(problem: Problem, gap: float) -> Certificate:
    """Search with ever finer decode segments; the bound is valid at every fineness."""
    certificate = certify(problem, gap=gap * 0.9, segments=SEGMENTS[0])
    for segments in SEGMENTS[1:]:
        if certificate.gap <= gap:
            break
        finer = certify(problem, gap=gap * 0.9, segments=segments, start=certificate.best)
        certificate = Certificate(
            best=finer.best,
            bound=min(certificate.bound, finer.bound),
            linear_programs=certificate.linear_programs + finer.linear_programs,
        )
    return certificate


def _finished(problem: Problem, candidate: Candidate, fraction: float) -> tuple[Policy, Estimate]:
    """The candidate with its splits chosen among equals, and its full estimate."""

    def costed(splits: tuple[Split, Split, Split]) -> tuple[Policy, Estimate]:
        policy = _with_idle_attention_off(problem, problem.policy(candidate.switches, candidate.shape, splits))
        return policy, estimate(
            policy,
            hardware=problem.hardware,
            model=problem.model,
            workload=problem.workload,
            formulation=problem.formulation.name,
            usable_fraction=fraction,
        )

    best = costed(candidate.splits)
    if problem.splits is not None:
        return best
    used = parts_of(candidate.splits)
    # Among the tiers in use first; then with others open, whose calls the program counts by their share.
    for decided in (Decided(used=used, unused=frozenset(PARTS) - used), Decided(used=used)):
        question = problem.question(candidate.switches, candidate.shape, SEGMENTS[-1], decided)
        tidy = solve_lexicographic(question)
        if tidy is None:
            continue
        for splits, slack in ((tidy.splits(), 1e-6), (_without_crumbs(tidy.splits()), 9e-7)):
            tidied = costed(splits)
            fast_enough = tidied[1].throughput_tok_per_s >= best[1].throughput_tok_per_s * (1 - slack)
            if fast_enough and tidied[1].feasible and problem.in_time(tidied[1].latency_s):
                best = tidied
    return best


CRUMB = 5e-4
"""Fractions below this are moved to the slowest tier that is used, where memory allows."""


def _with_idle_attention_off(problem: Problem, policy: Policy) -> Policy:
    """Attention on the CPU means nothing for a cache that is all on the GPU: say off, unless on was asked for."""
    off = dataclasses.replace(Switches.of(policy), cpu_attention=False)
    idle = policy.cpu_attention and policy.cache.gpu == 1.0
    return policy.replace(cpu_attention=False) if idle and off in problem.switches else policy


def _without_crumbs(splits: tuple[Split, Split, Split]) -> tuple[Split, Split, Split]:
    """The splits without slivers that no one would place by hand."""

    def swept(split: Split) -> Split:
        kept = {tier: value if value >= CRUMB else 0.0 for tier, value in records.to_dict(split).items()}
        slowest = [tier for tier, value in kept.items() if value][-1]
        kept[slowest] += 1.0 - sum(kept.values())
        return Split(**{tier: min(1.0, value) for tier, value in kept.items()})

    weights, cache, activations = (swept(split) for split in splits)
    return weights, cache, activations


def _notes(problem: Problem, top: int, others: int) -> tuple[str, ...]:
    notes = list(problem.formulation.notes(problem.hardware))
    if others + 1 < top:
        notes.append(f"only {others + 1} combinations of switches fit this request, so --top {top} shows {others + 1}")
    return tuple(notes)


__all__ = ["InfeasibleError", "Price", "SearchResult", "least_latency_s", "make_problem", "search"]
