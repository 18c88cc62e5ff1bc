"""Files of weights: single tensors, or some of their rows, read from ``.safetensors`` and from PyTorch's ``.bin``.

Tensors come as they are stored. Every defect of a file is one :class:`CheckpointError` that names the file,
the tensor, what was expected and what to do about it.
"""

import contextlib
import json
import logging
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from costmodel import units
from costmodel.errors import InputError
from runtime.disk import DiskError, DiskFile, DiskPool
from runtime.layout import values_of
from runtime.tiers import ALIGNMENT, host_buffer

logger = logging.getLogger(__name__)

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The names of types in a safetensors header; a tensor of another type is refused when it is asked for."""

LARGEST_HEADER_BYTES = 100_000_000
"""The format's own limit."""

RENEW_BYTES = 64 * 2**20
"""Read through a mapping before it is renewed; mapping a file of gigabytes takes milliseconds."""

_AGAIN = "download or copy the file again"
_LFS = b"version https://git-lfs"
_ZIP = b"PK\x03\x04"


class CheckpointError(InputError):
    """A checkpoint that is incomplete, damaged or not what its config says."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor of a safetensors file: its type's name, its shape, its bytes ``start`` to ``stop`` of the file."""

    kind: str
    shape: tuple[int, ...]
    start: int
    stop: int


class WeightFile(ABC):
    """An open file of named tensors; close it when done."""

    path: Path

    @property
    @abstractmethod
    def keys(self) -> frozenset[str]:
        """The names of its tensors."""

    @abstractmethod
    def shape(self, key: str) -> tuple[int, ...]:
        """The tensor's shape."""

    @abstractmethod
    def dtype(self, key: str) -> torch.dtype:
        """The type that the tensor is stored in."""

    @abstractmethod
    def read(self, key: str) -> Tensor:
        """The whole tensor, as stored."""

    @abstractmethod
    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the tensor's first dimension, as stored."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file; tensors that were read stay valid."""


class SafetensorsFile(WeightFile):
    """Reads past the page cache, and only the bytes asked for: no mapping whose pages stay in memory."""

    def __init__(self, path: Path, pool: DiskPool) -> None:
        self.path, self._pool = path, pool
        self._stored = _safetensors_header(path)
        try:
            self._file = DiskFile(path)
        except DiskError as error:
            raise CheckpointError(f"{error}: check the file's permissions") from None

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._stored)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._stored[key].shape

    def dtype(self, key: str) -> torch.dtype:
        kind = self._stored[key].kind
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self.path}: tensor {key!r} is of type {kind}: this reader knows {', '.join(DTYPES)}; "
                "use a checkpoint in float32, float16 or bfloat16"
            )
        return DTYPES[kind]

    def read(self, key: str) -> Tensor:
        stored = self._stored[key]
        return self._read(key, stored.start, stored.shape)

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        stored = self._stored[key]
        row_bytes = (stored.stop - stored.start) // stored.shape[0]
        return self._read(key, stored.start + start * row_bytes, (stop - start, *stored.shape[1:]))

    def _read(self, key: str, offset: int, shape: tuple[int, ...]) -> Tensor:
        dtype = self.dtype(key)
        nbytes = values_of(shape) * dtype.itemsize
        # Direct I/O wants memory as far from a page as the file is; a tensor wants it at a multiple of its values.
        shift = offset % ALIGNMENT if offset % dtype.itemsize == 0 else 0
        buffer = host_buffer(shift + nbytes)[shift:]
        self._pool.read(self._file, offset, buffer).wait()
        return buffer.view(dtype).view(shape)

    def close(self) -> None:
        self._file.close()


