"""Models without a checkpoint: random weights for a known shape, to measure what needs no sensible text.

A matrix is 0.02 times normal, a norm's weight 1, a bias 0, so that logits are finite. Values repeat with a
period that is prime, so that no two rows of a matrix are equal; which ones a tensor holds depends on its name
only, so that models of the same shape in two types differ by rounding alone.
"""

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from costmodel import model_source
from costmodel.errors import InputError
from runtime import families
from runtime.architecture import Architecture
from runtime.conversion import ImageWriter, image_tensors
from runtime.layout import Field, ImageLayout, values_of

PREFIX = "dummy:"

SEED = 1

VERSION = 1
"""To be raised when the values of dummy models change."""

PERIOD_VALUES = 4_194_301
"""The largest prime below 2**22."""

DEVIATION = 0.02

STEP = DEVIATION / 4.609772
"""Between two 4-bit values: uniform in 0 … 15, their standard deviation is sqrt((16² − 1) / 12)."""


def dummy_config(model: str) -> tuple[str, dict[str, Any]]:
    """Name and config of ``dummy:NAME``, where NAME is whatever :meth:`~costmodel.model.ModelSpec.load` takes.

    Raises :class:`~costmodel.errors.InputError` if there is no such model, or it cannot be run.
    """
    try:
        source = model_source.find(model.removeprefix(PREFIX))
        families.architecture(source.config, name=source.name, where=source.where)
    except InputError as error:
        raise InputError(f"model {model!r}: {error}") from None
    return source.name, copy.deepcopy(source.config)


def write_dummy(architecture: Architecture, layout: ImageLayout, writer: ImageWriter) -> None:
    """Write an image of random weights, at the speed of the disk. Memory: one period of values."""
    values = (torch.randn(PERIOD_VALUES, generator=_generator()) * DEVIATION).to(layout.dtype)
    nibbles = torch.randint(0, 256, (PERIOD_VALUES,), dtype=torch.uint8, generator=_generator())
    for name, unit, tensor, _ in image_tensors(architecture, layout):
        offset = layout.offsets[name]
        for field in (field for field in unit.fields if field.name.partition(":")[0] == tensor.name):
            at = offset + field.offset
            if field.name.endswith(":packed"):
                _put_repeated(writer, at, field, nibbles, name)
            elif field.name.endswith(":scales"):
                writer.put(at, _scales(field), field.dtype)
            elif len(field.shape) > 1:
                _put_repeated(writer, at, field, values, name)
            else:
                constant = 0.0 if field.name.endswith(".bias") else 1.0
                writer.put(at, torch.full(field.shape, constant), field.dtype)


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def _put_repeated(writer: ImageWriter, at: int, field: Field, period: Tensor, unit: str) -> None:
    """Fill a field with the period again and again, from a place in it that depends on the field's name."""
    digest = hashlib.sha256(f"{unit}.{field.name}".encode()).digest()
    start, left = int.from_bytes(digest[:8], "little") % PERIOD_VALUES, values_of(field.shape)
    while left:
        part = period[start : start + left]
        writer.put(at, part, field.dtype)
        at, left, start = at + part.nbytes, left - len(part), 0


def _scales(field: Field) -> Tensor:
    """Scale and zero of every group: a byte's nibbles q are (q − 8) · STEP + STEP / 2, which is 0 on average."""
    pair = torch.tensor((STEP, STEP / 2), dtype=field.dtype)
    return pair.expand(field.shape)
