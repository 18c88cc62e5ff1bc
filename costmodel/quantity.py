"""A number with its origin: what was measured or stated, in which unit, how far it scatters and who says so.

In a file the number stands in the base unit that its key names, or as text with a unit (``"320GB/s"``): the
annotated types at the end, one a dimension, read both.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BeforeValidator

from costmodel import records, units
from costmodel.errors import InputError

AS_GIVEN = "as given"
"""The date of a number that somebody set for one run."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where numbers come from: a title, a date (YYYY-MM or YYYY-MM-DD) and, if public, a URL."""

    __pydantic_config__ = records.STRICT

    title: str
    date: str
    url: str | None = None

    def __post_init__(self) -> None:
        if self.date != AS_GIVEN and not re.match(r"\d{4}-\d{2}(-\d{2})?", self.date):
            raise InputError(f"date is {self.date!r}: YYYY-MM or YYYY-MM-DD is expected")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number: the nominal ``value`` times the ``efficiency`` that the software reaches.

    ``source`` and ``efficiency_source`` are keys of ``Hardware.sources``; ``spread`` is the relative
    interquartile range of a measured value.
    """

    __pydantic_config__ = records.STRICT

    value: float
    source: str
    efficiency: float = 1.0
    efficiency_source: str | None = None
    spread: float | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value) or self.value < 0:
            raise InputError(f"value is {self.value}: it must be finite and at least 0")
        if not 0 < self.efficiency <= 1:
            raise InputError(f"efficiency is {self.efficiency}: it must lie in (0, 1]")
        if self.efficiency != 1 and self.efficiency_source is None:
            raise InputError(f"efficiency is {self.efficiency} but field 'efficiency_source' is missing")
        if self.spread is not None and self.spread < 0:
            raise InputError(f"spread is {self.spread}: it must be at least 0")

    @property
    def effective(self) -> float:
        """The value to plan with, in the unit that the owning field names."""
        return self.value * self.efficiency


@dataclass(frozen=True, kw_only=True)
class Rate(Quantity):
    """A rate that may depend on the rows of a matrix product: ``curve`` is ((rows, rate), …).

    Without a curve the rate is constant. Between knots the rate is linear in log(rows), outside them
    it is that of the nearest knot. ``value`` stays the nominal peak, for comparison.
    """

    __pydantic_config__ = records.STRICT

    curve: tuple[tuple[float, float], ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curve is None:
            return
        if not self.curve or any(rows <= 0 or rate <= 0 for rows, rate in self.curve):
            raise InputError("curve needs at least one pair of rows > 0 and rate > 0")
        if any(a[0] >= b[0] for a, b in pairwise(self.curve)):
            raise InputError("curve needs strictly increasing rows")

    def at(self, rows: float) -> float:
        """The effective rate of a product with this many rows."""
        if self.curve is None:
            return self.effective
        knots = self.curve
        if rows <= knots[0][0]:
            return knots[0][1] * self.efficiency
        for (left, low), (right, high) in pairwise(knots):
            if rows <= right:
                share = math.log(rows / left) / math.log(right / left)
                return (low + share * (high - low)) * self.efficiency
        return knots[-1][1] * self.efficiency

    def best_between(self, low: float, high: float) -> float:
        """The highest effective rate over a range of rows; the search's bounds rest on it."""
        inside = [rate * self.efficiency for rows, rate in self.curve or () if low < rows < high]
        return max(self.at(low), self.at(high), *inside)


def _has_text_rate(knot: object) -> bool:
    return isinstance(knot, list) and len(knot) == 2 and isinstance(knot[1], str)


def _quantity(dimension: units.Dimension) -> BeforeValidator:
    """A validator that accepts text with units for ``value`` (and ``curve``) of a quantity."""

    def convert(data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        converted = dict(data)
        if isinstance(converted.get("value"), bool):  # pydantic would take it for 0 or 1
            raise InputError(f"value is {converted['value']}: it must be a number or text with a unit")
        if isinstance(converted.get("value"), str):
            converted["value"] = units.parse(converted["value"], dimension)
        if isinstance(converted.get("curve"), list):
            converted["curve"] = [
                [knot[0], units.parse(knot[1], dimension)] if _has_text_rate(knot) else knot
                for knot in converted["curve"]
            ]
        return converted

    return BeforeValidator(convert)


Bytes = Annotated[Quantity, _quantity("bytes")]
BytesPerSecond = Annotated[Quantity, _quantity("bytes/s")]
ValuesPerSecond = Annotated[Quantity, _quantity("values/s")]
Seconds = Annotated[Quantity, _quantity("s")]
FlopsPerSecond = Annotated[Rate, _quantity("FLOP/s")]
