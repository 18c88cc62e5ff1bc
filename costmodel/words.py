"""What people call the tiers, resources and switches: the words of the report and of the figures."""

from costmodel.estimate import Estimate
from costmodel.policy import Policy
from costmodel.units import format_bytes

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


def tier_name(tier: str) -> str:
    """``"GPU"`` for ``"gpu"``."""
    return _TIERS[tier]


def memory_name(tier: str) -> str:
    """The tier as a place with a size: ``"GPU memory"``, ``"disk"``."""
    return "disk" if tier == "disk" else f"{_TIERS[tier]} memory"


def resource_name(resource: str) -> str:
    """``"CPU→GPU link"`` for ``"cpu_to_gpu"``."""
    return _RESOURCES[resource]


def compared_name(resource: str) -> str:
    """A resource where predicted and measured seconds stand side by side, which attention on the CPU joins."""
    return "GPU and CPU compute" if resource == "gpu_compute" else resource_name(resource)


def quantity_name(quantity: str) -> str:
    """What a validation compares: ``"prefill time"`` for ``"prefill"``, ``"peak GPU memory"`` for ``"peak gpu"``."""
    if quantity.startswith("peak "):
        return f"peak {memory_name(quantity.removeprefix('peak '))}"
    return quantity if quantity == "throughput" else f"{quantity} time"


def batches(policy: Policy) -> str:
    """The batch shape: ``"3 GPU batches of 55 prompts = 165 prompts in a block"``."""
    size, number = policy.gpu_batch_size, policy.num_gpu_batches
    of = f"{counted(number, 'GPU batch', 'GPU batches')} of {counted(size, 'prompt')}"
    return (
        f"{of}: a block of {counted(policy.block_size, 'prompt')}"
        if number == 1
        else (f"{of} = {counted(policy.block_size, 'prompt')} in a block")
    )


def counted(number: int, one: str, many: str | None = None) -> str:
    """``"1 prompt"``, ``"1,200 prompts"``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def switches(policy: Policy) -> list[str]:
    """The switches as phrases, compression first."""
    phrases = [
        (policy.compress_weights, "4-bit weights", "16-bit weights"),
        (policy.compress_cache, "4-bit KV cache", "16-bit KV cache"),
        (policy.cpu_attention, "attention on the CPU", "attention on the GPU"),
        (not policy.overlap, "no overlap", "transfers overlap computing"),
    ]
    return [special if is_special else plain for is_special, special, plain in phrases]


def compressed(policy: Policy) -> str:
    """What is kept in 4 bits, in a word: ``"both"``, ``"weights"``, ``"cache"`` or a dash."""
    if policy.compress_weights and policy.compress_cache:
        return "both"
    return "weights" if policy.compress_weights else "cache" if policy.compress_cache else "–"


def attention(policy: Policy) -> str:
    """Where attention to the cache off the GPU runs."""
    return "CPU" if policy.cpu_attention else "GPU"


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


def signed_percent(share: float, decimals: int = 1) -> str:
    """A difference as a percentage: ``"+25.0 %"``; what rounds to nothing has no sign."""
    text = f"{share * 100:+,.{decimals}f}"
    return f"{text if text.strip('+-0.') else text[1:]} %"


def parameters(count: float) -> str:
    """A number of parameters: ``"125.2 M"``, ``"29.97 B"``."""
    return f"{count / 1e9:.4g} B" if count >= 1e9 else f"{count / 1e6:.4g} M"


def excess(estimate: Estimate) -> list[str]:
    """Which tiers a policy exceeds and by how much, one sentence each."""
    lines = []
    for tier in estimate.violations:
        needed, usable = estimate.peak_bytes[tier], estimate.limit_bytes[tier]
        sizes = f"{format_bytes(needed)} needed, {format_bytes(usable)} usable"
        lines.append(f"{memory_name(tier)} is exceeded by {format_bytes(needed - usable)}: {sizes}")
    return lines
