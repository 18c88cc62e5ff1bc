"""The constants of a machine that runs can tell: where each stands, how far it may move, and the run that shows it.

A constant is fitted as its offset from the file's value (:mod:`costmodel.offset`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from costmodel import records
from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.offset import SHARE, deviation, has_ceiling, moved

MOST_FACTOR = 4.0
"""How far a fitted value may be from the file's. What runs would put further away is not that number measured badly:
the profiler timed something else than the run does, and measuring again tells which."""

INSIDE_A_RUN = 0.2
"""Standard deviation of ln(a rate inside a run / the same rate timed alone): other work shares caches, memory and
cores with it. It joins the spread of the file, which only says how well the timing repeats."""

UNMEASURED = 0.5
"""The same for a number without a spread: a datasheet's, or one that was given."""

SHARE_DEVIATION = 0.15
"""Standard deviation of a share of unhidden work, at least."""

_LINKS = {
    "cpu_to_gpu": ("CPU to GPU copies", "0 100 100 0 100 0"),
    "gpu_to_cpu": ("GPU to CPU copies", "100 0 0 100 0 100"),
    "disk_read": ("disk reads", "0 0 100 0 100 0"),
    "disk_write": ("disk writes", "100 0 0 0 0 0"),
}
_BIG = "--gpu-batch-size 16 --num-gpu-batches 2 --prompt-len 256 --gen-len 2"
_ON_GPU = "--percent 100 0 100 0 100 0"


@dataclass(frozen=True, kw_only=True)
class MachineConstant:
    """One number of a hardware file: ``name`` is what --constants takes, ``run`` the run that shows it."""

    name: str
    path: str
    what: str
    run: str

    @property
    def is_share(self) -> bool:
        """Fitted as a difference, not as a factor."""
        return self.path == SHARE

    def deviation(self, hardware: Hardware) -> float:
        """Standard deviation of the offset before any run is seen."""
        quantity = hardware.rates[self.path]
        repeats = deviation(self.path, quantity)
        if self.is_share:
            return max(SHARE_DEVIATION, repeats)
        return UNMEASURED if quantity.spread is None else math.hypot(repeats, INSIDE_A_RUN)

    def bounds(self, hardware: Hardware) -> tuple[float, float]:
        """The least and the largest offset: a share in [0, 1], no nominal rate exceeded, else ``MOST_FACTOR``."""
        quantity, widest = hardware.rates[self.path], math.log(MOST_FACTOR)
        if self.is_share:
            return -quantity.effective, 1.0 - quantity.effective
        return -widest, -math.log(quantity.efficiency) if has_ceiling(self.path, quantity) else widest


def _link_constants() -> list[MachineConstant]:
    made = []
    for link, (what, percent) in _LINKS.items():
        flag = link.replace("_", "-")
        long = "--prompt-len 512 --gen-len 2" if link in ("disk_write", "gpu_to_cpu") else "--gen-len 8"
        run = f"tierwise bench --percent {percent} --gpu-batch-size 4 --num-gpu-batches 2 {long}"
        for suffix, field, kind in (
            ("", "bytes_per_s", "rate"),
            ("-cache", "cache_bytes_per_s", "rate for the KV cache"),
            ("-latency", "latency_s", "latency"),
        ):
            other = {
                "": run,
                "-cache": f"tierwise bench --percent 100 0 0 {0 if 'disk' in link else 100} 100 0 --compress-cache off "
                "--cpu-attention off --gpu-batch-size 8 --num-gpu-batches 2 --prompt-len 512 --gen-len 8",
                "-latency": f"{run} with a much smaller model than the other runs",
            }[suffix]
            made.append(
                MachineConstant(name=flag + suffix, path=f"links.{link}.{field}", what=f"{what}, {kind}", run=other)
            )
    return made


