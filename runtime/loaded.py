"""Loaded: a model's weights in their places, what carries bytes between tiers, and the count of the memory taken."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from costmodel import units
from costmodel.hardware import Hardware
from costmodel.policy import TIERS, Policy
from runtime import compiled_kernels
from runtime.execute import BlockRun
from runtime.image import Image
from runtime.memory_watch import MemoryWatch
from runtime.movers import Movers
from runtime.settings import disk_settings
from runtime.timeline import Timeline
from runtime.weights import Weights

Resident = dict[str, dict[str, float]]
"""Bytes by tier, then by kind: ``weights``, ``cache``, ``activations`` and the ``buffers`` of all three."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model that is ready to run; ``watch`` counts from before its first byte. To be closed."""

    movers: Movers
    weights: Weights
    watch: MemoryWatch

    @classmethod
    def load(
        cls,
        image: Image,
        policy: Policy,
        *,
        device: torch.device,
        hardware: Hardware,
        timeline: Timeline,
        say: Callable[[str], None],
    ) -> "Loaded":
        """Allocate and fill what the policy keeps in memory; the disk is driven as ``hardware`` was measured."""
        if device.type == "cuda":  # the allocator gives back what it keeps, or fails, before it exceeds the budget
            total_bytes = torch.cuda.get_device_properties(device).total_memory
            share = min(1.0, hardware.capacity_bytes["gpu"] / total_bytes)
            torch.cuda.set_per_process_memory_fraction(share, device)
        compiled_kernels.limit()
        watch = MemoryWatch(device)
        movers = Movers(
            device,
            timeline=timeline,
            overlap=policy.overlap,
            **disk_settings(hardware),
        )
        try:
            weights = Weights(image, policy.weights, movers)
            say(f"loading {units.format_bytes(sum(weights.bytes_on.values()))} of weights")
            weights.fill()
        except BaseException:
            movers.close()
            raise
        return cls(movers=movers, weights=weights, watch=watch)

    def resident(self, block: BlockRun) -> Resident:
        """What lies where while a block is run."""
        kinds = {
            "weights": self.weights.bytes_on,
            "cache": block.cache.bytes_on,
            "activations": block.hidden.bytes_on,
        }
        buffers = (self.weights.buffer_bytes, block.cache.buffer_bytes, block.hidden.buffer_bytes)
        return {
            tier: {
                **{kind: float(placed[tier]) for kind, placed in kinds.items()},
                "buffers": float(sum(found.get(tier, 0) for found in buffers)),
            }
            for tier in TIERS
        }

    def peak_bytes(self, resident: Resident) -> dict[str, float]:
        """Peak bytes by tier: the operating system's and the allocator's count, the disk's from its files.

        Without a GPU the kernel counts both memory tiers as one: what was placed on the second is
        taken off.
        """
        found = self.watch.peak_bytes()
        disk = sum(resident["disk"].values())
        if "cpu" in found:
            return {"gpu": float(found["gpu"]), "cpu": float(found["cpu"]), "disk": disk}
        second = sum(resident["cpu"].values())
        return {"gpu": max(0.0, found["gpu"] - second), "cpu": second, "disk": disk}

    def close(self) -> None:
        """End every thread and give the memory back."""
        self.movers.close()
