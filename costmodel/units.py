"""Units: the only place that converts between text and bytes, bytes/s, FLOP/s and seconds.

Inside the package a quantity is a float in its SI base unit; its name says which one.
``GB`` is 10**9 bytes and ``GiB`` is 2**30 bytes, here and in everything printed.
"""

import math
import re
from typing import Literal

from costmodel.errors import InputError

GB = 10**9
GiB = 2**30

Dimension = Literal["bytes", "bytes/s", "FLOP/s", "s", "values/s"]

_DECIMAL = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15}
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_BYTES = {f"{prefix}B": factor for prefix, factor in (_DECIMAL | {"K": 10**3} | _BINARY).items()}

_SCALES: dict[Dimension, dict[str, float]] = {
    "bytes": {**_BYTES},
    "bytes/s": {f"{unit}/s": factor for unit, factor in _BYTES.items()},
    "FLOP/s": {f"{prefix}FLOP/s": factor for prefix, factor in _DECIMAL.items()},
    "values/s": {f"{prefix}values/s": factor for prefix, factor in _DECIMAL.items()},
    "s": {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "min": 60.0, "h": 3600.0},
}
_EXAMPLE: dict[Dimension, str] = {
    "bytes": "16GiB",
    "bytes/s": "12.9GB/s",
    "FLOP/s": "65TFLOP/s",
    "s": "20us",
    "values/s": "9Gvalues/s",
}
_PATTERN = re.compile(r"\s*([-+]?[0-9_]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*(\D.*?)?\s*")


def parse(text: str | float, dimension: Dimension) -> float:
    """Return the value of ``"16GiB"`` in the base unit of its dimension.

    A number without a unit is refused in text, because GB and GiB differ by 7 %; a Python number
    is taken to be in the base unit already. Raises :class:`InputError` naming an accepted form.
    """
    if not isinstance(text, str):
        value = float(text)
    else:
        match = _PATTERN.fullmatch(text)
        unit = (match.group(2) or "") if match else ""
        scale = _SCALES[dimension].get(unit)
        if match is None or scale is None:
            known = ", ".join(u for u in _SCALES[dimension] if not u.startswith(("K", "P", "µ")) or "i" in u)
            raise InputError(
                f"{text!r} is not a quantity in {dimension}: write a number and a unit, such as "
                f"{_EXAMPLE[dimension]!r} (units: {known})"
            )
        value = float(match.group(1).replace("_", "")) * scale
    if not math.isfinite(value):
        raise InputError(f"{text!r} is not a finite quantity in {dimension}")
    return value


def format_bytes(value: float, *, binary: bool = True) -> str:
    """Format bytes in GiB (or GB): ``17179869184`` gives ``"16 GiB"``."""
    scales = [("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)]
    if not binary:
        scales = [("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)]
    return _format(value, [*scales, ("B", 1)])


def format_rate(value: float, dimension: Dimension) -> str:
    """Format a rate with a decimal prefix: ``1.29e10`` bytes/s gives ``"12.9 GB/s"``."""
    unit = "B/s" if dimension == "bytes/s" else dimension
    return _format(value, [(f"{p}{unit}", _DECIMAL[p]) for p in ("P", "T", "G", "M", "k", "")])


def format_seconds(value: float) -> str:
    """Format a duration: ``"4.2 ms"``, ``"12.5 s"``, ``"3 min 20 s"``, ``"2 h 05 min"``."""
    if value >= 3599.5:
        minutes = round(value / 60)
        return f"{minutes // 60} h {minutes % 60:02d} min"
    if value >= 120:
        seconds = round(value)
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return _format(value, [("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)]) if value else "0 s"


def _format(value: float, scales: list[tuple[str, float]]) -> str:
    for unit, factor in scales:
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.4g} {unit}"
    unit, factor = scales[-1]
    return f"{value / factor:.3g} {unit}"
