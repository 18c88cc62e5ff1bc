"""What the figures were taken on: processors, memory, disk, versions, commit, date."""

import datetime
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import costmodel

_IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")
_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)


@dataclass(frozen=True, kw_only=True)
class FileSystem:
    """The mount that a directory is on."""

    kind: str
    device: str
    mount: str
    options: str

    @property
    def in_memory(self) -> bool:
        """Whether its files live in memory, so that no disk is measured."""
        return self.kind in _IN_MEMORY


def file_system(directory: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> FileSystem:
    """The file system of a directory: the last mount over the longest prefix of its path."""
    place = os.path.realpath(directory)
    best = FileSystem(kind="unknown", device="unknown", mount="/", options="")
    for line in _text(mountinfo).splitlines():
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 6 or len(kind) < 2:
            continue
        mount = words[4].replace("\\040", " ")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best.mount):
            best = FileSystem(kind=kind[0], device=kind[1], mount=mount, options=words[5])
    return best


def cpu_name() -> str:
    """The processor's model as the kernel gives it."""
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine()


def describe(device: torch.device, offload: Path) -> dict[str, Any]:
    """The environment as recorded in the hardware file."""
    return {
        "date": today(),
        "tierwise": costmodel.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_record(),
        "gpu": gpu_record(device),
        "file_system": disk_record(offload),
    }


def today() -> str:
    """The date in UTC."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def cpu_record() -> dict[str, Any]:
    """Cores, instruction sets, threads and NUMA nodes."""
    flags: set[str] = set()
    told = {name: value for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if (value := os.environ.get(name))}
    for line in _text(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
    nodes = sorted(Path("/sys/devices/system/node").glob("node[0-9]*"))
    return {
        "name": cpu_name(),
        "cores_usable": usable_cores(),
        "cores_online": os.cpu_count(),
        "instructions": [flag for flag in _FLAGS if flag in flags],
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "numa_nodes": max(1, len(nodes)),
        "cache_bytes": cache_bytes(),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")).strip() or "unknown",
        "environment": told,
    }


def cache_bytes() -> int:
    """The processor's largest cache; 0 where the kernel does not say."""
    sizes = [_text(path).strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(
        (
            int(size[:-1]) * {"K": 2**10, "M": 2**20}[size[-1]]
            for size in sizes
            if size[-1:] in "KM" and size[:-1].isdigit()
        ),
        default=0,
    )


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_record(device: torch.device) -> dict[str, Any] | None:
    """Name, memory, versions and the PCIe link as the driver reports it; ``None`` without a GPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    record: dict[str, Any] = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    fields = (
        "driver_version",
        "pcie.link.gen.current",
        "pcie.link.width.current",
        "power.limit",
        "clocks.max.sm",
        "mig.mode.current",
    )
    values = _run(
        "nvidia-smi",
        f"--query-gpu={','.join(fields)}",
        "--format=csv,noheader",
        f"--id={_driver_id(device, properties)}",
    ).split(",")
    if len(values) == len(fields):
        record |= {field: value.strip() for field, value in zip(fields, values, strict=True)}
    return record


def _driver_id(device: torch.device, properties: object) -> str:
    """How the driver calls a device: torch's numbers count only those that CUDA_VISIBLE_DEVICES leaves."""
    uuid = getattr(properties, "uuid", None)
    return str(device.index or 0) if uuid is None else f"GPU-{uuid}"


def disk_record(directory: Path) -> dict[str, Any]:
    """The file system below a directory and the block device below that."""
    found = file_system(directory)
    record: dict[str, Any] = {"kind": found.kind, "device": found.device, "options": found.options}
    block = Path("/sys/class/block") / Path(found.device).name
    if block.is_dir():
        parent = block.resolve().parent if (block / "partition").exists() else block.resolve()
        model = _text(parent / "device" / "model").strip()
        rotational = _text(parent / "queue" / "rotational").strip()
        record |= {"model": model or "unknown", "kernel_says_rotational": rotational == "1"}
    return record


def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16; on others they are many times slower than fp32."""
    flags = set(cpu_record()["instructions"])
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def load_per_core() -> float:
    """Runnable processes of the last minute per usable core; above about 0.5 the figures are disturbed."""
    try:
        return os.getloadavg()[0] / usable_cores()
    except OSError:
        return 0.0


def commit() -> str:
    """The commit of the running source tree, with "+" where it is changed; "unknown" outside of a checkout."""
    tree = str(Path(costmodel.__file__).resolve().parent.parent)
    head = _run("git", "-C", tree, "rev-parse", "--short=12", "HEAD").strip()
    if not head or not Path(tree, ".git").exists():
        return "unknown"
    return head + ("+" if _run("git", "-C", tree, "status", "--porcelain", "--untracked-files=no").strip() else "")


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
