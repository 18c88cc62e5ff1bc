"""The rotary angles of a config, as v4 wrote it (``rope_theta``, ``rope_scaling``) or v5 (``rope_parameters``).

Formulas are those of transformers' ``modeling_rope_utils``, in the same precision, so that angles are equal to the bit.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from costmodel.errors import InputError
from runtime.rotary import Rotary

Parameters = Mapping[str, Any]

DEFAULT_THETA = 10_000.0


def read_rotary(
    config: Mapping[str, Any],
    *,
    head_dim: int,
    max_positions: int | None,
    where: str,
    theta: str = "rope_theta",
    share: str = "partial_rotary_factor",
    default_share: float = 1.0,
) -> Rotary:
    """The angles of a config whose older form calls base and share of the head ``theta`` and ``share``.

    Raises :class:`InputError` for a kind of scaling that is not known, and for numbers that make no sense.
    """
    found = _parameters(config, where)
    found.setdefault("rope_theta", config.get(theta) or DEFAULT_THETA)
    found.setdefault("partial_rotary_factor", config.get(share, default_share))
    kind = found.get("rope_type") or found.get("type") or "default"
    if kind not in _SCALINGS:
        known = ", ".join(sorted(_SCALINGS))
        raise InputError(f"{where}: rope_type is {kind!r}: it must be one of {known}")
    base, part = (_number(found, name, where) for name in ("rope_theta", "partial_rotary_factor"))
    rotary_dim = int(head_dim * part)
    if not 2 <= rotary_dim <= head_dim or rotary_dim % 2:
        raise InputError(
            f"{where}: partial_rotary_factor is {part}: it must make an even number of a head's {head_dim} values"
        )
    if config.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    if not found.get("original_max_position_embeddings"):
        found["original_max_position_embeddings"] = max_positions
    found["ratio"] = (max_positions or 0) / (found["original_max_position_embeddings"] or 1)
    frequencies, factor = _SCALINGS[kind](found, base, rotary_dim, where)
    return Rotary(inverse_frequencies=tuple(frequencies.tolist()), factor=factor)


def plain_rotary(rotary_dim: int) -> Rotary:
    """Angles of the first ``rotary_dim`` values of a head, with the usual base and no scaling."""
    return Rotary(inverse_frequencies=tuple(_unscaled(DEFAULT_THETA, rotary_dim).tolist()))


def _parameters(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
            raise InputError(f"{where}: field {name!r} is {given!r}: it must be one set of numbers for all layers")
        return dict(given)
    return {}


def _number(found: Parameters, name: str, where: str) -> float:
    value = found.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise InputError(f"{where}: {name} of the rotary positions is {value!r}: it must be a number above 0")
    return float(value)


def _unscaled(base: float, rotary_dim: int) -> Tensor:
    inverse: Tensor = 1.0 / base ** (torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim)
    return inverse


def _default(found: Parameters, base: float, rotary_dim: int, where: str) -> tuple[Tensor, float]:
    """Also "dynamic", which scales nothing up to max_position_embeddings, and more tokens are refused elsewhere."""
    return _unscaled(base, rotary_dim), 1.0


def _linear(found: Parameters, base: float, rotary_dim: int, where: str) -> tuple[Tensor, float]:
    return _unscaled(base, rotary_dim) / _number(found, "factor", where), 1.0


def _llama3(found: Parameters, base: float, rotary_dim: int, where: str) -> tuple[Tensor, float]:
    """Long waves are divided by the factor, short ones are not, those between are interpolated."""
    factor, low, high, context = (
        _number(found, name, where)
        for name in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    unscaled = _unscaled(base, rotary_dim)
    waves = 2 * math.pi / unscaled
    scaled = torch.where(waves > context / low, unscaled / factor, unscaled)
    share = (context / waves - low) / (high - low)
    between = (1 - share) * scaled / factor + share * scaled
    is_between = (waves >= context / high) & (waves <= context / low)
    return torch.where(is_between, between, scaled), 1.0


def _yarn(found: Parameters, base: float, rotary_dim: int, where: str) -> tuple[Tensor, float]:
    """Pairs that turn often in the original context are kept, those that turn rarely are divided by the factor."""
    context = _number(found, "original_max_position_embeddings", where)
    factor = found["ratio"] if found.get("factor") is None else _number(found, "factor", where)

    def pair(rotations: float) -> float:
        return rotary_dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair(found.get("beta_fast") or 32), pair(found.get("beta_slow") or 1)
    if found.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    ramp = (torch.arange(rotary_dim // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept = 1 - ramp.clamp(0, 1)
    powers = base ** (torch.arange(0, rotary_dim, 2).float() / rotary_dim)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept, _yarn_factor(found, factor)


def _yarn_factor(found: Parameters, factor: float) -> float:
    if found.get("attention_factor") is not None:
        return float(found["attention_factor"])

    def magnitude(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if found.get("mscale") and found.get("mscale_all_dim"):
        return magnitude(found["mscale"]) / magnitude(found["mscale_all_dim"])
    return magnitude(1)


_SCALINGS: Mapping[str, Callable[[Parameters, float, int, str], tuple[Tensor, float]]] = {
    "default": _default,
    "dynamic": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
