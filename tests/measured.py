"""Measurements of a made-up machine: what its own formulas predict, with noise, planned with a file that is wrong."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from costmodel.calibrate.constants import MACHINE_CONSTANTS
from costmodel.estimate import Estimate, estimate
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.model import ModelSpec
from costmodel.offset import moved
from costmodel.policy import Policy, Split
from costmodel.quantity import Quantity
from costmodel.workload import Workload
from tests.instances import link, machine, plain_model

SPREAD = 0.05


def measured_machine(**changes: object) -> Hardware:
    """A machine whose rates were all measured, with a spread of 5 %."""
    links = dataclasses.replace(machine().links, disk_read=link(2e9), disk_write=link(1e9), cpu_to_gpu=link(6e9))
    found = machine(links=links, layer_launch_s=1e-4, unhidden_share=0.05, **changes)  # type: ignore[arg-type]

    def with_spread(old: Quantity) -> Quantity:
        return dataclasses.replace(old, spread=SPREAD)

    for path in found.rates:
        if path.startswith(("gpu", "cpu", "links")):
            found = found.changed(path, with_spread)
    return found


def truth(planned: Hardware, factors: Mapping[str, float]) -> Hardware:
    """The machine as it really is: constants by name times a factor."""
    for name, factor in factors.items():
        planned = moved(planned, MACHINE_CONSTANTS[name].path, float(np.log(factor)))
    return planned


def policies() -> list[Policy]:
    """Policies that between them wait for disk, link, processor and memory: 24 of them."""
    splits = [Split(gpu=1, cpu=0, disk=0), Split(gpu=0.2, cpu=0.8, disk=0), Split(gpu=0.1, cpu=0.1, disk=0.8)]
    found = []
    for weights, cache, (batch, batches) in itertools.product(splits, splits[:2], ((1, 1), (8, 2), (48, 1), (64, 4))):
        found.append(
            Policy(
                weights=weights,
                cache=cache,
                activations=splits[0],
                gpu_batch_size=batch,
                num_gpu_batches=batches,
                compress_weights=False,
                compress_cache=False,
                cpu_attention=False,
                overlap=batch != 8,
            )
        )
    return found


def measurement(
    policy: Policy,
    *,
    really: Hardware,
    planned: Hardware,
    factor: Sequence[float] = (1.0, 1.0),
    model: ModelSpec | None = None,
    workload: Workload | None = None,
) -> Measurement:
    """A run whose (prefill, decode) took ``factor`` times what the formulas say of the machine as it really is."""
    model, workload = model or plain_model(), workload or Workload(prompt_len=128, gen_len=8)
    cost = estimate(policy, hardware=really, model=model, workload=workload)
    prefill_s, decode_s = cost.prefill_s * factor[0], cost.decode_s * factor[1]
    busy_s = {
        phase: {resource: seconds * scale for resource, seconds in cost.busy_s[phase].items()}
        for phase, scale in zip(("prefill", "decode"), factor, strict=True)
    }
    took: Estimate = dataclasses.replace(
        cost,
        prefill_s=prefill_s,
        decode_s=decode_s,
        latency_s=prefill_s + decode_s,
        throughput_tok_per_s=policy.block_size * workload.gen_len / (prefill_s + decode_s),
        busy_s=busy_s,
    )
    return Measurement(
        model=model,
        dtype="float16",
        workload=workload,
        policy=policy,
        hardware=planned.name,
        predicted=estimate(policy, hardware=planned, model=model, workload=workload),
        measured=took,
        block_s=((prefill_s, decode_s),),
        resident_bytes={},
        origin={"date": "2026-11-23"},
    )


def measurements(
    really: Hardware, planned: Hardware, *, noise: float, seed: int = 0, outliers: int = 0, repeats: int = 1
) -> list[Measurement]:
    """Every policy run ``repeats`` times with log-normal noise; the last ``outliers`` took five times as long."""
    generator = np.random.default_rng(seed)
    chosen = policies() * repeats
    found = []
    for place, policy in enumerate(chosen):
        slow = 5.0 if place >= len(chosen) - outliers else 1.0
        factor = slow * np.exp(generator.normal(0.0, noise, 2))
        found.append(measurement(policy, really=really, planned=planned, factor=factor.tolist()))
    return found
