"""What every cost model is made of: amounts in, seconds by resource and bytes by tier out.

A formulation's formulas are *linear* in :class:`Amounts`. They only add amounts and multiply them by
numbers, so the same function evaluates a policy (amounts are floats), writes a PuLP model (amounts are
variables) or yields a coefficient vector (amounts are unit vectors). Nothing is written twice.

To be linear in the batch shape as well, amounts count *per block or per prompt*: weights as fraction ×
blocks, cache and activations as fraction × prompts. Dividing every amount by the number of prompts
turns "seconds per block" into "seconds per prompt" without touching a formula.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.workload import Workload

Tier = Literal["gpu", "cpu", "disk"]
Resource = Literal["gpu_compute", "cpu_compute", "cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write"]

RESOURCES: tuple[Resource, ...] = (
    "gpu_compute",
    "cpu_compute",
    "cpu_to_gpu",
    "gpu_to_cpu",
    "disk_read",
    "disk_write",
)
LINKS: tuple[Resource, ...] = RESOURCES[2:]

KINDS = ("weights", "cache", "activations")
"""What is split over the tiers, in the order of :class:`Amounts`."""

Part = tuple[str, str]
"""What one tier holds of a tensor kind, such as ``("cache", "disk")``."""

PARTS: tuple[Part, ...] = tuple((kind, tier) for kind in KINDS[1:] for tier in TIERS)
"""The parts that every batch has for itself, in the order of :class:`Amounts`."""

Linear = Any
"""A float, a numpy array or a PuLP expression: whatever supports ``+`` and ``* float``."""

L = TypeVar("L")


@dataclass(frozen=True)
class PerTier(Generic[L]):
    """One amount on each tier."""

    gpu: L
    cpu: L
    disk: L

    @property
    def off_gpu(self) -> Linear:
        """What is not on the first tier."""
        return self.cpu + self.disk  # type: ignore[operator]


@dataclass(frozen=True)
class Amounts(Generic[L]):
    """The decision, in the units in which every cost is linear.

    weights: fraction × blocks; cache and activations: fraction × prompts; ``prompts`` and ``blocks``
    carry the terms that no split changes. A plain evaluation has ``blocks == 1``.
    """

    weights: PerTier[L]
    cache: PerTier[L]
    activations: PerTier[L]
    prompts: L
    blocks: L


def amounts_of(policy: Policy) -> Amounts[float]:
    """The amounts of one block under ``policy``."""
    return amounts_at((policy.weights, policy.cache, policy.activations), float(policy.block_size))


def amounts_at(splits: tuple[Split, Split, Split], prompts: float) -> Amounts[float]:
    """The amounts of one block of these prompts whose weights, cache and activations are split like this."""

    def scaled(split: Split, factor: float) -> PerTier[float]:
        return PerTier(*(getattr(split, tier) * factor for tier in TIERS))

    weights, cache, activations = splits
    return Amounts(
        weights=scaled(weights, 1.0),
        cache=scaled(cache, prompts),
        activations=scaled(activations, prompts),
        prompts=prompts,
        blocks=1.0,
    )


def parts_of(splits: tuple[Split, Split, Split]) -> frozenset[Part]:
    """The parts of cache and activations that hold anything: batches come one by one, and call for each of them."""
    held = dict(zip(KINDS, splits, strict=True))
    return frozenset((kind, tier) for kind, tier in PARTS if getattr(held[kind], tier))


@dataclass(frozen=True, kw_only=True, order=True)
class Switches:
    """The yes/no decisions of a policy."""

    compress_weights: bool
    compress_cache: bool
    cpu_attention: bool
    overlap: bool

    @classmethod
    def of(cls, policy: Policy) -> "Switches":
        """The switches of a policy."""
        return cls(**{name: getattr(policy, name) for name in SWITCHES})


SWITCHES = ("compress_weights", "compress_cache", "cpu_attention", "overlap")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A range of batch shapes; a single shape has equal ends.

    Over a range, formulas return *lower* bounds: costs per batch are shared by the most prompts,
    working memory is that of the smallest batch, rates are the best in the range.
    """

    gpu_batch_low: int
    gpu_batch_high: int
    batches_low: int
    batches_high: int

    @classmethod
    def exactly(cls, gpu_batch_size: int, num_gpu_batches: int) -> "Shape":
        """One batch shape."""
        return cls(
            gpu_batch_low=gpu_batch_size,
            gpu_batch_high=gpu_batch_size,
            batches_low=num_gpu_batches,
            batches_high=num_gpu_batches,
        )

    @property
    def is_single(self) -> bool:
        """True for one batch shape, for which every formula is exact."""
        return self.gpu_batch_low == self.gpu_batch_high and self.batches_low == self.batches_high

    def per_batch(self, per_prompt_amount: Linear) -> Linear:
        """The part of an amount that one batch of the block holds (times blocks)."""
        return per_prompt_amount * (1.0 / self.batches_high)

    def batches(self, prompts: Linear) -> Linear:
        """How many batches these prompts make."""
        return prompts * (1.0 / self.gpu_batch_high)

    def working_prompts(self, blocks: Linear) -> Linear:
        """Prompts being computed at a time (times blocks): the memory of one batch."""
        return blocks * float(self.gpu_batch_low)


