"""From figures to a hardware file: synthetic samples of a known machine give back that machine."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from costmodel.errors import TierwiseError
from costmodel.figures.machine import profile_figure
from costmodel.figures.style import render
from costmodel.hardware import Hardware
from profiler import engine, hidden_loads, report
from profiler import hardware as made
from profiler.capacity import Capacity
from profiler.effort import EFFORTS
from profiler.session import Profile
from profiler.timing import Reading, Results
from runtime.host_memory import HostMemory

GiB = 2**30
SIZES = (65536, 2**20, 2**24, 2**27)

GPU_STEPS = {"disk": (0.5, 0.5, 0.5), "cpu": (0.7, 0.7, 0.7)}
"""Seconds of a step that loads and computes: all of the shorter work hides, and half of it."""


def readings(
    name: str, unit: str, points: dict[tuple[tuple[str, str | int], ...], tuple[float, float]]
) -> list[Reading]:
    """Three samples a point, of (work, seconds), 1 % apart."""
    return [
        Reading(name=name, at=at, unit=unit, work=work, samples=(seconds * 0.99, seconds, seconds * 1.01))
        for at, (work, seconds) in points.items()
    ]


def machine_readings(device: str = "cpu") -> list[Reading]:
    found: list[Reading] = []
    for name, latency, rate in (("cpu_to_gpu", 1e-5, 1e10), ("gpu_to_cpu", 2e-5, 8e9)):
        memory = "host" if device == "cpu" else "pinned"
        found += readings(name, "bytes/s", {(("memory", memory), ("bytes", n)): (n, latency + n / rate) for n in SIZES})
    for name, latency, rate in (("disk_read", 1e-4, 2e9), ("disk_write", 3e-4, 1e9)):
        found += readings(
            name, "bytes/s", {(("method", "direct"), ("bytes", n)): (n, latency + n / rate) for n in SIZES}
        )
        found += readings(name, "bytes/s", {(("method", "buffered"), ("bytes", SIZES[-1])): (SIZES[-1], 9.0)})
    on, dtype = ("device", device), ("dtype", "bfloat16" if device == "cpu" else "float16")
    found += readings("matmul", "FLOP/s", {(on, dtype, ("rows", rows)): (rows * 1e9, 1.0) for rows in (1, 8, 64)})
    found += readings("matmul", "FLOP/s", {(on, ("dtype", "float32"), ("rows", 1)): (9e15, 1.0)})
    found += readings("linear_4bit", "FLOP/s", {(on, dtype, ("rows", rows)): (rows * 3e9, 1.0) for rows in (1, 16)})
    found += readings("prefill_attention", "FLOP/s", {(on, ("tokens", n)): (n * 1e8, 1.0) for n in (128, 512)})
    for processor in {device, "cpu"}:
        place = ("device", processor)
        rates = {128: 5e9, 512: 6e9, 2048: 7e9}
        found += readings("decode_attention", "bytes/s", {(place, ("context", n)): (r, 1.0) for n, r in rates.items()})
        found += readings("quantize", "values/s", {(place,): (3e8, 1.0)})
        found += readings("dequantize", "values/s", {(place,): (9e9, 1.0)})
        # 1/1.2 ns a value, of which two bytes at 6 GB/s take 1/3 ns: half a nanosecond is expansion.
        found += readings("compressed_attention", "values/s", {(place,): (1.2e9, 1.0)})
        found.append(Reading(name="attention_call", at=(place,), unit="s", work=None, samples=(1e-5,) * 3))
    layer_s = {engine.STAYS: 1e-4, engine.CARRIED: 3e-4, engine.COMPRESSED: 5e-5}
    layer_s |= {engine.PARTS: 3.4e-4, engine.COMPRESSED_PARTS: 3e-4}
    timed = [(engine.PLAIN_WEIGHTS, cache, seconds) for cache, seconds in layer_s.items()]
    timed += [(engine.COMPRESSED_WEIGHTS, engine.STAYS, 6e-5)] if device == "cpu" else []
    for weights, cache, seconds in timed:
        samples, place = (seconds, seconds, 3 * seconds), (on, ("cache", cache), ("weights", weights))
        found.append(Reading(name="engine_layer", at=place, unit="s", work=None, samples=samples))
    # 64 tokens in all: 31 more by themselves are 31/64 of 640 bytes, and take 0.1 s longer.
    for singles, seconds in ((1, 0.4), (32, 0.5)):
        place = (on, ("singles", singles))
        found.append(Reading(name="carried_attention", at=place, unit="bytes/s", work=640.0, samples=(seconds,) * 3))
    for source, both_s in {"disk": (0.6, 0.64, 0.9)}.items() if device == "cpu" else GPU_STEPS.items():
        steps = {hidden_loads.COMPUTE: (0.4,) * 3, hidden_loads.LOAD: (0.5, 0.6, 0.5), hidden_loads.BOTH: both_s}
        for does, samples in steps.items():
            at = (on, ("weights", source), ("does", does))
            found.append(Reading(name="decode_step", at=at, unit="s", work=None, samples=samples))
    return found


def profile_of(found: list[Reading], *, device: str = "cpu", gpu: dict[str, Any] | None = None) -> Profile:
    results = Results()
    results.add(found)
    cpu = {"name": "Model 1", "cores_usable": 8}
    disk = {"kind": "xfs", "device": "/dev/nvme0n1", "model": "FAST 1"}
    return Profile(
        results=results,
        device=torch.device(device),
        dtype=torch.bfloat16 if device == "cpu" else torch.float16,
        capacity=Capacity(
            gpu_bytes=8 * GiB,
            gpu_origin="a budget",
            cpu_bytes=0,
            cpu_origin="none",
            disk_bytes=100 * GiB,
            pinnable_bytes=None,
            host=HostMemory(total_bytes=64 * GiB, available_bytes=48 * GiB, limited_by="physical memory"),
        ),
        offload={"method": "direct I/O", "file_bytes": GiB, "free_bytes": 100 * GiB, "direct": True},
        disk_settings={"disk_read": {"threads": 8, "chunk_bytes": 4096}},
        environment={
            "date": "2026-11-23",
            "commit": "abc",
            "torch": "2",
            "cpu": cpu,
            "gpu": gpu,
            "file_system": disk,
        },
        notes=["a note"],
        seconds=10.0,
        effort=EFFORTS["quick"],
    )


@pytest.fixture
def machine() -> Hardware:
    return made.hardware(profile_of(machine_readings()), name="box")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("links.cpu_to_gpu.bytes_per_s", 1e10),
        ("links.cpu_to_gpu.latency_s", 1e-5),
        ("links.gpu_to_cpu.bytes_per_s", 8e9),
        ("links.disk_read.bytes_per_s", 2e9),
        ("links.disk_read.latency_s", 1e-4),
        ("links.disk_write.bytes_per_s", 1e9),
        ("links.disk_write.latency_s", 3e-4),
        ("gpu.memory_bytes", 8 * GiB),
        ("gpu.memory_bytes_per_s", 6e9),
        ("gpu.matmul_flops_per_s", 64e9),
        ("gpu.attention_flops_per_s", 512e8),
        ("gpu.dequantize_values_per_s", 2e9),
        ("gpu.layer_launch_s", 1e-4),
        ("gpu.compressed_launch_share", 0.6),
        ("gpu.carried_call_s", 2e-4),
        ("gpu.compressed_call_s", 0.0),  # no less than nothing
        ("gpu.part_call_s", 4e-5),  # the part that is carried aside
        ("gpu.compressed_part_call_s", 5e-5),
        ("gpu.gather_bytes_per_s", 3100.0),
        ("gpu.quantize_values_per_s", 3e8),
        ("cpu.attention_bytes_per_s", 6e9),
        ("cpu.attention_call_s", 1e-5),
        ("disk.memory_bytes", 100 * GiB),
        # By the middle of three steps: (0.64 − 0.5) / 0.4.
        ("engine.unhidden_share", 0.35),
    ],
)
def test_known_machine_is_given_back(machine: Hardware, path: str, value: float) -> None:
    quantity = report.at(machine, path)
    assert quantity is not None
    assert quantity.value == pytest.approx(value, rel=1e-3)


def test_curves_and_spreads(machine: Hardware) -> None:
    assert machine.gpu.matmul_flops_per_s.curve == ((1, 1e9), (8, pytest.approx(8e9)), (64, pytest.approx(64e9)))
    assert machine.gpu.matmul_flops_per_s.at(8) == pytest.approx(8e9)
    assert machine.gpu.compressed_matmul_flops_per_s is not None
    # At 16 rows 48 TFLOP/s, at 8 and 12 between that and one row's 3; 5 rows take as long as 8, and so on.
    eight, twelve = (3e9 + 45e9 * math.log(rows, 16) for rows in (8, 12))
    curve = [(1, 3e9), (5, eight * 5 / 8), (8, eight), (9, twelve * 9 / 12), (12, twelve), (13, 39e9), (16, 48e9)]
    assert machine.gpu.compressed_matmul_flops_per_s.curve == tuple((rows, pytest.approx(rate)) for rows, rate in curve)
    assert machine.links.disk_read.bytes_per_s.spread == pytest.approx(0.01, abs=1e-4)
    assert machine.gpu.layer_launch_s.spread == pytest.approx(1.0)


def test_file_survives_its_own_format(machine: Hardware) -> None:
    assert Hardware.from_dict(machine.to_dict()).to_dict() == machine.to_dict()


def test_too_few_repeats_state_no_spread() -> None:
    found = [
        dataclasses.replace(reading, samples=reading.samples[:2]) if reading.name == "engine_layer" else reading
        for reading in machine_readings()
    ]
    assert made.hardware(profile_of(found), name="box").gpu.layer_launch_s.spread is None


@pytest.mark.parametrize("missing", ["matmul", "disk_read", "decode_attention", "decode_step", "engine_layer"])
def test_what_was_not_measured_is_said(missing: str) -> None:
    found = [reading for reading in machine_readings() if reading.name != missing]
    with pytest.raises(TierwiseError, match="measured"):
        made.hardware(profile_of(found), name="box")


def test_gpu_has_its_own_attention_and_the_pinned_link() -> None:
    gpu = {"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 80 * GiB}
    machine = made.hardware(profile_of(machine_readings("cuda"), device="cuda", gpu=gpu), name="box")
    assert (machine.gpu.kind, machine.gpu.name) == ("cuda", "NVIDIA A100-SXM4-80GB")
    assert machine.links.cpu_to_gpu.bytes_per_s.value == pytest.approx(1e10, rel=1e-3)
    assert machine.engine.unhidden_share.value == pytest.approx((0.0 + 0.5) / 2)


@pytest.mark.parametrize(
    ("name", "memory_gib", "entry"),
    [
        ("Tesla T4", 15, "t4"),
        ("NVIDIA A100-SXM4-80GB", 80, "a100-80gb"),
        ("NVIDIA A100-SXM4-40GB", 40, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 80, "h100"),
        ("NVIDIA H100 PCIe", 80, None),
        ("NVIDIA H200", 140, "h200"),
        ("NVIDIA GeForce RTX 3060", 12, "rtx3060"),
        ("NVIDIA GeForce RTX 3060 Ti", 8, None),
        ("NVIDIA GeForce RTX 4060 Ti", 16, "rtx4060ti"),
        ("Tesla V100-SXM2-32GB", 32, "v100-32gb"),
    ],
)
def test_datasheet_of_a_known_gpu(name: str, memory_gib: int, entry: str | None) -> None:
    gpu = {"name": name, "memory_bytes": memory_gib * GiB}
    machine = made.hardware(profile_of(machine_readings("cuda"), device="cuda", gpu=gpu), name="box")
    found = report.datasheet(machine)
    assert (None if found is None else found.name) == entry


def test_summary_of_a_gpu_names_its_datasheet(capsys: pytest.CaptureFixture[str]) -> None:
    found = profile_of(machine_readings("cuda"), device="cuda", gpu={"name": "Tesla T4", "memory_bytes": 15 * GiB})
    report.show(found, made.hardware(found, name="box"), [])
    shown = capsys.readouterr().out
    assert "t4 datasheet" in shown
    assert "15.75 GB/s" in shown  # PCIe 3.0 x16, of which 10 GB/s were reached
    assert "63%" in shown


@pytest.mark.parametrize(("file_format", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_figure_in_every_format(machine: Hardware, file_format: str, start: bytes) -> None:
    figure = profile_figure(machine)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Matrix products (bfloat16)", "Links (grey: the fitted lines)", "Attention over the KV cache"]
    assert render(figure, file_format).startswith(start)
