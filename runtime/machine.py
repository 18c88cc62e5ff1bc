"""The machine that a run plans for: a hardware file, or a quick profile that is kept for the next time."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from platform import node
from typing import Any

import torch

from costmodel import records
from costmodel.errors import InputError, TierwiseError
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.overrides import with_overrides
from runtime.budgets import budgets
from runtime.disk import DiskError

USABLE_FRACTION = 0.95
"""The share of a budget that is planned with: predicted peaks are within 5 % of the measured ones."""


def cache_directory() -> Path:
    """Where profiles are kept between runs: ``$TIERWISE_CACHE``, else the user's cache directory."""
    own = os.environ.get("TIERWISE_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tierwise"


def machine(
    given: Hardware | str | os.PathLike[str] | None,
    *,
    device: torch.device,
    offload_dir: Path,
    config: Mapping[str, Any],
    gpu_memory: float | None,
    cpu_memory: float | None,
    say: Callable[[str], None],
) -> Hardware:
    """The machine with the budgets (bytes) of this run; what is ``None`` is what is free now.

    Raises :class:`InputError` where the machine of the file has another first tier than this run, or a
    budget is more than there is.
    """
    if isinstance(given, Hardware):
        found = given
    else:
        found = Hardware.from_file(given) if given is not None else _profiled(device, offload_dir, config, say)
    kind = ("rocm" if torch.version.hip else "cuda") if device.type == "cuda" else "cpu"
    if found.gpu.kind != kind:
        raise InputError(
            f"hardware {found.name!r} has a first tier of kind {found.gpu.kind!r}, but this run is on {kind!r}: "
            "profile this machine with tierwise profile, or choose another --device"
        )
    room = budgets(device, gpu_memory=gpu_memory, cpu_memory=cpu_memory)
    try:
        status = os.statvfs(offload_dir)
    except OSError as error:
        raise DiskError(f"{offload_dir}: cannot be used: {error.strerror}") from None
    return with_overrides(
        found, gpu_memory=room.gpu_bytes, cpu_memory=room.cpu_bytes, disk=float(status.f_bavail * status.f_frsize)
    )


def _profiled(
    device: torch.device, offload_dir: Path, config: Mapping[str, Any], say: Callable[[str], None]
) -> Hardware:
    """The profile of this machine, device and disk for layers of a model's widths; measured now if there is none yet.

    The profiler stands above this package, so it is a program to be run, not a module to be imported.
    """
    disk = os.stat(offload_dir).st_dev  # noqa: PTH116
    widths = ModelSpec.from_config(config, name="model")
    shape = f"{widths.hidden_size}x{widths.ffn_size}x{widths.head_dim}"
    path = cache_directory() / f"profile-{node() or 'machine'}-{device.type}-{disk}-{shape}.json"
    if path.exists():
        say(f"using the profile of this machine in {path}")
        return Hardware.from_file(path)
    say("profiling this machine (20 s, once; tierwise profile measures better)")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made: {error.strerror} (set TIERWISE_CACHE)") from None
    with tempfile.TemporaryDirectory(prefix="tierwise-") as folder:
        described = Path(folder) / "config.json"
        records.write_json(dict(config), described)
        command = [sys.executable, "-m", "profiler", "--quick", "--out", str(path), "--device", device.type]
        command += ["--offload-dir", str(offload_dir), "--model", str(described)]
        done = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise TierwiseError(f"profiling this machine failed: {reason[0].removeprefix('error: ')}")
    return Hardware.from_file(path)
