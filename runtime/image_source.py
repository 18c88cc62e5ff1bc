"""What an image can be made of: a checkpoint, or random values for a config."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime import content, conversion, dummy
from runtime.architecture import Architecture
from runtime.checkpoint import Checkpoint
from runtime.content import Progress
from runtime.conversion import ImageWriter
from runtime.families import architecture
from runtime.layout import GROUP_SIZE, ImageLayout, image_layout

VERSION = 1
"""To be raised when the same weights come to be written as other bytes though the layout is the same."""


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """Where an image's values come from.

    ``origin`` says it to people. ``identity`` (JSON-ready) is all that the values depend on besides the
    config. ``write`` writes them all.
    """

    origin: str
    name: str
    label: str
    config: dict[str, Any]
    identity: dict[str, object]
    architecture: Architecture
    layout: ImageLayout
    tokenizer_folder: Path | None
    write: Callable[[ImageWriter], None]

    @property
    def dtype(self) -> str:
        """The image's type, as torch calls it."""
        return str(self.layout.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that change with any byte of the weights, with the config and the image's form."""
        form = [self.dtype, self.layout.compressed, GROUP_SIZE, VERSION, _described(self.layout)]
        text = json.dumps([self.identity, self.config, form], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def folder_name(self) -> str:
        """``NAME-DTYPE[-4bit]-KEY``, which the key makes unique and the rest readable."""
        label = re.sub(r"[^\w.-]", "-", self.label)[-80:].lstrip(".-")
        return f"{label}-{self.dtype}{'-4bit' if self.layout.compressed else ''}-{self.key}"


def from_checkpoint(
    checkpoint: Checkpoint, *, dtype: torch.dtype, compressed: bool, memory: Path, progress: Progress | None = None
) -> ImageSource:
    """A checkpoint, which must stay open until the image is written, and whose files must stay as they are.

    ``memory`` is where :func:`runtime.content.hashes` remembers. Opening the checkpoint has checked its tensors.
    """
    found = architecture(checkpoint.config, name=checkpoint.name, where=str(checkpoint.folder / "config.json"))
    layout = image_layout(found, dtype=dtype, compressed=compressed)
    marks = {path: content.mark(path) for path in checkpoint.files}
    digests = content.hashes(checkpoint.files, memory=memory, progress=progress)

    def write(writer: ImageWriter) -> None:
        conversion.convert(checkpoint, found, layout, writer)
        for path, before in marks.items():
            content.check_unchanged(path, before)

    return ImageSource(
        origin=str(checkpoint.folder.absolute()),
        name=checkpoint.name,
        label=checkpoint.name,
        config=checkpoint.config,
        identity={path.name: digest for path, digest in digests.items()},
        architecture=found,
        layout=layout,
        tokenizer_folder=checkpoint.tokenizer_folder,
        write=write,
    )


def from_config(model: str, *, dtype: torch.dtype, compressed: bool) -> ImageSource:
    """Random values for ``dummy:NAME`` or ``dummy:PATH``; see :mod:`runtime.dummy`."""
    name, config = dummy.dummy_config(model)
    found = architecture(config, name=name, where=f"model {model!r}")
    layout = image_layout(found, dtype=dtype, compressed=compressed)
    return ImageSource(
        origin=model,
        name=name,
        label=f"dummy-{name}",
        config=config,
        identity={"dummy": dummy.VERSION, "seed": dummy.SEED},
        architecture=found,
        layout=layout,
        tokenizer_folder=None,
        write=lambda writer: dummy.write_dummy(found, layout, writer),
    )


def _described(layout: ImageLayout) -> list[object]:
    """Where everything lies, for the key: an image that is laid out otherwise is another image."""
    return [
        [name, layout.offsets[name], [[f.name, f.offset, list(f.shape), str(f.dtype)] for f in unit.fields]]
        for name, unit in layout.units
    ]
