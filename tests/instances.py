"""Small machines, models and problems that the planner's tests share, and a solver of their own.

The solver (:func:`best_policy_of_shape`) assembles a linear program without costmodel.linear_program: its variables
are the fractions of a policy, its coefficients are differences of evaluated formulas, scipy solves it.
"""

import dataclasses
import itertools
import math
import random
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from costmodel.estimate import Estimate, case_of, estimate
from costmodel.formulations import get
from costmodel.formulations.base import KINDS, SWITCHES, Amounts, Case, Formulation, PerTier, Shape, Stage, Switches
from costmodel.hardware import Cpu, Disk, Engine, Gpu, Hardware, Link, Links
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.quantity import Quantity, Rate, Source
from costmodel.search.problem import Problem
from costmodel.workload import Workload

SOURCE = {"test": Source(title="made up for a test", date="2026-11")}

# ------------------------------------------------------------------ machines and models


def quantity(value: float) -> Quantity:
    return Quantity(value=float(value), source="test")


def rate(value: float, *curve: tuple[float, float]) -> Rate:
    return Rate(value=float(value), source="test", curve=curve or None)


def link(bytes_per_s: float, *, latency_s: float = 0.0, cache_bytes_per_s: float | None = None) -> Link:
    cache = None if cache_bytes_per_s is None else quantity(cache_bytes_per_s)
    return Link(bytes_per_s=quantity(bytes_per_s), latency_s=quantity(latency_s), cache_bytes_per_s=cache)


def machine(
    *,
    gpu_bytes: float = 16e9,
    cpu_bytes: float = 200e9,
    disk_bytes: float = 1500e9,
    kind: str = "cuda",
    memory_bytes_per_s: float = 250e9,
    matmul: Rate | None = None,
    attention: Rate | None = None,
    compressed_matmul: Rate | None = None,
    dequantize_values_per_s: float = 20e9,
    layer_launch_s: float = 0.0,
    compressed_call_s: float | None = None,
    carried_call_s: float | None = None,
    part_call_s: float | None = None,
    compressed_part_call_s: float | None = None,
    gather_bytes_per_s: float | None = None,
    quantize_values_per_s: float | None = None,
    compressed_launch_share: float | None = None,
    cpu_attention_bytes_per_s: float | None = 20e9,
    cpu_attention_call_s: float | None = None,
    cpu_dequantize_values_per_s: float | None = 4e9,
    links: Links | None = None,
    **engine: Any,
) -> Hardware:
    """A machine of round numbers without latencies, overheads or an imperfect engine, unless asked for."""

    def optional(value: float | None) -> Quantity | None:
        return None if value is None else quantity(value)

    facts: dict[str, Any] = {
        "unhidden_share": 0.0,
        "stages": "layer",
        "weight_loads": "spread",
        "cache_loads": "overlapped",
        "prefill_logits": "last",
        "attention_scores": "fused",
        "attention_causal_share": 1.0,
    } | engine
    for name in ("unhidden_share", "attention_causal_share"):
        facts[name] = quantity(facts[name])
    return Hardware(
        name="test-machine",
        description="A machine of a test.",
        gpu=Gpu(
            name="GPU",
            kind=kind,
            memory_bytes=quantity(gpu_bytes),
            memory_bytes_per_s=quantity(memory_bytes_per_s),
            matmul_flops_per_s=matmul or rate(20e12),
            attention_flops_per_s=attention or rate(5e12),
            dequantize_values_per_s=quantity(dequantize_values_per_s),
            layer_launch_s=quantity(layer_launch_s),
            compressed_matmul_flops_per_s=compressed_matmul,
            compressed_call_s=optional(compressed_call_s),
            carried_call_s=optional(carried_call_s),
            part_call_s=optional(part_call_s),
            compressed_part_call_s=optional(compressed_part_call_s),
            gather_bytes_per_s=optional(gather_bytes_per_s),
            quantize_values_per_s=optional(quantize_values_per_s),
            compressed_launch_share=optional(compressed_launch_share),
        ),
        cpu=Cpu(
            name="CPU",
            memory_bytes=quantity(cpu_bytes),
            attention_bytes_per_s=optional(cpu_attention_bytes_per_s),
            attention_call_s=optional(cpu_attention_call_s),
            dequantize_values_per_s=optional(cpu_dequantize_values_per_s),
        ),
        disk=Disk(name="disk", memory_bytes=quantity(disk_bytes)),
        links=links or Links(cpu_to_gpu=link(10e9), gpu_to_cpu=link(8e9), disk_read=link(2e9), disk_write=link(1e9)),
        engine=Engine(name="test", **facts),
        sources=SOURCE,
    )


