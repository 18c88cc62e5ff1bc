"""Drawing policies that span the space: what the search picks, its neighbours, and a stratified sample of the rest.

A policy is drawn only if it fits the budgets and is predicted to take no longer than the limit, so a plain
grid would leave most strata empty. Instead many candidates are made, and then picked one by one: always the
one whose levels (where weights, cache and activations mostly lie, batch shape, switches, predicted
bottleneck) have been picked least so far.
"""

import itertools
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from costmodel import records
from costmodel.errors import InfeasibleError, InputError
from costmodel.estimate import Estimate, estimate
from costmodel.formulations import get
from costmodel.formulations.base import SWITCHES, Switches
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.search import search
from costmodel.workload import Workload

if TYPE_CHECKING:
    from numpy.random import Generator

KINDS = ("weights", "cache", "activations")

SEARCHED, NEIGHBOUR, DRAWN = "searched", "neighbour", "drawn"

SEARCHED_SHARE, NEIGHBOUR_SHARE = 0.2, 0.2
"""Of the policies, at most; at least one is the search's choice."""

CANDIDATES, ENOUGH = 60, 15
"""Candidates made for each policy wanted, at most, and how many that fit are enough to choose from."""

LARGEST_BATCH, MOST_BATCHES = 256, 8

RARE = {("overlap", False): 3.0}
"""How much rarer a level is wanted than the others of its axis: no one runs without overlap on purpose."""

LOSSLESS = {"compress_weights": False, "compress_cache": False}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One policy to run: ``origin`` is searched, neighbour or drawn, ``about`` says which in words."""

    __pydantic_config__ = records.STRICT

    origin: str
    about: str
    policy: Policy


@dataclass(frozen=True, kw_only=True)
class Space:
    """What may be drawn: policies for this machine, model and workload, whose block takes ``max_seconds`` at most.

    ``switches`` that are given are kept; the others vary.
    """

    hardware: Hardware
    model: ModelSpec
    workload: Workload
    max_seconds: float
    usable_fraction: float
    switches: Mapping[str, bool]

    @property
    def tiers(self) -> tuple[str, ...]:
        """The tiers that hold anything."""
        return tuple(tier for tier in TIERS if self.hardware.capacity_bytes[tier] > 0)

    def allowed_switches(self) -> list[dict[str, bool]]:
        """Every combination that the request, the cost model and the machine allow."""
        values = [(self.switches[name],) if name in self.switches else (False, True) for name in SWITCHES]
        made = [dict(zip(SWITCHES, combination, strict=True)) for combination in itertools.product(*values)]
        found = [one for one in made if get("roofline").refusal(Switches(**one), self.hardware) is None]
        if not found:
            raise InputError(get("roofline").refusal(Switches(**made[0]), self.hardware) or "no switches are allowed")
        return found

    def predict(self, policy: Policy) -> Estimate | None:
        """What a policy costs; ``None`` where it does not fit or takes too long."""
        found = estimate(
            policy,
            hardware=self.hardware,
            model=self.model,
            workload=self.workload,
            usable_fraction=self.usable_fraction,
        )
        return found if found.feasible and found.latency_s <= self.max_seconds else None


def draw(space: Space, *, count: int, seed: int) -> tuple[Drawn, ...]:
    """``count`` different policies (fewer if there are no more), the search's choice first, the rest shuffled.

    The same space, count and seed give the same policies. Raises :class:`InfeasibleError` where nothing fits.
    """
    import numpy as np

    if count < 1:
        raise InputError(f"count is {count}: it must be at least 1")
    generator = np.random.default_rng(seed)
    found = _distinct(_searched(space, max(1, round(count * SEARCHED_SHARE))))
    near = _distinct(_neighbours(found[0].policy, space), besides=found)
    near = [near[i] for i in generator.permutation(len(near))]
    found += near[: round(count * NEIGHBOUR_SHARE)]
    pool = _candidates(space, generator, wanted=count - len(found))
    found += _spread(_distinct(pool, besides=found), space, count - len(found))
    found += _distinct(near, besides=found)[: count - len(found)]
    order = 1 + generator.permutation(len(found) - 1)
    return (found[0], *(found[i] for i in order))


# ------------------------------------------------------------------ the search's choice and its neighbours


def _searched(space: Space, count: int) -> list[Drawn]:
    """The best policy, the best one without loss, and the best with other switches."""
    made: list[Drawn] = []
    lossless = {**LOSSLESS, **space.switches}
    for switches, top, about in (
        (space.switches, 1, "best"),
        (lossless, 1, "best without loss"),
        (space.switches, count, ""),
    ):
        try:
            policies = _best(space, switches, top)
        except InfeasibleError:
            if not made:
                raise
            continue
        made += [
            Drawn(origin=SEARCHED, about=about or "best with other switches", policy=policy) for policy in policies
        ]
        if len(_distinct(made)) >= count:
            break
    return _distinct(made)[:count]


def _best(space: Space, switches: Mapping[str, bool], top: int) -> list[Policy]:
    found = search(
        hardware=space.hardware,
        model=space.model,
        workload=Workload(
            prompt_len=space.workload.prompt_len, gen_len=space.workload.gen_len, max_latency_s=space.max_seconds
        ),
        usable_fraction=space.usable_fraction,
        switches=switches,
        top=top,
        with_prices=False,
    )
    return [found.policy, *(policy for policy, _ in found.alternatives)]


def _neighbours(best: Policy, space: Space) -> Iterator[Drawn]:
    """Policies one decision away from the best that fit and are fast enough."""
    for about, policy in _changes(best, space):
        if space.predict(policy) is not None:
            yield Drawn(origin=NEIGHBOUR, about=about, policy=policy)


def _changes(best: Policy, space: Space) -> Iterator[tuple[str, Policy]]:
    for name, text in (("gpu_batch_size", "GPU batch"), ("num_gpu_batches", "number of GPU batches")):
        value = getattr(best, name)
        for about, changed in (("half", value // 2), ("three quarters", value * 3 // 4), ("twice", value * 2)):
            if changed >= 1 and changed != value:
                yield f"{about} the {text}", best.replace(**{name: changed})
    for kind, share in itertools.product(KINDS, (0.25, 0.5, 1.0)):
        for source, target in itertools.permutations(space.tiers, 2):
            moved = _moved(getattr(best, kind), source, target, share)
            if moved is not None:
                yield f"{share:.0%} of its {kind} on {source} moved to {target}", best.replace(**{kind: moved})
    allowed = space.allowed_switches()
    for name in SWITCHES:
        other = best.replace(**{name: not getattr(best, name)})
        if {switch: getattr(other, switch) for switch in SWITCHES} in allowed and other == _plain(other):
            yield f"{name.replace('_', ' ')} {'on' if getattr(other, name) else 'off'}", other


def _moved(split: Split, source: str, target: str, share: float) -> Split | None:
    """The split with a share of one tier's part on another; ``None`` where there is nothing to move."""
    held = {tier: getattr(split, tier) for tier in TIERS}
    part = held[source] * share
    if part < 0.01:
        return None
    held[source] -= part
    held[target] = min(1.0, held[target] + part)
    return Split(**held)


