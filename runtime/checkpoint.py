"""Checkpoints: the tensors of a Hugging Face model, found by name and read one at a time.

A checkpoint is a folder with a ``config.json`` and weights in safetensors or, where there are none, in
PyTorch's own format; either one file, or several with an index. The whole model is never in memory.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from costmodel import model_source, records, words
from costmodel.errors import InputError
from runtime import families
from runtime.architecture import Architecture, TensorSpec
from runtime.disk import DiskPool
from runtime.hub import download
from runtime.weight_files import BinFile, CheckpointError, SafetensorsFile, WeightFile

__all__ = ["Checkpoint", "CheckpointError", "open_checkpoint", "row_chunks", "tensor_of"]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

CHUNK_BYTES = 32 * 2**20
"""Of a tensor as stored, read and converted at a time: enough for the disk's full rate."""

_FORMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


class Checkpoint:
    """An open checkpoint; use as a context manager, or call :meth:`close`.

    ``name`` is the model's without an organisation, ``folder`` holds its files, ``config`` is the parsed
    ``config.json`` and ``files`` are the files of the weights, an index among them.
    """

    def __init__(self, folder: Path, *, name: str) -> None:
        self.folder, self.name = folder, name
        config = records.read_json(folder / "config.json")
        if not isinstance(config, dict):
            raise CheckpointError(f"{folder / 'config.json'}: a JSON object is expected")
        self.config: dict[str, Any] = config
        self._files: dict[str, WeightFile] = {}
        self._pool = DiskPool()
        try:
            index, names = _weights_in(folder)
            self._home = (
                _weight_map(index, folder) if index is not None else dict.fromkeys(self._open(names[0]).keys, names[0])
            )
            self.files = tuple(folder / name for name in sorted({*names, *self._home.values()}))
            self._check_shards()
        except BaseException:
            self.close()
            raise

    @property
    def keys(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(self._home)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where transformers' ``AutoTokenizer`` finds its files, if there are any."""
        return self.folder if any((self.folder / name).exists() for name in _TOKENIZER_FILES) else None

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._file_of(key).shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """The type that a tensor is stored in."""
        return self._file_of(key).dtype(key)

    def read(self, key: str) -> Tensor:
        """A tensor as stored."""
        return self._file_of(key).read(key)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a tensor's first dimension, as stored."""
        return self._file_of(key).read_rows(key, start, stop)

    def where(self, key: str) -> str:
        """The file of a tensor and the tensor, to open a message with."""
        return f"{self.folder / self._home[key]}: tensor {key!r}"

    def close(self) -> None:
        """Close all files; a second call does nothing."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._pool.close()

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_shards(self) -> None:
        missing = [path.name for path in self.files if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{self.folder}: {', '.join(missing[:3])}{' and more' * (len(missing) > 3)} of the index "
                f"{'are' if len(missing) > 1 else 'is'} missing: the checkpoint is incomplete, download it again"
            )
        for name in sorted(set(self._home.values())):
            if name.endswith(".safetensors"):  # headers are small: a damaged shard is found before any work begins
                self._open(name)

    def _file_of(self, key: str) -> WeightFile:
        if key not in self._home:
            raise CheckpointError(f"{self.folder}: there is no tensor {key!r} among its {len(self._home)}")
        file = self._open(self._home[key])
        if key not in file.keys:
            raise CheckpointError(f"{file.path}: tensor {key!r} is missing, though the index says that it is here")
        return file

    def _open(self, name: str) -> WeightFile:
        if name not in self._files:
            path = self.folder / name
            if name.endswith(".safetensors"):
                self._files[name] = SafetensorsFile(path, self._pool)
            else:
                for file in self._files.values():  # one shard at a time: its pages count as this process's memory
                    file.close()
                self._files.clear()
                self._files[name] = BinFile(path)
        return self._files[name]


def open_checkpoint(model: str | os.PathLike[str]) -> Checkpoint:
    """Open a local folder, or a model of the Hugging Face hub (downloaded unless it is cached), if it can be run.

    ``model`` is the folder, an id of the hub, or a name of the catalogue, which stands for the first of its ids.
    Every tensor that the config asks for is there, in its shape, when this returns; none has been read. Raises
    :class:`CheckpointError` for a checkpoint that is incomplete, damaged or not what its config says, and
    :class:`~costmodel.errors.InputError` where there is none, or one of a family that cannot be run.
    """
    checkpoint = _opened(os.fspath(model))
    try:
        found = families.architecture(
            checkpoint.config, name=checkpoint.name, where=str(checkpoint.folder / "config.json")
        )
        for spec, layer in found.tensors():
            check_tensor(checkpoint, found, spec, layer)
    except BaseException:
        checkpoint.close()
        raise
    return checkpoint


def _opened(text: str) -> Checkpoint:
    try:
        folder = Path(text).expanduser()
        is_folder, exists = text != "" and folder.is_dir(), text != "" and folder.exists()
    except (OSError, ValueError, RuntimeError):  # no path at all, or of a user who does not exist
        is_folder = exists = False
    if is_folder:
        return Checkpoint(folder, name=folder.resolve().name or "model")
    if exists:
        raise InputError(f"{text}: is a file: give the folder that holds config.json and the weights")
    known = model_source.in_catalog(text)
    hub_id = text if known is None or known.hub_id is None else known.hub_id
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", hub_id):
        raise InputError(f"model {text!r}: there is no such folder, and it is no name of a model on the hub either")
    return Checkpoint(download(hub_id), name=hub_id.rpartition("/")[2])


def find_key(checkpoint: Checkpoint, architecture: Architecture, spec: TensorSpec, layer: int | None) -> str:
    """The key of a tensor in a checkpoint, whose keys may have the architecture's prefixes or not."""
    source = spec.source.format(layer=layer)
    forms = [_other_form(source, prefix) for prefix in architecture.prefixes]
    forms += [old + source.removeprefix(new) for new, old in architecture.renamed if source.startswith(new)]
    for key in (source, *forms):
        if key in checkpoint.keys:
            return key
    others = words.counted(len(checkpoint.keys), "other")
    raise CheckpointError(
        f"{checkpoint.folder}: tensor {source!r} is missing (found: {others}): the weights "
        f"are incomplete, or of another model than config.json, which says {architecture.spec.family}"
    )


def check_tensor(checkpoint: Checkpoint, architecture: Architecture, spec: TensorSpec, layer: int | None) -> str:
    """The key of a tensor that is there, in a type that can be converted and, where it is known, its shape."""
    key = find_key(checkpoint, architecture, spec, layer)
    dtype, shape = checkpoint.dtype(key), checkpoint.shape(key)
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{checkpoint.where(key)} is {_name(dtype)}: float64, float32, float16 or bfloat16 is expected; "
            "use a checkpoint that is not quantised"
        )
    expected = spec.stored or (spec.shape if spec.take is None else None)
    if expected is not None:
        _check_shape(checkpoint, key, shape, expected)
    return key


