"""Fitting a machine's constants to runs: least squares within physical bounds, with stated priors.

Each constant has a prior from elsewhere (a datasheet, the released solver) and a bound that physics
sets. The fit minimises Σ (ln predicted − ln measured)² / noise² + Σ (ln constant − ln prior)² / spread²
over ln(constant). A constant that the runs do not determine therefore stays at its prior, also when a
run is left out; without that, leaving a run out would measure the optimiser's starting point.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import least_squares

from costmodel.calibrate.published import Run, predict
from costmodel.formulations.base import Formulation
from costmodel.hardware import Hardware, quantities
from costmodel.quantity import Quantity

NOISE = 0.02
"""Relative spread of a published throughput: rounding to three digits, and clocks that vary."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """One fitted number, called ``name``: the ``attribute`` of the quantity at ``path``.

    ``prior`` and ``spread`` (of its natural logarithm) come from ``why``; ``upper`` is the physical
    bound: 1 for an efficiency, so that no bandwidth exceeds its datasheet.
    """

    name: str
    path: str
    attribute: str
    prior: float
    spread: float
    upper: float
    why: str

    def of(self, hardware: Hardware) -> float:
        """The constant's value on a machine."""
        return float(getattr(dict(quantities(hardware))[self.path], self.attribute))


T4_FLEXGEN = (
    Constant(
        name="GPU memory bandwidth, share of 320 GB/s",
        path="gpu.memory_bytes_per_s",
        attribute="efficiency",
        prior=0.8,
        spread=0.1,
        upper=1.0,
        why="share of the datasheet's bandwidth that streaming kernels usually reach",
    ),
    Constant(
        name="prefill attention, share of 65 TFLOP/s",
        path="gpu.attention_flops_per_s",
        attribute="efficiency",
        prior=9.97 / 65,
        spread=1.0,
        upper=1.0,
        why="the released solver's batched matmul rate in prefill, 9.97 TFLOP/s",
    ),
    Constant(
        name="4-bit expansion, share of what memory traffic allows",
        path="gpu.dequantize_values_per_s",
        attribute="efficiency",
        prior=0.1,
        spread=1.0,
        upper=1.0,
        why="about ten elementwise passes where one would do",
    ),
    Constant(
        name="CPU attention, share of 128 GB/s",
        path="cpu.attention_bytes_per_s",
        attribute="efficiency",
        prior=12.3 / 128,
        spread=0.3,
        upper=1.0,
        why="the released solver's CPU attention, 0.0123 TFLOP/s at one FLOP a byte",
    ),
    Constant(
        name="CPU attention, seconds for each call",
        path="cpu.attention_call_s",
        attribute="value",
        prior=5e-3,
        spread=1.0,
        upper=1.0,
        why="order of magnitude of a synchronisation and a parallel region over fresh buffers",
    ),
    Constant(
        name="cache copy CPU→GPU, share of 15.75 GB/s",
        path="links.cpu_to_gpu.cache_bytes_per_s",
        attribute="efficiency",
        prior=0.35,
        spread=0.5,
        upper=1.0,
        why="a copy of pageable memory into a pinned buffer by one thread, 4 to 8 GB/s",
    ),
    Constant(
        name="disk read, share of 2.65 GB/s",
        path="links.disk_read.bytes_per_s",
        attribute="efficiency",
        prior=0.9,
        spread=0.1,
        upper=1.0,
        why="share of the provider's limit that large sequential reads usually reach",
    ),
)
"""Seven constants of FlexGen's engine on its T4; every other number of the machine has a source."""


def with_constants(hardware: Hardware, constants: Sequence[Constant], values: Sequence[float]) -> Hardware:
    """A copy of the machine with these values of the constants."""
    for constant, value in zip(constants, values, strict=True):

        def changed(old: Quantity, attribute: str = constant.attribute, new: float = float(value)) -> Quantity:
            changes: dict[str, Any] = {attribute: new}
            return dataclasses.replace(old, **changes)

        hardware = hardware.changed(constant.path, changed)
    return hardware


def fit(
    hardware: Hardware,
    runs: Sequence[Run],
    formulation: Formulation,
    constants: Sequence[Constant] = T4_FLEXGEN,
) -> Hardware:
    """The machine with its constants fitted to the runs, starting from the priors; deterministic."""
    priors = np.log([constant.prior for constant in constants])
    spreads = np.array([constant.spread for constant in constants])
    ceilings = np.log([constant.upper for constant in constants])

    def residuals(logs: np.ndarray[tuple[int], np.dtype[np.float64]]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        machine = with_constants(hardware, constants, np.exp(logs).tolist())
        misfits = [np.log(predict(run, machine, formulation)[0] / run.throughput_tok_per_s) / NOISE for run in runs]
        return np.array([*misfits, *((logs - priors) / spreads)])

    solution = least_squares(
        residuals,
        np.minimum(priors, ceilings - 1e-6),
        bounds=(priors - 6, ceilings + 1e-12),
        diff_step=[1e-5] * len(constants),
        xtol=1e-12,
        ftol=1e-12,
    )
    return with_constants(hardware, constants, np.exp(solution.x).tolist())