# ------------------------------------------------------------------ the rest of the space


def _candidates(space: Space, generator: "Generator", *, wanted: int) -> list[Drawn]:
    """Random policies that fit and are fast enough; batches shrink until they do."""
    switches = space.allowed_switches()
    made: list[Drawn] = []
    for _ in range(max(0, wanted) * CANDIDATES):
        choice: dict[str, Any] = {kind: _random_split(space.tiers, generator) for kind in KINDS}
        choice |= switches[generator.integers(len(switches))]
        policy = Policy(
            **choice,
            gpu_batch_size=round(2.0 ** generator.uniform(0, LARGEST_BATCH.bit_length() - 1)),
            num_gpu_batches=round(2.0 ** generator.uniform(0, MOST_BATCHES.bit_length() - 1)),
        )
        fitting = _fitting(_plain(policy), space)
        if fitting is not None:
            made.append(Drawn(origin=DRAWN, about="", policy=fitting))
        if len(made) >= wanted * ENOUGH:
            break
    return made


def _random_split(tiers: Sequence[str], generator: "Generator") -> Split:
    """Whole percents on one, two or all of the tiers, equally often."""
    some = generator.permutation(len(tiers))[: generator.integers(1, len(tiers) + 1)]
    cuts = [0, *sorted(int(cut) for cut in generator.integers(0, 101, len(some) - 1)), 100]
    held = dict.fromkeys(TIERS, 0.0)
    for place, (first, last) in zip(some, itertools.pairwise(cuts), strict=True):
        held[tiers[place]] = (last - first) / 100
    return Split(**held)


def _fitting(policy: Policy, space: Space) -> Policy | None:
    """The policy with its batch shape halved until it fits the memory and the time, if any does."""
    if space.predict(policy.replace(gpu_batch_size=1, num_gpu_batches=1)) is None:
        return None
    while space.predict(policy) is None:
        if policy.num_gpu_batches > policy.gpu_batch_size or policy.gpu_batch_size == 1:
            policy = policy.replace(num_gpu_batches=policy.num_gpu_batches // 2)
        else:
            policy = policy.replace(gpu_batch_size=policy.gpu_batch_size // 2)
    return policy


def _plain(policy: Policy) -> Policy:
    """Attention on the CPU means nothing for a cache that is all on the first tier: say off."""
    return policy.replace(cpu_attention=False) if policy.cache.gpu == 1.0 else policy


def _spread(pool: Sequence[Drawn], space: Space, count: int) -> list[Drawn]:
    """Pick policies one by one, always the one whose levels have been picked least so far."""
    levels = [_levels(one.policy, space) for one in pool]
    seen: Counter[Hashable] = Counter()
    left, picked = list(range(len(pool))), list[Drawn]()
    while left and len(picked) < count:
        best = min(left, key=lambda i: sum((seen[level] + 1) * RARE.get(level, 1.0) for level in levels[i]))
        left.remove(best)
        seen.update(levels[best])
        picked.append(pool[best])
    return picked


def _levels(policy: Policy, space: Space) -> list[Any]:
    """The strata that a policy lies in, one for each axis."""
    cost = space.predict(policy)
    assert cost is not None
    found: list[Any] = []
    for kind in KINDS:
        held = records.to_dict(getattr(policy, kind))
        found.append((kind, max(TIERS, key=lambda tier: float(held[tier]))))
        found.append((f"{kind} spread", sum(share > 0 for share in held.values())))
    found.append(("gpu_batch_size", policy.gpu_batch_size.bit_length() // 2))
    found.append(("num_gpu_batches", policy.num_gpu_batches.bit_length()))
    found += [(name, getattr(policy, name)) for name in SWITCHES]
    longest = "prefill" if cost.prefill_s > cost.decode_s else "decode"
    found.append(("bottleneck", longest, cost.bottleneck[longest]))
    return found


def _distinct(drawn: Iterable[Drawn], besides: Sequence[Drawn] = ()) -> list[Drawn]:
    """The first of every policy that comes several times, or of several that do the same."""
    kept: list[Drawn] = []
    for one in drawn:
        if all(_plain(one.policy) != _plain(other.policy) for other in (*besides, *kept)):
            kept.append(one)
    return kept