def plain_model(
    *,
    num_layers: int = 24,
    hidden_size: int = 1024,
    num_heads: int = 16,
    vocab_size: int = 50_000,
    **changes: Any,
) -> ModelSpec:
    """An OPT-like model without positions, biases and norms' parameters, so that counts are quick to do by hand."""
    shape: dict[str, Any] = {
        "family": "opt",
        "num_kv_heads": num_heads,
        "head_dim": hidden_size // num_heads,
        "ffn_size": 4 * hidden_size,
        "gated_mlp": False,
        "embedding_size": hidden_size,
        "tied_head": True,
        "norm_vectors": 0,
    } | changes
    return ModelSpec(
        name="test-model",
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        vocab_size=vocab_size,
        **shape,
    )


def logarithmic(rng: random.Random, low: float, high: float) -> float:
    """A number between low and high whose order of magnitude is what varies."""
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def any_rate(rng: random.Random, value: float) -> Rate:
    """A constant rate, or a measured curve that rises and falls as it likes."""
    if rng.random() < 0.4:
        return rate(value)
    rows = sorted({round(logarithmic(rng, 1, 4000)) for _ in range(rng.randint(1, 5))})
    return rate(value, *((float(row), value * logarithmic(rng, 0.02, 1)) for row in rows))


def any_link(rng: random.Random, low: float, high: float) -> Link:
    return link(
        logarithmic(rng, low, high),
        latency_s=rng.choice([0.0, logarithmic(rng, 1e-6, 1e-3)]),
        cache_bytes_per_s=rng.choice([None, logarithmic(rng, low, high)]),
    )


def any_machine(rng: random.Random, *, gpu_bytes: float, cpu_bytes: float, disk_bytes: float) -> Hardware:
    """A machine of these sizes with any rates, any engine and any of the optional numbers."""
    return machine(
        gpu_bytes=gpu_bytes,
        cpu_bytes=cpu_bytes,
        disk_bytes=disk_bytes,
        kind=rng.choice(["cuda", "cuda", "cpu"]),
        memory_bytes_per_s=logarithmic(rng, 1e10, 1e12),
        matmul=any_rate(rng, logarithmic(rng, 1e11, 1e14)),
        attention=any_rate(rng, logarithmic(rng, 1e11, 1e13)),
        compressed_matmul=rng.choice([None, any_rate(rng, logarithmic(rng, 1e11, 1e14))]),
        dequantize_values_per_s=logarithmic(rng, 1e9, 1e11),
        layer_launch_s=rng.choice([0.0, logarithmic(rng, 1e-6, 1e-3)]),
        compressed_call_s=rng.choice([None, logarithmic(rng, 1e-5, 1e-2)]),
        carried_call_s=rng.choice([None, logarithmic(rng, 1e-5, 1e-2)]),
        part_call_s=rng.choice([None, logarithmic(rng, 1e-5, 1e-2)]),
        compressed_part_call_s=rng.choice([None, logarithmic(rng, 1e-5, 1e-2)]),
        gather_bytes_per_s=rng.choice([None, logarithmic(rng, 1e9, 1e11)]),
        quantize_values_per_s=rng.choice([None, logarithmic(rng, 1e8, 1e10)]),
        compressed_launch_share=rng.choice([None, logarithmic(rng, 0.1, 2.0)]),
        cpu_attention_bytes_per_s=rng.choice([None, logarithmic(rng, 1e9, 1e11), logarithmic(rng, 1e9, 1e11)]),
        cpu_attention_call_s=rng.choice([None, logarithmic(rng, 1e-5, 1e-2)]),
        cpu_dequantize_values_per_s=rng.choice([None, logarithmic(rng, 1e9, 1e11)]),
        links=Links(
            cpu_to_gpu=any_link(rng, 1e9, 1e11),
            gpu_to_cpu=any_link(rng, 1e9, 1e11),
            disk_read=any_link(rng, 1e8, 1e10),
            disk_write=any_link(rng, 1e8, 1e10),
        ),
        unhidden_share=rng.choice([0.0, 0.0, 0.05, 0.3, 1.0]),
        stages=rng.choice(["layer", "attention and mlp"]),
        weight_loads=rng.choice(["spread", "first batch"]),
        cache_loads=rng.choice(["overlapped", "blocking"]),
        prefill_logits=rng.choice(["last", "all"]),
        attention_scores=rng.choice(["fused", "stored"]),
        attention_causal_share=rng.choice([0.5, 1.0]),
        prefill_rows=rng.choice([None, 64, 1024]),
        expanded=rng.choice(["layer and cache", "matrix", "pieces"]),
        buffers=rng.choice(["as needed", "always"]),
    )


