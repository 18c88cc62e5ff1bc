"""Images: a model in one file as the tiers want it, made from a checkpoint once and then used as it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from costmodel.errors import InputError
from runtime import dummy, image_source, image_store
from runtime.architecture import Architecture
from runtime.checkpoint import open_checkpoint
from runtime.content import Progress
from runtime.image_source import ImageSource
from runtime.layout import ImageLayout


@dataclass(frozen=True, kw_only=True)
class Image:
    """A model on disk: ``path`` is the image file, ``config`` the model's ``config.json``.

    ``tokenizer_folder`` is where transformers' ``AutoTokenizer`` can read; None if there is no tokenizer.
    """

    path: Path
    architecture: Architecture
    layout: ImageLayout
    config: dict[str, Any]
    name: str
    tokenizer_folder: Path | None


def open_image(
    model: str, *, directory: Path, dtype: torch.dtype, compressed: bool, progress: Progress | None = None
) -> Image:
    """The image of a model in ``dtype``, which is made under ``directory`` unless it is there already.

    ``model`` is the folder of a checkpoint, a name on the Hugging Face hub, ``dummy:NAME`` or
    ``dummy:PATH`` (see :mod:`runtime.dummy`). ``compressed`` keeps the layers' matrices in 4 bits.
    ``progress(what, done, total)`` is called with bytes: ``"hashing"`` for weight files that are new,
    ``"converting"`` while the image is written, ``"waiting"`` once if another process is making it.

    Raises :class:`~costmodel.errors.InputError` for a model that does not exist, is damaged or of a family
    that cannot be run, and :class:`~runtime.disk.DiskError` where the image does not fit the disk.
    """
    models = directory / image_store.MODELS
    try:
        models.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{models}: cannot be made: {error.strerror}") from None
    if model.startswith(dummy.PREFIX):
        source = image_source.from_config(model, dtype=dtype, compressed=compressed)
        return _image(source, image_store.stored(source, models, progress))
    with open_checkpoint(model) as checkpoint:
        source = image_source.from_checkpoint(
            checkpoint, dtype=dtype, compressed=compressed, memory=models / "hashes.json", progress=progress
        )
        return _image(source, image_store.stored(source, models, progress))


def _image(source: ImageSource, path: Path) -> Image:
    return Image(
        path=path,
        architecture=source.architecture,
        layout=source.layout,
        config=source.config,
        name=source.name,
        tokenizer_folder=source.tokenizer_folder,
    )
