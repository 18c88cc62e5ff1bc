"""How much host memory a new allocation may take: what the kernel has left, within the cgroups' limits."""

from dataclasses import dataclass
from pathlib import Path

from costmodel.errors import TierwiseError

_NO_LIMIT = 2**60
"""cgroup v1 writes "no limit" as the largest multiple of a page."""


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """``available_bytes`` is what can be taken without swapping; ``limited_by`` says what sets it."""

    total_bytes: int
    available_bytes: int
    limited_by: str


def host_memory(root: str | Path = "/") -> HostMemory:
    """Read the machine's memory; ``root`` is the file system's root (tests hand in a false one)."""
    base = Path(root)
    total, available = _meminfo(base)
    limited_by = "physical memory"
    for group, limit, used in _limits(base):
        total = min(total, limit)
        if max(0, limit - used) < available:
            available, limited_by = max(0, limit - used), f"memory limit of {group}"
    return HostMemory(total_bytes=total, available_bytes=available, limited_by=limited_by)


def _meminfo(base: Path) -> tuple[int, int]:
    try:
        lines = (base / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if len(line.split()) >= 2}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, ValueError, KeyError):
        raise TierwiseError(f"{base / 'proc/meminfo'}: cannot be read, so the host memory is unknown") from None


def _limits(base: Path) -> list[tuple[str, int, int]]:
    """(group, limit, bytes in use that cannot be reclaimed) of every limited cgroup above this process."""
    found = []
    for version, mount, group in _memberships(base):
        top = base / mount.lstrip("/")
        for relative in _ancestors(group):
            folder = top / relative
            limit, used = _v2(folder) if version == 2 else _v1(folder)
            if limit is not None:
                found.append((f"cgroup /{relative}" if relative else f"the cgroup at {mount}", limit, used))
    return found


def _memberships(base: Path) -> list[tuple[int, str, str]]:
    """(version, mount point, path of this process's group below it) of the memory hierarchies."""
    own = _lines(base / "proc/self/cgroup")
    v1_group = next((line.split(":", 2)[2] for line in own if "memory" in line.split(":", 2)[1].split(",")), None)
    v2_group = next((line.split(":", 2)[2] for line in own if line.startswith("0::")), None)
    found = []
    for line in _lines(base / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        words, kind = before.split(), after.split()
        if len(words) < 5 or len(kind) < 3:
            continue
        mounted, mount = words[3], words[4]
        if kind[0] == "cgroup2" and v2_group is not None:
            found.append((2, mount, _below(v2_group, mounted)))
        if kind[0] == "cgroup" and "memory" in kind[2].split(",") and v1_group is not None:
            found.append((1, mount, _below(v1_group, mounted)))
    return found


def _below(group: str, mounted: str) -> str:
    """The group's path under a mount that may show only a part of the hierarchy (as in a container)."""
    if mounted != "/" and (group == mounted or group.startswith(mounted + "/")):
        group = group[len(mounted) :]
    return group.strip("/")


def _ancestors(group: str) -> list[str]:
    parts = [part for part in group.split("/") if part and part != ".."]
    return ["/".join(parts[:count]) for count in range(len(parts), -1, -1)]


def _v2(folder: Path) -> tuple[int | None, int]:
    limits = [number for name in ("memory.max", "memory.high") if (number := _number(folder / name)) is not None]
    used = (_number(folder / "memory.current") or 0) - _stat(folder, "inactive_file")
    return (min(limits) if limits else None), max(0, used)


def _v1(folder: Path) -> tuple[int | None, int]:
    limit = _number(folder / "memory.limit_in_bytes")
    used = (_number(folder / "memory.usage_in_bytes") or 0) - _stat(folder, "total_inactive_file")
    return limit, max(0, used)


def _number(path: Path) -> int | None:
    """The file's number; ``None`` where there is no file or no limit."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() and int(text) < _NO_LIMIT else None


def _stat(folder: Path, key: str) -> int:
    pairs = (line.split() for line in _lines(folder / "memory.stat"))
    return next((int(pair[1]) for pair in pairs if len(pair) == 2 and pair[0] == key), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
