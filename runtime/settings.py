"""What the arguments of :class:`runtime.llm.LLM` mean: type, budgets, policy, directory; each is checked here."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from costmodel import units
from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.policy import Policy
from runtime import dummy, environment
from runtime.checkpoint import open_checkpoint

AUTO = "auto"
"""The policy that is searched."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

GivenPolicy = Policy | Mapping[str, Any] | str | os.PathLike[str]


def read_policy(given: object) -> Policy | None:
    """What a :data:`GivenPolicy` is: the policy itself, of a file or of its content; ``None`` for :data:`AUTO`."""
    if isinstance(given, Policy):
        return given
    if isinstance(given, Mapping):
        return Policy.from_dict(given, where="policy")
    if not isinstance(given, str | os.PathLike):
        kind = type(given).__name__
        raise InputError(f"policy is of type {kind}: a Policy, its file, the content of one or {AUTO!r} is expected")
    return None if os.fspath(given) == AUTO else Policy.from_file(given)


def read_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type to compute in: as asked for, else fp16 on CUDA, bf16 on CPUs that multiply it, fp32 on others."""
    if name is None:
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if environment.multiplies_bf16() else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}: one of {', '.join(DTYPES)} is expected")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name by which :func:`read_dtype` knows a type."""
    return str(dtype).removeprefix("torch.")


def read_budget(name: str, value: str | float | None) -> float | None:
    """Bytes of a budget such as ``"14GiB"``; ``None`` where none is given."""
    found = units.parse(value, "bytes") if isinstance(value, str) else value
    if found is not None and (found < 0 or (found == 0 and name == "gpu_memory")):
        raise InputError(f"{name} is {value}: it must be {'greater than' if name == 'gpu_memory' else 'at least'} 0")
    return found


def offload_directory(given: str | os.PathLike[str] | None) -> Path:
    """The directory of the third tier, which must exist and be writable."""
    if given is None:
        directory = Path(tempfile.gettempdir()) / f"tierwise-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory
    directory = Path(given)
    if not directory.is_dir():
        reason = "that is a file" if directory.exists() else "there is no such directory"
        raise InputError(f"offload_dir is {directory}: {reason}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"offload_dir is {directory}: nothing can be written there")
    return directory


def describe_model(model: str) -> tuple[str, dict[str, Any], Path | None]:
    """Name, config and tokenizer folder of a model, without reading its weights."""
    if model.startswith(dummy.PREFIX):
        name, config = dummy.dummy_config(model)
        return name, config, None
    with open_checkpoint(model) as checkpoint:
        return checkpoint.name, checkpoint.config, checkpoint.folder


def disk_settings(hardware: Hardware) -> dict[str, int]:
    """How the profiler drove the disk best: threads, and bytes a transfer."""
    found = ((hardware.measured or {}).get("disk") or {}).get("settings", {}).get("disk_read", {})
    names = {"threads": "disk_threads", "chunk_bytes": "chunk_bytes"}
    return {ours: int(found[theirs]) for theirs, ours in names.items() if theirs in found}
