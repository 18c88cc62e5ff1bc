"""What people call the tiers, resources and switches: the words of the report and of the figures."""

from costmodel.hardware import Hardware
from costmodel.policy import Policy

KINDS = {"weights": "weights", "cache": "KV cache", "activations": "activations", "buffers": "buffers"}

_TIERS = {"gpu": "GPU", "cpu": "CPU", "disk": "disk"}
_RESOURCES = {
    "gpu_compute": "GPU compute",
    "cpu_compute": "CPU attention",
    "cpu_to_gpu": "CPU→GPU link",
    "gpu_to_cpu": "GPU→CPU link",
    "disk_read": "disk read",
    "disk_write": "disk write",
}
# Without a GPU the first tier is a budget of host memory that the CPU computes from.
_TIERS_WITHOUT_GPU = {"gpu": "memory", "cpu": "2nd memory", "disk": "disk"}
_RESOURCES_WITHOUT_GPU = {
    **_RESOURCES,
    "gpu_compute": "CPU compute",
    "cpu_compute": "2nd-memory attention",
    "cpu_to_gpu": "copy from 2nd memory",
    "gpu_to_cpu": "copy to 2nd memory",
}


def tier_name(tier: str, hardware: Hardware) -> str:
    """``"GPU"`` for ``"gpu"``; on a machine without one, the memory that the CPU computes from."""
    return (_TIERS_WITHOUT_GPU if hardware.gpu.kind == "cpu" else _TIERS)[tier]


def memory_name(tier: str, hardware: Hardware) -> str:
    """The tier as a place with a size: ``"GPU memory"``, ``"disk"``."""
    name = tier_name(tier, hardware)
    return f"{name} memory" if name in ("GPU", "CPU") else name


def resource_name(resource: str, hardware: Hardware) -> str:
    """``"CPU→GPU link"`` for ``"cpu_to_gpu"``."""
    return (_RESOURCES_WITHOUT_GPU if hardware.gpu.kind == "cpu" else _RESOURCES)[resource]


def batches(policy: Policy) -> str:
    """The batch shape: ``"3 GPU batches of 55 prompts = 165 prompts in a block"``."""
    size, number = policy.gpu_batch_size, policy.num_gpu_batches
    of = f"{counted(number, 'GPU batch', 'GPU batches')} of {counted(size, 'prompt')}"
    return f"{of}: a block of {counted(policy.block_size, 'prompt')}" if number == 1 else (
        f"{of} = {counted(policy.block_size, 'prompt')} in a block"
    )


def counted(number: int, one: str, many: str | None = None) -> str:
    """``"1 prompt"``, ``"1,200 prompts"``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def switches(policy: Policy, *, without_defaults: bool = False) -> list[str]:
    """The switches as phrases, compression first; ``without_defaults`` keeps what is not the plain way."""
    phrases = [
        (policy.compress_weights, "4-bit weights", "16-bit weights"),
        (policy.compress_cache, "4-bit KV cache", "16-bit KV cache"),
        (policy.cpu_attention, "attention on the CPU", "attention on the GPU"),
        (not policy.overlap, "no overlap", "transfers overlap computing"),
    ]
    if without_defaults:
        return [special for is_special, special, _ in phrases if is_special]
    return [special if is_special else plain for is_special, special, plain in phrases]


def number(value: float) -> str:
    """Four significant digits without an exponent: ``"2.696"``, ``"12,345"``."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(share: float) -> str:
    """A share as a percentage: ``"0.8 %"``, ``"100 %"``."""
    value = share * 100
    if 0 < value < 0.05:
        return "<0.1 %"
    if abs(value) < 99.95:
        return f"{value:.1f} %".replace(".0 %", " %")
    return f"{value:,.0f} %"


def billions(count: float) -> str:
    """Parameters: ``"125 million"``, ``"29.97 billion"``."""
    return f"{count / 1e9:.4g} billion" if count >= 1e9 else f"{count / 1e6:.4g} million"