def any_model(rng: random.Random, *, flexgen: bool = False) -> ModelSpec:
    """A model of 4 to 48 layers; with grouped heads and a gated MLP at times, unless it is for ``flexgen``."""
    num_heads, head_dim = rng.choice([8, 16, 32]), rng.choice([64, 128])
    gated = not flexgen and rng.random() < 0.3
    return plain_model(
        num_layers=rng.choice([4, 24, 48]),
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=rng.choice([1, num_heads]) if gated else num_heads,
        ffn_size=rng.choice([2, 4]) * num_heads * head_dim,
        gated_mlp=gated,
        vocab_size=rng.choice([5_000, 50_000]),
        tied_head=rng.random() < 0.5,
        norm_vectors=rng.choice([0, 1, 2]),
    )


def weight_bytes(model: ModelSpec) -> float:
    return model.total_params * 2.0


def roomy_for(rng: random.Random, model: ModelSpec, tokens: int, prompts: float) -> dict[str, float]:
    """Sizes of tiers, in any proportion, for about this many prompts of cache beside the weights."""
    shares = [rng.random() + 0.01 for _ in TIERS]
    cache = model.kv_bytes_per_token(compressed=False) * tokens * model.num_layers * prompts
    total = cache + weight_bytes(model) * rng.uniform(0.6, 3)
    return {f"{tier}_bytes": total * share / sum(shares) for tier, share in zip(TIERS, shares, strict=True)}


def any_splits(rng: random.Random, *, disk_activations: bool = True) -> tuple[Split, Split, Split]:
    """Random splits; about half of them with whole tensors on one tier."""

    def one(tiers: int) -> Split:
        parts = [rng.random() for _ in range(tiers)] if rng.random() < 0.6 else [0.0] * tiers
        if not any(parts):
            parts[rng.randrange(tiers)] = 1.0
        gpu, cpu, disk = (part / sum(parts) for part in [*parts, 0.0][:3])
        return Split(gpu=gpu, cpu=cpu, disk=disk)

    return one(3), one(3), one(3 if disk_activations else 2)


def any_switches(rng: random.Random, formulation: Formulation, hardware: Hardware) -> Switches:
    """Switches that the formulation and the machine allow."""
    values = itertools.product([False, True], repeat=len(SWITCHES))
    every = [Switches(**dict(zip(SWITCHES, chosen, strict=True))) for chosen in values]
    return rng.choice([switches for switches in every if formulation.refusal(switches, hardware) is None])


def any_shape(rng: random.Random, *, most: int) -> Shape:
    """A range of batch shapes, often wide, at times a single one in either direction."""

    def ends() -> tuple[int, int]:
        low = round(logarithmic(rng, 1, most))
        return low, rng.choice([low, rng.randint(low, most), rng.randint(low, min(most, 2 * low))])

    (size_low, size_high), (low, high) = ends(), ends()
    return Shape(gpu_batch_low=size_low, gpu_batch_high=size_high, batches_low=low, batches_high=high)


def inside(rng: random.Random, shape: Shape) -> Shape:
    """One batch shape of a range, its corners more often than their share."""

    def pick(low: int, high: int) -> int:
        return rng.choice([low, high, rng.randint(low, high)])

    return Shape.exactly(pick(shape.gpu_batch_low, shape.gpu_batch_high), pick(shape.batches_low, shape.batches_high))


