"""Which constants the runs identify: what the data alone say, without the prior that holds any of them in place."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from costmodel.calibrate.constants import MachineConstant
from costmodel.calibrate.observations import Array, Observed
from costmodel.calibrate.robust import Fit, fit
from costmodel.hardware import Hardware

WIDEST_FACTOR, WIDEST_SHARE = 1.5, 0.25
"""A constant is identified where the runs alone hold it within this factor (a share: this much) either way, at 95 %."""

_WIDTH_95 = 1.96
_NO_SLOPE = 1e-6
_SAME, _HARDLY, _UNKNOWN = 0.9, 5.0, 100.0


@dataclass(frozen=True, kw_only=True)
class Unidentified:
    """A constant that the runs cannot tell, why, and the run that would."""

    constant: MachineConstant
    why: str

    def sentence(self) -> str:
        """``"disk reads, rate (disk-read): no run depends on it; run …"``."""
        one = self.constant
        return f"{one.what} ({one.name}): {self.why}; a run that shows it: {one.run}"


def identified(
    runs: Sequence[Observed],
    hardware: Hardware,
    constants: Sequence[MachineConstant],
    *,
    start: Fit | None = None,
) -> tuple[Fit, tuple[Unidentified, ...]]:
    """The fit of those constants that the runs identify, and the others.

    The least certain constant is taken out of the fit (it keeps the file's number), and the rest judged again, until
    all that are left are identified: of two that only their sum is known of, the one that matters less goes.
    """
    kept, left_out = list(constants), list[Unidentified]()
    while True:
        found = start = fit(runs, hardware, kept, start=start)
        dropped = _drop(found, kept)
        if not dropped:
            return found, tuple(left_out)
        left_out += dropped
        kept = [one for one in kept if all(one is not other.constant for other in dropped)]


def unidentified(found: Fit) -> list[Unidentified]:
    """The constants of a fit that its runs do not identify, all others being free."""
    widths = _widths(found.information(), found.constants)
    return [
        Unidentified(constant=one, why=_why(found, place))
        for place, one in enumerate(found.constants)
        if widths[place] > 1
    ]


def _drop(found: Fit, kept: list[MachineConstant]) -> list[Unidentified]:
    """What to take out next: all that no run depends on and the least certain one, judged again after each."""
    dropped: list[Unidentified] = []
    information, places = found.information(), list(range(len(kept)))
    while places:
        some = information[np.ix_(places, places)]
        widths = _widths(some, [kept[place] for place in places])
        if max(widths) <= 1:
            break
        # Of constants that only their mixture is known of, which are all as uncertain, the weakest goes.
        strengths = [float(some[i, i]) * _limit(kept[place]) ** 2 for i, place in enumerate(places)]
        worst = min(range(len(places)), key=lambda i: (-min(float(widths[i]), _UNKNOWN), strengths[i]))
        dropped.append(Unidentified(constant=kept[places[worst]], why=_why(found, places[worst])))
        del places[worst]
    return dropped


def standard_deviations(information: Array) -> Array:
    """Of each offset, from the data alone; infinite where some mixture of the constants changes nothing."""
    norms = np.sqrt(np.diag(information))
    safe = np.where(norms > _NO_SLOPE, norms, 1.0)
    values, vectors = np.linalg.eigh(information / np.outer(safe, safe))
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = np.where(vectors**2 > 1e-9, vectors**2 / np.where(values > 1e-9, values, 0.0), 0.0)
    found = np.sqrt(parts.sum(axis=1)) / safe
    return np.where(norms > _NO_SLOPE, found, np.inf)


def _widths(information: Array, constants: Sequence[MachineConstant]) -> Array:
    """Half of each 95 % interval, as a share of the widest that counts as identified."""
    limits = np.array([_limit(one) for one in constants])
    return np.asarray(_WIDTH_95 * standard_deviations(information) / limits)


def _limit(one: MachineConstant) -> float:
    return WIDEST_SHARE if one.is_share else math.log(WIDEST_FACTOR)


def _why(found: Fit, place: int) -> str:
    """Why a constant of a fit cannot be told."""
    one, information = found.constants[place], found.information()
    norms = np.sqrt(np.diag(information))
    if norms[place] <= _NO_SLOPE:
        return "no run depends on it"
    limit = _limit(one)
    alone = _WIDTH_95 / norms[place]
    if alone <= limit:
        likeness = np.abs(information[place]) / (norms[place] * np.maximum(norms, _NO_SLOPE))
        likeness[place] = 0.0
        other = found.constants[int(np.argmax(likeness))]
        if likeness.max() > _SAME:
            return f"in these runs its effect looks like that of {other.what} ({other.name})"
        return "in these runs its effect looks like that of several others together"
    if alone > _HARDLY * limit:
        return "the runs hardly depend on it"
    within = f"{alone:.2f}" if one.is_share else f"a factor of {math.exp(alone):.2g}"
    return f"the runs tell it only within {within}"
