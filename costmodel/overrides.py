"""What a person changes on a machine from the command line: sizes of tiers, rates of links."""

from costmodel.errors import InputError
from costmodel.hardware import Hardware

GIVEN = "as given"

PATHS: dict[str, tuple[str, ...]] = {
    "gpu_memory": ("gpu.memory_bytes",),
    "cpu_memory": ("cpu.memory_bytes",),
    "disk": ("disk.memory_bytes",),
    "disk_read": ("links.disk_read.bytes_per_s",),
    "disk_write": ("links.disk_write.bytes_per_s",),
    "host_link": ("links.cpu_to_gpu.bytes_per_s", "links.gpu_to_cpu.bytes_per_s"),
}
"""The quantities behind each flag; a cache that takes a route of its own keeps its rate."""

RELEASED: dict[str, tuple[str, ...]] = {
    "disk_read": ("disk_to_cpu_bytes_per_s",),
    "disk_write": (
        "cpu_to_disk_cache_prefill_bytes_per_s",
        "cpu_to_disk_hidden_prefill_bytes_per_s",
        "cpu_to_disk_decode_bytes_per_s",
    ),
    "host_link": ("cpu_to_gpu_bytes_per_s", "gpu_to_cpu_hidden_bytes_per_s"),
}
"""The constants of the published model behind each flag."""


def with_overrides(
    hardware: Hardware,
    *,
    gpu_memory: float | None = None,
    cpu_memory: float | None = None,
    disk: float | None = None,
    disk_read: float | None = None,
    disk_write: float | None = None,
    host_link: float | None = None,
) -> Hardware:
    """A copy of the machine with other sizes (bytes) and link rates (bytes/s); ``None`` keeps a number.

    The released constants of the published model, where the machine carries them, follow. Sizes may be
    0 for a tier that is not there (not the GPU's), rates must be positive.
    """
    given = {
        "gpu_memory": gpu_memory,
        "cpu_memory": cpu_memory,
        "disk": disk,
        "disk_read": disk_read,
        "disk_write": disk_write,
        "host_link": host_link,
    }
    for name, value in given.items():
        if value is None:
            continue
        if value < 0 or (value == 0 and name not in ("cpu_memory", "disk")):
            raise InputError(
                f"{name} is {value:g}: it must be {'at least' if name in ('cpu_memory', 'disk') else 'greater than'} 0"
            )
        for path in PATHS[name]:
            hardware = hardware.replace(path, value, source=GIVEN)
        if hardware.flexgen_constants is not None:
            for constant in RELEASED.get(name, ()):
                hardware = hardware.replace(f"flexgen_constants.{constant}", value, source=GIVEN)
    return hardware
