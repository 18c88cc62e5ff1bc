"""Policy → Estimate: what a policy costs on a machine, evaluated from the formulation's own formulas."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing

from costmodel.errors import InputError
from costmodel.formulations import get
from costmodel.formulations.base import (
    LINKS,
    RESOURCES,
    Case,
    Formulation,
    Peak,
    Shape,
    Stage,
    Switches,
    amounts_of,
    parts_of,
)
from costmodel.hardware import Hardware, Link, Links
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy
from costmodel.quantity import Quantity
from costmodel.workload import Workload

FloatArray = np.typing.NDArray[np.float64]

PHASES = ("prefill", "decode")

FIT_TOLERANCE = 1e-6
"""Relative excess over a limit that still counts as fitting: the LP solver's own tolerance."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Predicted cost of one policy; a Measurement has the same fields.

    Seconds are for one block; ``busy_s[phase][resource]`` are busy seconds, ``bytes_moved[link]`` bytes
    of one block; ``bottleneck`` names each phase's busiest resource on its busiest track (the processors
    share one), and leaves out a phase without work; ``peak_bytes`` and ``limit_bytes`` are by tier. With a
    given number of prompts, ``blocks`` blocks run one after another, the last one possibly short but charged
    in full, and ``throughput_tok_per_s`` is the whole job's.
    """

    prefill_s: float
    decode_s: float
    latency_s: float
    throughput_tok_per_s: float
    decode_throughput_tok_per_s: float | None
    blocks: int | None
    job_s: float | None
    peak_bytes: dict[str, float]
    limit_bytes: dict[str, float]
    bytes_moved: dict[str, float]
    busy_s: dict[str, dict[str, float]]
    bottleneck: dict[str, str]
    feasible: bool
    violations: tuple[str, ...]

    def busy_share(self, phase: str) -> dict[str, float]:
        """Busy seconds of each resource as a share of the phase."""
        seconds = self.prefill_s if phase == "prefill" else self.decode_s
        return {r: (busy / seconds if seconds else 0.0) for r, busy in self.busy_s[phase].items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Estimate":
        """Read what :meth:`to_dict` gives."""
        resources = data["resources"]
        busy_s = {phase: {r: float(found["busy_s"]) for r, found in resources[phase].items()} for phase in PHASES}
        given: dict[str, Any] = {
            field.name: data.get(field.name) for field in dataclasses.fields(cls) if field.name != "busy_s"
        }
        return cls(**{**given, "violations": tuple(data["violations"])}, busy_s=busy_s)

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        keys = ("prefill_s", "decode_s", "latency_s", "throughput_tok_per_s", "decode_throughput_tok_per_s")
        optional = {name: getattr(self, name) for name in ("blocks", "job_s") if getattr(self, name) is not None}
        return {
            **{name: getattr(self, name) for name in keys},
            **optional,
            "peak_bytes": self.peak_bytes,
            "limit_bytes": self.limit_bytes,
            "bytes_moved": self.bytes_moved,
            "feasible": self.feasible,
            "violations": list(self.violations),
            "bottleneck": self.bottleneck,
            "resources": {
                phase: {r: {"busy_s": self.busy_s[phase][r], "busy_share": share[r]} for r in RESOURCES}
                for phase in PHASES
                for share in [self.busy_share(phase)]
            },
        }


def estimate(
    policy: Policy,
    *,
    hardware: Hardware,
    model: ModelSpec,
    workload: Workload | None = None,
    formulation: str = "roofline",
    usable_fraction: float | None = None,
    decode_contexts: Literal["every step", "first step"] = "every step",
) -> Estimate:
    """Predict the cost of ``policy``; one that does not fit is estimated all the same and says so.

    ``decode_contexts="first step"`` repeats the first decode step, as some published figures do.
    Raises :class:`InputError` for switches or workloads that the formulation cannot represent.
    """
    workload = workload or Workload()
    chosen = get(formulation)
    check_workload(chosen, hardware, model, workload)
    refusal = chosen.refusal(Switches.of(policy), hardware)
    if refusal:
        raise InputError(refusal)
    if not chosen.activations_on_disk and policy.activations.disk > 0:
        raise InputError(
            f"activations.disk is {policy.activations.disk:g}: the {chosen.name} formulation keeps none on disk"
        )
    contexts = chosen.decode_contexts(workload)
    if decode_contexts == "first step":
        contexts = [(workload.prompt_len + 1.0, workload.gen_len - 1)] if contexts else []
    return evaluate(chosen, case_of(policy, hardware, model, workload), policy, usable_fraction, contexts)


def check_workload(formulation: Formulation, hardware: Hardware, model: ModelSpec, workload: Workload) -> None:
    """Raise :class:`InputError` for a sequence beyond the model's positions or the formulation's reach."""
    if model.max_positions is not None and workload.total_len > model.max_positions:
        raise InputError(
            f"prompt_len {workload.prompt_len} + gen_len {workload.gen_len} = {workload.total_len} tokens: "
            f"model {model.name!r} has {model.max_positions} positions"
        )
    formulation.check(hardware, model, workload)


def case_of(policy: Policy, hardware: Hardware, model: ModelSpec, workload: Workload) -> Case:
    """The formulas' inputs for one policy."""
    shape = Shape.exactly(policy.gpu_batch_size, policy.num_gpu_batches)
    used = parts_of((policy.weights, policy.cache, policy.activations))
    return Case(hardware=hardware, model=model, workload=workload, switches=Switches.of(policy), shape=shape, used=used)