@dataclass(frozen=True)
class Track:
    """Work of a stage that its ``resources`` do one piece after another, beside the other tracks.

    ``spread`` seconds fall evenly on the block's batches; ``first_batch`` seconds come on top while the
    first batch is computed (an engine that issues all weight loads at once). ``waited`` seconds, also spread evenly,
    its resources do nothing but wait for the work of another track: they make it last, and hide nothing.
    """

    resources: tuple[Resource, ...]
    spread: Linear
    first_batch: Linear | None = None
    waited: Linear | None = None

    @property
    def lasting(self) -> Linear:
        """Seconds of the spread work and of the waiting in it."""
        return self.spread if self.waited is None else self.spread + self.waited


@dataclass(frozen=True)
class Stage:
    """One kind of stage of the schedule, summed over the layers of one pass of a block.

    ``busy`` are seconds by resource. The stage lasts as long as its longest track, plus ``serial``
    seconds before them and ``unhidden_share`` of the work that the longest track hides. Without overlap
    there is one track.
    """

    name: str
    busy: Mapping[Resource, Linear]
    tracks: tuple[Track, ...]
    shape: Shape
    serial: Linear | None = None
    unhidden_share: float = 0.0

    @property
    def has_first_batch(self) -> bool:
        """True where some work falls on the first batch alone."""
        return any(track.first_batch is not None for track in self.tracks)

    def first_batch_seconds(self) -> list[Linear]:
        """Seconds of each track while the first batch runs (a lower bound over a range of shapes)."""
        share = 1.0 / self.shape.batches_high
        return [
            track.lasting * share if track.first_batch is None else track.lasting * share + track.first_batch
            for track in self.tracks
        ]

    @property
    def later_batches_share(self) -> float:
        """The part of the spread work that runs after the first batch (a lower bound over a range)."""
        return 1.0 - 1.0 / self.shape.batches_low

    def plain_seconds(self) -> Linear | None:
        """Seconds that count whichever track is the longest; ``None`` when there are none."""
        parts = [] if self.serial is None else [self.serial]
        if self.unhidden_share:
            for track in self.tracks:
                parts.append(track.spread * self.unhidden_share)
                if track.first_batch is not None:
                    parts.append(track.first_batch * self.unhidden_share)
        return add(parts) if parts else None

    @property
    def longest_weight(self) -> float:
        """Weight of the longest track in the stage's time."""
        return 1.0 - self.unhidden_share

    def total(self) -> Any:
        """The stage's seconds, for amounts that are numbers (arrays broadcast over context lengths)."""
        plain = self.plain_seconds()
        longest = reduce(np.maximum, [track.lasting for track in self.tracks])
        if self.has_first_batch:
            longest = reduce(np.maximum, self.first_batch_seconds()) + longest * self.later_batches_share
        return longest * self.longest_weight + (0.0 if plain is None else plain)