def any_problem(rng: random.Random, name: str, *, prompts: float = 40.0, **changes: Any) -> Problem:
    """A problem of a formulation in which tiers are about full with this many prompts."""
    formulation = get(name)
    model = any_model(rng, flexgen=name == "flexgen")
    workload = Workload(prompt_len=rng.choice([1, 64, 500, 2000]), gen_len=rng.choice([1, 2, 5, 9]))
    hardware = any_machine(rng, **roomy_for(rng, model, workload.total_len, logarithmic(rng, 1, prompts)))
    values: dict[str, Any] = {
        "formulation": formulation,
        "hardware": hardware,
        "model": model,
        "workload": workload,
        "limits": hardware.capacity_bytes,
        "switches": (any_switches(rng, formulation, hardware),),
    }
    return Problem(**values | changes)


# ------------------------------------------------------------------ a solver that shares no code with the library's


@dataclasses.dataclass(frozen=True)
class Best:
    """The best policy of one shape and its estimate."""

    policy: Policy
    cost: Estimate


def best_policy_of_shape(problem: Problem, switches: Switches, shape: Shape) -> Best | None:
    """Solve for the splits of one shape with scipy; ``None`` where nothing fits. Every decode step is its own."""
    prompts = float(shape.gpu_batch_low * shape.batches_low)
    anywhere = tuple(Split(gpu=1, cpu=0, disk=0) for _ in KINDS)
    parts = tuple((kind, tier) for kind in KINDS for tier in TIERS)
    case = case_of(problem.policy(switches, shape, anywhere), problem.hardware, problem.model, problem.workload)
    case = dataclasses.replace(case, used=frozenset(parts))
    formulation = problem.formulation

    # Ten points at once: every fraction zero, then one of them 1. An affine function is known by its values there.
    points = np.vstack([np.zeros(9), np.eye(9)])
    weights, cache, hidden = points[:, 0:3].T, points[:, 3:6].T * prompts, points[:, 6:9].T * prompts
    amounts: Amounts[Any] = Amounts(
        PerTier(*weights), PerTier(*cache), PerTier(*hidden), prompts=np.full(10, prompts), blocks=np.ones(10)
    )

    def staged(case: Case) -> list[tuple[Stage, float]]:
        """Every stage of a block and its passes."""
        found = [(stage, 1.0) for stage in formulation.prefill(case, amounts)]
        for context_len, steps in formulation.decode_contexts(problem.workload):
            found += [(stage, float(steps)) for stage in formulation.decode(case, amounts, context_len)]
        return found

    def values_of(stage: Stage) -> list[tuple[Any, Any, Any]]:
        """Work, waiting and loads beside the first batch of every track; what is always there comes last."""
        tracks = [
            tuple(0.0 if part is None else part for part in (track.spread, track.waited, track.first_batch))
            for track in stage.tracks
        ]
        return [*tracks, (0.0 if stage.serial is None else stage.serial, 0.0, 0.0)]  # type: ignore[list-item]

    # Nine indicators of the parts in use follow the nine fractions. What a part in use adds, however little it holds,
    # is missing where it alone is not in use and holds nothing.
    cases = [case, *(dataclasses.replace(case, used=case.used - {part}) for part in parts)]
    stages_of, peaks_of = [staged(one) for one in cases], [formulation.peaks(one, amounts) for one in cases]

    def affine(*values_of_cases: Any) -> np.ndarray:
        """Nine slopes to fractions, nine to indicators, and the constant with nothing in use."""
        full, *less = (np.zeros(10) + values for values in values_of_cases)
        added = [full[0] - values[0] for values in less]
        return np.concatenate([full[1:] - full[0], added, [full[0] - sum(added)]])

    def seconds(number: int, track: int, which: int) -> np.ndarray:
        """The same of a stage's track."""
        return affine(*(values_of(found[number][0])[track][which] for found in stages_of))

    rows: list[tuple[np.ndarray, dict[int, float]]] = []  # affine(x) + sum of extra variables <= 0
    cost, constant, extra_cost = np.zeros(18), 0.0, []
    batches = shape.batches_low
    for number, (stage, passes) in enumerate(stages_of[0]):
        tracks = range(len(stage.tracks))
        works, waits, loads = ([seconds(number, track, which) for track in tracks] for which in range(3))
        first, later = 18 + len(extra_cost), 19 + len(extra_cost)
        extra_cost += [passes * (1 - stage.unhidden_share)] * 2
        for work, wait, load in zip(works, waits, loads, strict=True):
            rows.append(((work + wait) / batches + load, {first: -1.0}))
            rows.append(((work + wait) * (1 - 1 / batches), {later: -1.0}))
        always = sum(works + loads) * stage.unhidden_share
        if stage.serial is not None:
            always = always + seconds(number, -1, 0)
        cost, constant = cost + always[:18] * passes, constant + always[18] * passes
    width = 18 + len(extra_cost)
    objective = np.concatenate([cost, extra_cost])
    for peaks in zip(*peaks_of, strict=True):
        limit, size = problem.limits[peaks[0].tier], affine(*(peak.bytes for peak in peaks))
        unit = max(limit, float(np.max(np.abs(size))))
        size[18] -= limit
        rows.append((size / unit, {}))
    if problem.workload.max_latency_s is not None:
        limit = problem.workload.max_latency_s
        row = np.concatenate([objective[:18], [constant - limit]]) / limit
        rows.append((row, {18 + j: weight / limit for j, weight in enumerate(extra_cost)}))
    for i in range(9):  # nothing lies where nothing is in use
        row = np.zeros(19)
        row[i], row[9 + i] = 1.0, -1.0
        rows.append((row, {}))
    matrix, right = np.zeros((len(rows), width)), np.zeros(len(rows))
    for i, (line, extra) in enumerate(rows):
        matrix[i, :18], right[i] = line[:18], -line[18]
        for column, value in extra.items():
            matrix[i, column] = value
    sums = np.zeros((3, width))
    for i in range(3):
        sums[i, 3 * i : 3 * i + 3] = 1.0
    lower, upper = np.zeros(width), np.concatenate([np.ones(18), np.full(width - 18, np.inf)])
    if not formulation.activations_on_disk:
        upper[8] = 0.0
    for i, split in enumerate(problem.splits or ()):
        lower[3 * i : 3 * i + 3] = upper[3 * i : 3 * i + 3] = [getattr(split, tier) for tier in TIERS]
    scale = max(float(np.max(np.abs(objective))), 1e-300)
    counts = objective[9:18].any() or any(line[9:18].any() for line, _ in rows[:-9])
    found = milp(
        objective / scale,
        constraints=[LinearConstraint(matrix, -np.inf, right), LinearConstraint(sums, 1.0, 1.0)],
        bounds=Bounds(lower, upper),
        integrality=np.concatenate([np.zeros(9), np.full(9, float(counts)), np.zeros(width - 18)]),
        options={"mip_rel_gap": 1e-9},
    )
    if found.status == 2:
        return None
    assert found.status == 0, found.message
    splits = problem.splits or tuple(_split(found.x[3 * i : 3 * i + 3]) for i in range(3))
    policy = problem.policy(switches, shape, splits)
    return Best(policy, cost_of(problem, policy))