def limits_of(hardware: Hardware, formulation: Formulation, usable_fraction: float | None) -> dict[str, float]:
    """Usable bytes by tier."""
    fraction = formulation.default_usable_fraction if usable_fraction is None else usable_fraction
    if not 0 < fraction <= 1:
        raise InputError(f"usable_fraction is {fraction:g}: it must lie in (0, 1]")
    return {tier: capacity * fraction for tier, capacity in hardware.capacity_bytes.items()}


def evaluate(
    formulation: Formulation,
    case: Case,
    policy: Policy,
    usable_fraction: float | None,
    contexts: list[tuple[float, int]],
) -> Estimate:
    """Evaluate the formulas at one policy; ``contexts`` are the decode steps as (context, steps)."""
    seconds = phase_seconds(formulation, case, policy, contexts)
    (prefill_s, prefill_busy_s), (decode_s, decode_busy_s) = seconds["prefill"], seconds["decode"]
    peaks = formulation.peaks(case, amounts_of(policy))
    limits = limits_of(case.hardware, formulation, usable_fraction)
    violations = tuple(overfull(peaks, limits))
    latency_s, prompts = prefill_s + decode_s, case.workload.num_prompts
    blocks = None if prompts is None else math.ceil(prompts / policy.block_size)
    job_s = None if blocks is None else blocks * latency_s
    tokens = (policy.block_size if prompts is None else prompts) * case.workload.gen_len
    return Estimate(
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=latency_s,
        throughput_tok_per_s=tokens / (latency_s if job_s is None else job_s),
        decode_throughput_tok_per_s=policy.block_size * (case.workload.gen_len - 1) / decode_s if decode_s else None,
        blocks=blocks,
        job_s=job_s,
        peak_bytes=fullest(peaks),
        limit_bytes=limits,
        bytes_moved=_bytes_moved(formulation, case, policy, contexts),
        busy_s={"prefill": prefill_busy_s, "decode": decode_busy_s},
        bottleneck=_bottlenecks(formulation, case, policy, contexts),
        feasible=not violations,
        violations=violations,
    )


def fullest(peaks: list[Peak]) -> dict[str, float]:
    """Bytes of every tier at its fullest moment."""
    return {tier: max(float(peak.bytes) for peak in peaks if peak.tier == tier) for tier in TIERS}


def overfull(peaks: list[Peak], limits: Mapping[str, float]) -> dict[str, float]:
    """Bytes beyond the limit on every tier where they are more than the tolerance (a millionth and a byte)."""
    excess = {tier: size - limits[tier] for tier, size in fullest(peaks).items()}
    return {tier: over for tier, over in excess.items() if over > limits[tier] * FIT_TOLERANCE + 1}