MACHINE_CONSTANTS: Mapping[str, MachineConstant] = {
    one.name: one
    for one in (
        *_link_constants(),
        MachineConstant(
            name="matmul",
            path="gpu.matmul_flops_per_s",
            what="matrix products",
            run=f"tierwise bench {_ON_GPU} {_BIG}",
        ),
        MachineConstant(
            name="prefill-attention",
            path="gpu.attention_flops_per_s",
            what="attention in prefill",
            run=f"tierwise bench {_ON_GPU} --gpu-batch-size 1 --num-gpu-batches 4 --prompt-len 1024 --gen-len 2",
        ),
        MachineConstant(
            name="memory",
            path="gpu.memory_bytes_per_s",
            what="memory bandwidth",
            run=f"tierwise bench {_ON_GPU} --gpu-batch-size 1 --num-gpu-batches 1 --prompt-len 16 --gen-len 64",
        ),
        MachineConstant(
            name="dequantize",
            path="gpu.dequantize_values_per_s",
            what="4-bit expansion",
            run=f"tierwise bench {_ON_GPU} --compress-cache on --gpu-batch-size 16 --num-gpu-batches 1 "
            "--prompt-len 512 --gen-len 16",
        ),
        MachineConstant(
            name="quantize",
            path="gpu.quantize_values_per_s",
            what="rounding a cache to 4 bits",
            run=f"tierwise bench {_ON_GPU} --compress-cache on --gpu-batch-size 16 --num-gpu-batches 1 "
            "--prompt-len 512 --gen-len 2",
        ),
        MachineConstant(
            name="compressed-matmul",
            path="gpu.compressed_matmul_flops_per_s",
            what="products with 4-bit weights",
            run=f"tierwise bench {_ON_GPU} --compress-weights on --gpu-batch-size 1 --num-gpu-batches 1 --gen-len 32",
        ),
        MachineConstant(
            name="layer-launch",
            path="gpu.layer_launch_s",
            what="launching a layer",
            run=f"tierwise bench {_ON_GPU} --gpu-batch-size 1 --num-gpu-batches 16 with a model of small layers",
        ),
        MachineConstant(
            name="compressed-call",
            path="gpu.compressed_call_s",
            what="a call over a 4-bit cache",
            run=f"tierwise bench {_ON_GPU} --compress-cache on --gpu-batch-size 1 --num-gpu-batches 16",
        ),
        MachineConstant(
            name="carried-call",
            path="gpu.carried_call_s",
            what="a call over a carried cache",
            run="tierwise bench --percent 100 0 0 100 100 0 --gpu-batch-size 1 --num-gpu-batches 16",
        ),
        MachineConstant(
            name="part-call",
            path="gpu.part_call_s",
            what="a call over one more part of a cache",
            run="tierwise bench --percent 100 0 50 25 100 0 --gpu-batch-size 1 --num-gpu-batches 16",
        ),
        MachineConstant(
            name="compressed-part-call",
            path="gpu.compressed_part_call_s",
            what="a call over one more part of a 4-bit cache",
            run="tierwise bench --percent 100 0 50 25 100 0 --compress-cache on --gpu-batch-size 1 "
            "--num-gpu-batches 16",
        ),
        MachineConstant(
            name="gather",
            path="gpu.gather_bytes_per_s",
            what="gathering carried tokens",
            run="tierwise bench --percent 100 0 0 100 100 0 --gpu-batch-size 64 --num-gpu-batches 2 --prompt-len 16 "
            "--gen-len 128",
        ),
        MachineConstant(
            name="cpu-attention",
            path="cpu.attention_bytes_per_s",
            what="attention on the CPU",
            run="tierwise bench --percent 100 0 0 100 100 0 --cpu-attention on --gpu-batch-size 16 "
            "--num-gpu-batches 2 --prompt-len 512 --gen-len 16",
        ),
        MachineConstant(
            name="cpu-attention-call",
            path="cpu.attention_call_s",
            what="a call of attention on the CPU",
            run="tierwise bench --percent 100 0 0 100 100 0 --cpu-attention on --gpu-batch-size 1 "
            "--num-gpu-batches 16 --prompt-len 16 --gen-len 32",
        ),
        MachineConstant(
            name="cpu-dequantize",
            path="cpu.dequantize_values_per_s",
            what="4-bit expansion on the CPU",
            run="tierwise bench --percent 100 0 0 100 100 0 --cpu-attention on --compress-cache on "
            "--gpu-batch-size 16 --num-gpu-batches 2 --prompt-len 512 --gen-len 16",
        ),
        MachineConstant(
            name="unhidden-share",
            path=SHARE,
            what="unhidden share of overlap",
            run="tierwise bench of a policy whose disk reads and computation take about as long as each other, and "
            "the same with --overlap off",
        ),
    )
}
"""By the name that --constants takes."""


def stated(hardware: Hardware) -> tuple[MachineConstant, ...]:
    """The constants that a machine states; a latency of nothing cannot be scaled and is left out."""
    rates = hardware.rates
    return tuple(
        one
        for one in MACHINE_CONSTANTS.values()
        if one.path in rates and (one.is_share or rates[one.path].effective > 0)
    )


def named(hardware: Hardware, names: Sequence[str]) -> tuple[MachineConstant, ...]:
    """The constants asked for; an unknown one, or one that the machine does not state, is an error."""
    known = {one.name: one for one in stated(hardware)}
    for name in names:
        if name not in MACHINE_CONSTANTS:
            raise InputError(f"--constants: {records.nearest(name, MACHINE_CONSTANTS, what='constant')}")
        if name not in known:
            raise InputError(
                f"--constants {name}: hardware {hardware.name!r} does not state {MACHINE_CONSTANTS[name].path}"
            )
    return tuple(known[name] for name in dict.fromkeys(names))


def with_offsets(hardware: Hardware, constants: Sequence[MachineConstant], offsets: Iterable[float]) -> Hardware:
    """The machine with every constant moved by its offset."""
    for constant, offset in zip(constants, offsets, strict=True):
        hardware = moved(hardware, constant.path, float(offset))
    return hardware