def add(terms: Iterable[Linear]) -> Linear:
    """The sum of at least one term, whatever the terms are."""
    return reduce(operator.add, terms)


@dataclass(frozen=True)
class Peak:
    """Bytes that one tier holds at one moment of the schedule; each must fit the tier."""

    tier: Tier
    moment: str
    bytes: Linear


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything a formula needs besides the amounts.

    ``used`` are the parts that count in full, however little lies there: their calls, one for every batch, which is
    what an engine makes (of less than a kv head's row or a token of a batch it makes fewer), and what is kept once for
    each of them. Other parts are counted by the share that lies there: a lower bound, exact for none of it and for all.
    """

    hardware: Hardware
    model: ModelSpec
    workload: Workload
    switches: Switches
    shape: Shape
    used: frozenset[Part] = frozenset()

    def calls(self, amounts: Amounts[Any], kind: str) -> PerTier[Any]:
        """How many calls each tier's part of a kind takes in one layer: one a batch (times blocks)."""
        held: PerTier[Any] = getattr(amounts, kind)
        prompts = (amounts.prompts if (kind, tier) in self.used else getattr(held, tier) for tier in TIERS)
        return PerTier(*map(self.shape.batches, prompts))

    def parts(self, amounts: Amounts[Any], kind: str) -> Linear:
        """How many parts of a kind are in use (times blocks)."""
        held: PerTier[Any] = getattr(amounts, kind)
        share = 1.0 / (self.shape.gpu_batch_high * self.shape.batches_high)
        return add(amounts.blocks if (kind, tier) in self.used else getattr(held, tier) * share for tier in TIERS)

    def further_parts(self, kind: str) -> int:
        """How many parts of a kind are in use beside the first."""
        return max(0, sum(kind == one for one, _ in self.used) - 1)


class Formulation(ABC):
    """One cost model."""

    name: str
    default_usable_fraction: float
    activations_on_disk: bool
    mean_context_only: bool = False
    """True where the model uses one average decode context instead of each step's own."""

    @abstractmethod
    def prefill(self, case: Case, amounts: Amounts[Any]) -> list[Stage]:
        """One block's prompts through the whole model."""

    @abstractmethod
    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        """One new token for the whole block; attention spans ``context_len`` tokens, itself included."""

    @abstractmethod
    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        """The memory constraints: every moment at which a tier may be fullest."""

    @abstractmethod
    def refusal(self, switches: Switches, hardware: Hardware) -> str | None:
        """Why these switches mean nothing here (one sentence), or ``None`` where they are fine."""

    def notes(self, hardware: Hardware) -> tuple[str, ...]:
        """What a reader of this formulation's figures for this machine must know."""
        return ()

    @abstractmethod
    def check(self, hardware: Hardware, model: ModelSpec, workload: Workload) -> None:
        """Raise :class:`~costmodel.errors.InputError` for what this formulation cannot represent."""

    def decode_contexts(self, workload: Workload, segments: int | None = None) -> list[tuple[float, int]]:
        """Decode steps as (context length, number of steps) pairs.

        ``segments=None`` gives every step its own context. Otherwise neighbouring steps share their
        mean context; as a step's time is convex in it, the sum is then a lower bound (Jensen).
        """
        steps = workload.gen_len - 1
        if steps <= 0:
            return []
        if self.mean_context_only:
            return [(workload.prompt_len + workload.gen_len / 2, steps)]
        parts = steps if segments is None else min(segments, steps)
        edges = [round(i * steps / parts) for i in range(parts + 1)]
        return [(workload.prompt_len + (first + 1 + last) / 2, last - first) for first, last in pairwise(edges)]