def block_seconds(
    formulation: Formulation, case: Case, policy: Policy, contexts: list[tuple[float, int]] | None = None
) -> tuple[float, float]:
    """Seconds of one block's prefill and decode; ``contexts=None`` gives every step its own context."""
    prefill_s, decode_s = (seconds for seconds, _ in phase_seconds(formulation, case, policy, contexts).values())
    return prefill_s, decode_s


def phase_seconds(
    formulation: Formulation, case: Case, policy: Policy, contexts: list[tuple[float, int]] | None = None
) -> dict[str, tuple[float, dict[str, float]]]:
    """Seconds of each phase of one block, and busy seconds by resource in it; contexts as in :func:`block_seconds`."""
    amounts = amounts_of(policy)
    stages: dict[str, tuple[list[Stage], float | FloatArray]] = {
        "prefill": (formulation.prefill(case, amounts), 1.0),
        "decode": ([], 1.0),
    }
    steps_by_context = formulation.decode_contexts(case.workload) if contexts is None else contexts
    if steps_by_context:
        lengths, steps = _columns(steps_by_context)
        stages["decode"] = formulation.decode(case, amounts, lengths), steps
    return {
        phase: (sum(float(np.sum(stage.total() * steps)) for stage in some), _busy(some, steps))
        for phase, (some, steps) in stages.items()
    }


def _columns(contexts: list[tuple[float, int]]) -> tuple[FloatArray, FloatArray]:
    lengths, steps = zip(*contexts, strict=True)
    return np.array(lengths, dtype=float), np.array(steps, dtype=float)


def _busy(stages: Iterable[Stage], steps: float | FloatArray = 1.0) -> dict[str, float]:
    """Busy seconds by resource, summed over stages and steps."""
    totals = dict.fromkeys(map(str, RESOURCES), 0.0)
    for stage in stages:
        for resource in RESOURCES:
            totals[resource] += float(np.sum(stage.busy[resource] * steps))
    return totals


def _bottlenecks(
    formulation: Formulation, case: Case, policy: Policy, contexts: list[tuple[float, int]]
) -> dict[str, str]:
    """The busiest resource of the busiest track of each phase that has work to do."""
    amounts = amounts_of(policy)
    found = {"prefill": _busiest(formulation.prefill(case, amounts), 1.0)}
    if contexts:
        lengths, steps = _columns(contexts)
        found["decode"] = _busiest(formulation.decode(case, amounts, lengths), steps)
    return found


def _busiest(stages: list[Stage], steps: float | FloatArray) -> str:
    tracks: dict[tuple[str, ...], float] = {}
    for stage in stages:
        for track in stage.tracks:
            seconds = track.spread if track.first_batch is None else track.spread + track.first_batch
            tracks[track.resources] = tracks.get(track.resources, 0.0) + float(np.sum(seconds * steps))
    busy = _busy(stages, steps)
    # What runs before the tracks is on none of them: its resource may still be the busiest.
    on_tracks = {resource for resources in tracks for resource in resources}
    tracks.update({(resource,): seconds for resource, seconds in busy.items() if resource not in on_tracks})
    longest = max(tracks, key=lambda resources: tracks[resources])
    return max(longest, key=lambda resource: busy[resource])


def _bytes_moved(
    formulation: Formulation, case: Case, policy: Policy, contexts: list[tuple[float, int]]
) -> dict[str, float]:
    """Bytes over each link: the seconds that the same formulas give for links of 1 byte/s, no latency."""
    one, none = Quantity(value=1.0, source="unit"), Quantity(value=0.0, source="unit")
    unit = Link(bytes_per_s=one, latency_s=none)
    links = Links(cpu_to_gpu=unit, gpu_to_cpu=unit, disk_read=unit, disk_write=unit)
    sources = {**case.hardware.sources, "unit": next(iter(case.hardware.sources.values()))}
    engine = dataclasses.replace(case.hardware.engine, cache_loads="overlapped")  # waiting moves no bytes
    hardware = dataclasses.replace(case.hardware, links=links, engine=engine, sources=sources, flexgen_constants=None)
    found = phase_seconds(formulation, dataclasses.replace(case, hardware=hardware), policy, contexts)
    return {link: sum(busy_s[link] for _, busy_s in found.values()) for link in LINKS}
