"""Rotary positions: the first values of each query and key head are turned by an angle that grows with the position.

One kernel for every family: value i of the first half is paired with value i of the second ("half-split").
Checkpoints that pair neighbours are brought into this order when they are loaded (:mod:`runtime.rearrange`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Radians a token for each pair of values, in the order of the pairs; ``factor`` multiplies sines and cosines."""

    inverse_frequencies: tuple[float, ...]
    factor: float = 1.0

    @property
    def rotary_dim(self) -> int:
        """Values of a head that are turned; the others are left as they are."""
        return 2 * len(self.inverse_frequencies)

    def table(self, positions: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Rotation":
        """Sines and cosines (positions, rotary_dim / 2), computed in fp32, of the positions from 0 on."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * torch.tensor(self.inverse_frequencies)
        cosine, sine = (part.mul(self.factor).to(device=device, dtype=dtype) for part in (angles.cos(), angles.sin()))
        return Rotation(cosine=cosine, sine=sine)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotation:
    """Cosines and sines (…, tokens, rotary_dim / 2) of the tokens' angles."""

    cosine: Tensor
    sine: Tensor

    def at(self, positions: Tensor) -> "Rotation":
        """Of the tokens at ``positions`` (…, tokens), which index the first dimension; −1 (padding) counts as 0."""
        rows = positions.clamp(min=0)
        return Rotation(cosine=self.cosine[rows], sine=self.sine[rows])


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn queries or keys (batch, heads, tokens, head dim) by a rotation (batch or 1, tokens, rotary_dim / 2)."""
    half = rotation.cosine.shape[-1]
    cosine, sine = rotation.cosine.unsqueeze(1), rotation.sine.unsqueeze(1)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine, rest), dim=-1)
