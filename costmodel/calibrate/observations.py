"""Measured runs as the fit sees them: one logarithm for each thing that a run says about the machine.

A run says how long its phases took, and for how long each resource was busy in them. Seconds of a phase are what is
to be predicted. Busy seconds help to tell constants apart that a phase's seconds mix, but mean less: work that hides
behind other work is stretched by it (two copies share a bus, a copy waits for a core) and costs nothing by that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing

from costmodel import records, validation
from costmodel.errors import InputError
from costmodel.estimate import PHASES, case_of, phase_seconds
from costmodel.formulations import get
from costmodel.hardware import Hardware
from costmodel.measurement import SCHEMA as MEASUREMENT
from costmodel.measurement import Measurement
from costmodel.validation import Validation
from costmodel.validation.statistics import compared_s, regime

Array = np.typing.NDArray[np.float64]

LEAST_BUSY = 0.1
"""Busy seconds below this share of their phase are mostly the overhead of starting the work: they are left out."""

BUSY_WEIGHT = 0.5
"""Weight of a residual of busy seconds beside one of a phase's seconds."""

GROUPS = ("prefill", "decode", "busy")
"""Kinds of observations, each with a scatter of its own."""


@dataclass(frozen=True, kw_only=True)
class Observed:
    """One measured run: what it did, and its logarithms of measured seconds.

    ``what`` names them: (phase, None) are the phase's seconds, (phase, resource) busy seconds.
    """

    measurement: Measurement
    what: tuple[tuple[str, str | None], ...]
    logs: Array

    @property
    def regime(self) -> str:
        """The resource that was busy for longest."""
        return regime(self.measurement.measured)

    @property
    def groups(self) -> list[int]:
        """The place in ``GROUPS`` of every observation."""
        return [GROUPS.index("busy" if resource else phase) for phase, resource in self.what]

    def seconds(self, hardware: Hardware) -> Array:
        """What the roofline predicts for every observation."""
        phases = _predicted(self.measurement, hardware)
        found = [phases[phase][0] if resource is None else phases[phase][1][resource] for phase, resource in self.what]
        return np.asarray(np.maximum(found, 1e-12))


def observed(measurement: Measurement, hardware: Hardware) -> Observed:
    """What one run says; ``hardware`` decides which work is predicted at all."""
    measured, predictions = measurement.measured, _predicted(measurement, hardware)
    found: list[tuple[tuple[str, str | None], float]] = []
    for phase, seconds in zip(PHASES, (measured.prefill_s, measured.decode_s), strict=True):
        if predictions[phase][0] <= 0 or seconds <= 0:
            continue  # a decode of no steps is measured as microseconds of bookkeeping
        found.append(((phase, None), seconds))
        took_s = compared_s(measured.busy_s[phase])
        for resource, predicted in predictions[phase][1].items():
            took = took_s[resource]
            if predicted > 0 and took >= LEAST_BUSY * seconds:
                found.append(((phase, resource), took))
    return Observed(
        measurement=measurement, what=tuple(what for what, _ in found), logs=np.log([took for _, took in found])
    )


def _predicted(one: Measurement, hardware: Hardware) -> dict[str, tuple[float, dict[str, float]]]:
    """Seconds of each phase, and busy seconds in it."""
    case = case_of(one.policy, hardware, one.model, one.workload)
    found = phase_seconds(get("roofline"), case, one.policy)
    return {phase: (seconds, compared_s(busy_s)) for phase, (seconds, busy_s) in found.items()}


# ------------------------------------------------------------------ files


def read(
    paths: Sequence[str | PathLike[str]], *, hardware: str | PathLike[str] | None = None
) -> tuple[Hardware, tuple[Measurement, ...]]:
    """The machine and the runs of validation and measurement files.

    A policy that a validation ran more than once counts once, by its middle run. A validation carries its machine; for
    measurements alone ``hardware`` is the file they were planned with. Runs of different machines, or planned with
    different numbers, are an :class:`InputError`.
    """
    found: list[Measurement] = []
    machines = [] if hardware is None else [(str(hardware), Hardware.from_file(hardware))]
    bare: list[tuple[str, Measurement]] = []
    for path in paths:
        data: Any = records.read_json(path)
        schema = data.get("schema") if isinstance(data, dict) else None
        if schema == validation.SCHEMA:
            whole = Validation.from_file(path)
            machines.append((str(path), whole.hardware))
            found += whole.measurements
        elif schema == MEASUREMENT:
            bare.append((str(path), Measurement.from_dict(data, where=str(path))))
        else:
            raise InputError(
                f"{path}: field 'schema' is {schema!r}: a validation ({validation.SCHEMA}) or a measurement "
                f"({MEASUREMENT}) is expected"
            )
    if not machines:
        raise InputError(f"{paths[0]} is a measurement, which names its machine only: give its file with --hardware")
    (first, machine), *others = machines
    for path, other in others:
        _check_same(machine, first, other, path)
    for path, one in bare:
        if one.hardware != machine.name:
            raise InputError(
                f"{path} was measured on {one.hardware!r}, {first} is of {machine.name!r}: one machine only"
            )
        found.append(one)
    seen = [(one.policy, one.workload, one.measured) for one in found]
    for place, run in enumerate(seen):
        if run in seen[:place]:
            raise InputError(
                f"the same run is given twice (number {place + 1} of {len(seen)} is number {seen.index(run) + 1}): a "
                "held-out run must not be fitted to; give each file once"
            )
    for one in found:
        if one.dtype == "float32":
            raise InputError(
                "a run computed in float32: the cost model counts 16-bit values; measure with --dtype auto"
            )
    return machine, tuple(found)


def _check_same(first: Hardware, first_path: str, other: Hardware, path: str) -> None:
    if other.rates == first.rates:
        return
    if first.name != other.name:
        raise InputError(f"{path} is of {other.name!r}, {first_path} of {first.name!r}: give runs of one machine only")
    differing = sorted({k for k in {*first.rates, *other.rates} if first.rates.get(k) != other.rates.get(k)})[0]
    raise InputError(
        f"{path} was planned with other rates than {first_path} ({differing} differs): give runs of one hardware file"
    )
