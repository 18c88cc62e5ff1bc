"""How a number of a machine moves when it is uncertain: by an offset of its logarithm, or a share by a difference.

The offset is ln(value / the file's value), so that factors are symmetric and no rate turns negative; a share of hidden
work may be zero and moves by the difference itself.
"""

import dataclasses
import math
from functools import reduce

from costmodel.hardware import Hardware
from costmodel.quantity import Quantity

SHARE = "engine.unhidden_share"

IQR_DEVIATIONS = 1.349
"""The interquartile range of a normal distribution in its standard deviations."""


def moved(hardware: Hardware, path: str, offset: float) -> Hardware:
    """The machine with the quantity at ``path`` moved by an offset, a curve as a whole, a share within [0, 1].

    A nominal rate keeps its ``value`` and changes its efficiency, at most to 1. Seconds and measured rates have no
    nominal value above them: the value itself moves.
    """
    quantity = quantity_at(hardware, path)
    if path == SHARE:
        return hardware.raised(path, min(max(quantity.effective + offset, 0.0), 1.0) - quantity.effective)
    if not has_ceiling(path, quantity):
        return hardware.raised(path, quantity.effective * math.expm1(offset))
    efficiency = min(1.0, quantity.efficiency * math.exp(offset))
    source = quantity.efficiency_source or quantity.source
    return hardware.changed(path, lambda old: dataclasses.replace(old, efficiency=efficiency, efficiency_source=source))


def quantity_at(hardware: Hardware, path: str) -> Quantity:
    """The quantity at a dotted path that the machine is known to state."""
    found = reduce(getattr, path.split("."), hardware)
    assert isinstance(found, Quantity)
    return found


def has_ceiling(path: str, quantity: Quantity) -> bool:
    """True for a rate whose value is the most that there can be: a datasheet's, or one that somebody gave."""
    is_rate = path.endswith("_per_s")
    return is_rate and (quantity.spread is None or quantity.efficiency_source is not None)


def deviation(path: str, quantity: Quantity) -> float:
    """Standard deviation of the offset that the file's spread (a relative interquartile range) means; 0 without one."""
    if quantity.effective <= 0:
        return 0.0
    relative = (quantity.spread or 0.0) / IQR_DEVIATIONS
    return relative * quantity.effective if path == SHARE else relative