def _split(fractions: np.ndarray) -> Split:
    kept = np.where(fractions < 1e-9, 0.0, fractions)
    gpu, cpu, disk = (float(x) for x in kept / kept.sum())
    return Split(gpu=gpu, cpu=cpu, disk=disk)


def cost_of(problem: Problem, policy: Policy) -> Estimate:
    """The estimate of a policy under the problem's own limits."""
    capacity = problem.hardware.capacity_bytes["gpu"]
    return estimate(
        policy,
        hardware=problem.hardware,
        model=problem.model,
        workload=problem.workload,
        formulation=problem.formulation.name,
        usable_fraction=problem.limits["gpu"] / capacity,
    )


def every_shape(problem: Problem) -> list[Shape]:
    """Every batch shape that could fit: together, the tiers must at least hold the cache in four bits."""
    model, workload = problem.model, problem.workload
    cache = model.kv_values_per_token * 0.5625 * model.num_layers * workload.total_len
    most = math.floor(sum(problem.limits.values()) / cache * (1 + 1e-6))
    batch = min(most, workload.num_prompts or most)
    sizes = [problem.gpu_batch_size] if problem.gpu_batch_size else range(1, batch + 1)
    numbers = [problem.num_gpu_batches] if problem.num_gpu_batches else range(1, batch + 1)
    return [Shape.exactly(size, number) for size in sizes for number in numbers if size * number <= most]


def brute_force(problem: Problem) -> list[Best]:
    """The best policy of every batch shape under every combination of switches, without the library's program."""
    found = (
        best_policy_of_shape(problem, switches, shape)
        for switches in problem.switches
        for shape in every_shape(problem)
    )
    return [best for best in found if best is not None]


def fastest_of(found: list[Best]) -> Best:
    return max(found, key=lambda best: best.cost.throughput_tok_per_s)