class BinFile(WeightFile):
    """A pickle that may hold nothing but tensors, mapped into memory (one of before torch 1.6: read whole).

    The pages of a mapping that were read count as this process's memory: every :data:`RENEW_BYTES` the
    file is mapped anew, and its pages are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tensors, self._is_mapped = _unpickled(path)
        self._read_bytes = 0

    @property
    def keys(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensors[key].dtype

    def read(self, key: str) -> Tensor:
        return self._counted(self._tensors[key])

    def read_rows(self, key: str, start: int, stop: int) -> Tensor:
        return self._counted(self._tensors[key][start:stop])

    def _counted(self, tensor: Tensor) -> Tensor:
        """The tensor, in memory of its own if it was only mapped."""
        if not self._is_mapped:
            return tensor
        tensor = tensor.clone()
        self._read_bytes += tensor.nbytes
        if self._read_bytes >= RENEW_BYTES:
            self.close()
            self._tensors, _ = _unpickled(self.path)
            self._read_bytes = 0
        return tensor

    def close(self) -> None:
        self._tensors = {}
        if self._is_mapped and hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self.path.open("rb") as file:  # it may be gone by now
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _safetensors_header(path: Path) -> dict[str, Stored]:
    """What the file says it holds, checked against its length: 8 bytes of length, JSON, then the tensors' bytes."""
    try:
        with path.open("rb") as file:
            start, file_bytes = file.read(8), path.stat().st_size
            _refuse_pointer(path, start)
            header_bytes = int.from_bytes(start, "little")
            if len(start) < 8 or header_bytes > min(LARGEST_HEADER_BYTES, file_bytes - 8):
                raise CheckpointError(
                    f"{path}: the file of {file_bytes} bytes does not begin with a safetensors header that fits it: "
                    f"it is cut off or damaged; {_AGAIN}"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        entries = {key: entry for key, entry in header.items() if key != "__metadata__"}
        stored = {key: _stored(entry, start=8 + header_bytes) for key, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: its safetensors header is damaged; {_AGAIN}") from None
    for key, entry in stored.items():
        _check_stored(path, key, entry, file_bytes)
    return stored


def _stored(entry: Mapping[str, Any], *, start: int) -> Stored:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (first, last, *shape)):
        raise ValueError(f"{entry} holds something other than counts")
    return Stored(kind=str(entry["dtype"]), shape=shape, start=start + first, stop=start + last)


def _check_stored(path: Path, key: str, entry: Stored, file_bytes: int) -> None:
    if entry.stop > file_bytes:
        raise CheckpointError(
            f"{path}: tensor {key!r} ends at byte {entry.stop}, but the file has only {file_bytes} bytes "
            f"({units.format_bytes(entry.stop - file_bytes)} missing): it is cut off; {_AGAIN}"
        )
    if entry.kind in DTYPES:
        expected = values_of(entry.shape) * DTYPES[entry.kind].itemsize
        if entry.stop - entry.start != expected:
            raise CheckpointError(
                f"{path}: tensor {key!r} has {entry.stop - entry.start} bytes: {entry.kind} {list(entry.shape)} "
                f"takes {expected}; the header is damaged, {_AGAIN}"
            )


def _unpickled(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a pickle, and whether they are mapped from the file rather than in memory."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    _refuse_pointer(path, start)
    is_zip = start.startswith(_ZIP)  # the form since torch 1.6
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) and "GLOBAL" in str(error).upper():
            logger.debug("%s: %s", path, error)
            raise CheckpointError(
                f"{path}: holds Python objects other than tensors, which could run any code and are never loaded: "
                "use a checkpoint in safetensors"
            ) from None
        raise CheckpointError(f"{path}: is no PyTorch checkpoint, or a damaged one; {_AGAIN}") from None
    except Exception as error:  # torch raises nearly anything for a damaged file
        logger.debug("%s: %s", path, error)
        raise CheckpointError(
            f"{path}: cannot be read as a PyTorch checkpoint: it is cut off or damaged; {_AGAIN}"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}: tensors by name are expected")
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}, is_zip


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start and _LFS.startswith(start[: len(_LFS)]):
        raise CheckpointError(f"{path}: is a pointer of Git LFS, not the weights: run `git lfs pull` in its folder")
