"""Measurement: what a run of a policy really took, beside what was predicted for it.

The figures of a run have the fields of an :class:`~costmodel.estimate.Estimate`, so that the two can be
subtracted field by field.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

from costmodel import records, shared_cache
from costmodel.errors import InputError
from costmodel.estimate import Estimate
from costmodel.model import ModelSpec
from costmodel.policy import Policy
from costmodel.workload import Workload

SCHEMA = "tierwise.measurement/1"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run: what was run, what was predicted, what was measured, and where.

    ``block_s`` are (prefill, decode) seconds of every block. ``resident_bytes`` are the bytes that were
    placed on each tier by kind, buffers included. ``origin`` names machine, versions, commit and date.
    """

    model: ModelSpec
    dtype: str
    workload: Workload
    policy: Policy
    hardware: str
    predicted: Estimate
    measured: Estimate
    block_s: tuple[tuple[float, float], ...]
    resident_bytes: Mapping[str, Mapping[str, float]]
    origin: Mapping[str, Any]

    @property
    def throughput_error(self) -> float:
        """Predicted over measured throughput, minus 1."""
        return self.predicted.throughput_tok_per_s / self.measured.throughput_tok_per_s - 1

    @property
    def shared_write_rates(self) -> tuple[float, ...]:
        """Bytes/s of writes that cores shared beside this run (see :mod:`costmodel.shared_cache`); none if unknown."""
        return tuple(self.origin.get(shared_cache.ORIGIN_KEY, ()))

    def to_dict(self) -> dict[str, Any]:
        """The documented JSON form."""
        return {
            "schema": SCHEMA,
            "model": self.model.to_dict(),
            "dtype": self.dtype,
            "workload": records.to_dict(self.workload),
            "policy": self.policy.to_dict(),
            "hardware": self.hardware,
            "predicted": self.predicted.to_dict(),
            "measured": self.measured.to_dict(),
            "block_s": [list(block) for block in self.block_s],
            "resident_bytes": {tier: dict(kinds) for tier, kinds in self.resident_bytes.items()},
            "origin": dict(self.origin),
        }

    @classmethod
    def from_dict(cls, data: object, *, where: str = "measurement") -> "Measurement":
        """Read what :meth:`to_dict` gives; ``where`` opens every message."""
        found = records.check_schema(data, SCHEMA, where=where)
        try:
            return cls(
                model=records.from_dict(ModelSpec, found["model"], where=f"{where}: model"),
                dtype=str(found["dtype"]),
                workload=records.from_dict(Workload, found["workload"], where=f"{where}: workload"),
                policy=records.from_dict(Policy, found["policy"], where=f"{where}: policy"),
                hardware=str(found["hardware"]),
                predicted=Estimate.from_dict(found["predicted"]),
                measured=_checked(Estimate.from_dict(found["measured"]), where=f"{where}: measured"),
                block_s=tuple((float(prefill), float(decode)) for prefill, decode in found["block_s"]),
                resident_bytes=found["resident_bytes"],
                origin=_origin(found["origin"], where=f"{where}: origin"),
            )
        except InputError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: this is no measurement: {error}") from None

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "Measurement":
        """Read a measurement file."""
        return cls.from_dict(records.read_json(path), where=str(path))


def _origin(origin: object, *, where: str) -> Mapping[str, Any]:
    """What is known of a run's origin, with rates that can be reckoned with."""
    if not isinstance(origin, dict):
        raise InputError(f"{where} is {origin!r}: an object is expected")
    rates = origin.get(shared_cache.ORIGIN_KEY, [])
    if not isinstance(rates, list) or not all(isinstance(rate, int | float) and rate >= 0 for rate in rates):
        raise InputError(f"{where}: {shared_cache.ORIGIN_KEY} is {rates!r}: a list of rates is expected")
    return origin


def _checked(measured: Estimate, *, where: str) -> Estimate:
    """The figures of a run, each a finite number of at least 0, and its latency the sum of its phases."""
    seconds = {name: getattr(measured, name) for name in ("prefill_s", "decode_s", "latency_s", "throughput_tok_per_s")}
    seconds |= {f"busy_s.{phase}.{r}": busy for phase, all_s in measured.busy_s.items() for r, busy in all_s.items()}
    for name, value in seconds.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InputError(f"{where}: {name} is {value!r}: a finite number of at least 0 is expected")
    phases_s = measured.prefill_s + measured.decode_s
    if not math.isclose(measured.latency_s, phases_s, rel_tol=0.01, abs_tol=1e-3) or phases_s == 0:
        raise InputError(
            f"{where}: latency_s is {measured.latency_s:g}: prefill and decode take {phases_s:g} s together"
        )
    return measured