def tensor_of(checkpoint: Checkpoint, architecture: Architecture, spec: TensorSpec, layer: int | None) -> Tensor:
    """A model's tensor in the type that it is stored in; ``layer`` is None outside the layers.

    Raises :class:`CheckpointError` where it is missing, not floating point or of another shape.
    """
    key = check_tensor(checkpoint, architecture, spec, layer)
    tensor = checkpoint.read(key)
    if spec.take is not None:
        tensor = spec.take(tensor)
        _check_shape(checkpoint, key, tuple(tensor.shape), spec.shape)
    return tensor


def row_chunks(
    checkpoint: Checkpoint, architecture: Architecture, spec: TensorSpec, layer: int | None, *, multiple: int = 1
) -> Iterator[Tensor]:
    """The tensor of :func:`tensor_of` by rows, about :data:`CHUNK_BYTES` at a time.

    Every chunk but the last has a multiple of ``multiple`` rows. Only a tensor that ``take`` makes is
    ever in memory as a whole.
    """
    key = check_tensor(checkpoint, architecture, spec, layer)
    rows = spec.shape[0]
    row_bytes = max(1, checkpoint.dtype(key).itemsize * torch.Size(spec.shape[1:]).numel())
    step = max(1, CHUNK_BYTES // (row_bytes * multiple)) * multiple
    whole = None if spec.take is None else tensor_of(checkpoint, architecture, spec, layer)
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        yield checkpoint.read_rows(key, start, stop) if whole is None else whole[start:stop]


def _weights_in(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The index, or None, and the file that decides: safetensors before ``.bin``, one file before several."""
    for stem, suffix in _FORMS:
        single, index = folder / f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
        if single.is_file():
            return None, (single.name,)
        if index.is_file():
            return index, (index.name,)
    shards = sorted(path.name for stem, suffix in _FORMS for path in folder.glob(f"{stem}-*{suffix}"))
    if shards:
        raise CheckpointError(
            f"{folder}: {shards[0]} is one of several files, but their index (such as model.safetensors.index.json) "
            "is missing: download it as well"
        )
    raise CheckpointError(
        f"{folder}: there are no weights: model.safetensors or pytorch_model.bin (or several such files and their "
        "index) is expected"
    )


def _weight_map(index: Path, folder: Path) -> dict[str, str]:
    """The file of every tensor, as the index has it: a name in the same folder, never a path out of it."""
    data = records.read_json(index)
    found = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(found, dict) or not found:
        raise CheckpointError(f"{index}: field 'weight_map', which names the file of every tensor, is missing or empty")
    suffix = ".safetensors" if ".safetensors" in index.name else ".bin"
    for key, name in found.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(suffix):
            raise CheckpointError(f"{index}: tensor {key!r} is in {name!r}: the name of a {suffix} file is expected")
    return dict(found)


def _other_form(source: str, prefix: str) -> str:
    return source.removeprefix(prefix) if source.startswith(prefix) else prefix + source


def _check_shape(checkpoint: Checkpoint, key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(
            f"{checkpoint.where(key)} has shape {list(shape)}: by config.json {list(expected)} is expected; "
            "config.json and the weights are not of one model"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
