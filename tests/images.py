"""Images made for tests, and what they hold."""

from pathlib import Path

import torch
from torch import Tensor

from runtime.disk import DiskFile, DiskPool
from runtime.image import Image, open_image
from runtime.layout import GROUP_SIZE, UnitLayout
from runtime.quantization import Quantized4bitLinear
from runtime.tiers import host_buffer, round_up

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def made(model: Path | str, directory: Path, *, dtype: torch.dtype = torch.float32, compressed: bool = False) -> Image:
    """The image of a checkpoint's folder, or of a dummy, below a directory."""
    return open_image(str(model), directory=directory, dtype=dtype, compressed=compressed)


def left(directory: Path) -> list[str]:
    """What lies in the folder of images, the memory of hashes aside."""
    return sorted(path.name for path in (directory / "models").iterdir() if path.name != "hashes.json")


def read_unit(image: Image, name: str) -> dict[str, Tensor | Quantized4bitLinear]:
    """The tensors of a unit (``"table"``, ``"layers.0"``), read from the image."""
    unit = dict(image.layout.units)[name]
    buffer = host_buffer(round_up(unit.nbytes))
    with DiskFile(image.path) as file, DiskPool() as pool:
        pool.read(file, image.layout.offsets[name], buffer).wait()
    return _tensors_of(unit, buffer)


def _tensors_of(unit: UnitLayout, buffer: Tensor) -> dict[str, Tensor | Quantized4bitLinear]:
    """Views of a unit's flat bytes (uint8, on any device) by name; a compressed weight's two fields become one."""
    views = {field.name: buffer[field.offset : field.stop].view(field.dtype).view(field.shape) for field in unit.fields}
    found: dict[str, Tensor | Quantized4bitLinear] = {}
    for field in unit.fields:
        name, _, part = field.name.partition(":")
        if not part:
            found[name] = views[name]
        elif part == "packed":
            found[name] = Quantized4bitLinear(
                packed=views[field.name],
                scales_and_zeros=views[f"{name}:scales"],
                out_features=field.rows,
                group_size=GROUP_SIZE,
            )
    return found
