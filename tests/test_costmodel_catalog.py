"""The hardware catalogue against datasheet numbers typed here a second time."""

import json
import re
from pathlib import Path

import pytest

from costmodel.errors import InputError
from costmodel.hardware import Hardware, catalog_names, quantities

FOLDER = Path(__file__).parents[1] / "costmodel" / "catalog" / "hardware"
FILES = sorted(FOLDER.glob("*.json"))
FOREIGN_ENGINES = {"t4-flexgen"}

GIB = 2**30

# Per card: kind, capacity in GiB, memory bandwidth in GB/s, dense fp16 or bf16 matrix rate with fp32
# accumulate in TFLOP/s, one-way host link in GB/s.
DATASHEET = {
    "t4": ("cuda", 16, 320, 65, 15.75),
    "rtx3060": ("cuda", 12, 360, 25.5, 31.5),
    "rtx3090": ("cuda", 24, 936, 71, 31.5),
    "rtx4060ti": ("cuda", 16, 288, 44.1, 15.75),
    "rtx4090": ("cuda", 24, 1008, 165.2, 31.5),
    "rtx5090": ("cuda", 32, 1792, 209.5, 63),
    "l4": ("cuda", 24, 300, 121, 31.5),
    "a10g": ("cuda", 24, 600, 70, 31.5),
    "v100-16gb": ("cuda", 16, 900, 125, 15.75),
    "v100-32gb": ("cuda", 32, 900, 125, 15.75),
    "a100-40gb": ("cuda", 40, 1555, 312, 31.5),
    "a100-80gb": ("cuda", 80, 2039, 312, 31.5),
    "h100": ("cuda", 80, 3350, 989, 63),
    "h200": ("cuda", 141, 4800, 989, 63),
    "mi300x": ("rocm", 192, 5300, 1307.4, 63),
}

# Units, FLOP a clock and unit, boost clock in GHz. The product is the rate above: full-rate tensor cores
# do 1024 (Volta, Turing, Ada), 2048 (A100, CDNA 3) or 4096 (Hopper); GeForce and GA102 with fp32
# accumulate do 512. Cards whose whitepaper clock differs from the product page are within 1 %.
CLOCKS = {
    "t4": (40, 1024, 1.59),
    "rtx3060": (28, 512, 1.777),
    "rtx3090": (82, 512, 1.695),
    "rtx4060ti": (34, 512, 2.535),
    "rtx4090": (128, 512, 2.52),
    "rtx5090": (170, 512, 2.407),
    "l4": (58, 1024, 2.04),
    "a10g": (80, 512, 1.71),
    "v100-16gb": (80, 1024, 1.53),
    "v100-32gb": (80, 1024, 1.53),
    "a100-40gb": (108, 2048, 1.41),
    "a100-80gb": (108, 2048, 1.41),
    "h100": (132, 4096, 1.83),
    "h200": (132, 4096, 1.83),
    "mi300x": (304, 2048, 2.1),
}

# Per machine: DRAM in GiB, disk in GB, disk read and write in GB/s, all nominal.
HOSTS = {
    "t4": (208e9 / GIB, 1500, 2, 1),
    "rtx3090": (64, 2000, 7, 5.1),
    "rtx4090": (64, 2000, 7, 5.1),
    "l4": (128, 900, 2, 1),
    "a10g": (128, 900, 2, 1),
    "v100-16gb": (61, 1000, 0.21875, 0.21875),
    "v100-32gb": (768, 1800, 2, 1),
    "a100-40gb": (1024, 4 * 3840, 6.8, 4),
    "a100-80gb": (2048, 8 * 3840, 6.8, 4),
    "h100": (2048, 8 * 3840, 6.8, 4),
    "mi300x": (1850, 1000 * GIB / 1e9, 2, 1),
}

# Machines whose first tier is a budget of the only memory: kind, budget and DRAM in GiB, GB/s, TFLOP/s.
ONE_MEMORY = {
    "apple-m2-max": ("metal", 48, 64, 400, 13.6),
    "cpu-laptop": ("cpu", 12, 16, 102.4, 8 * 32 * 2.7e-3),
    "cpu-server": ("cpu", 448, 512, 8 * 8 * 4.8, 56 * 1024 * 2.0e-3),
}


def every_file() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_the_catalogue_holds_the_promised_machines() -> None:
    assert {*DATASHEET, *ONE_MEMORY} <= set(catalog_names())


@every_file()
def test_a_file_loads_under_its_own_name(path: Path) -> None:
    hardware = Hardware.from_catalog(path.stem)
    assert hardware.name == path.stem
    assert hardware.description.endswith(".")
    assert hardware == Hardware.from_file(path)


@every_file()
def test_a_file_survives_the_round_trip(path: Path) -> None:
    hardware = Hardware.from_catalog(path.stem)
    assert Hardware.from_dict(json.loads(json.dumps(hardware.to_dict()))) == hardware


@every_file()
def test_every_number_names_a_dated_source(path: Path) -> None:
    hardware = Hardware.from_catalog(path.stem)
    named = {key for _, quantity in quantities(hardware) for key in (quantity.source, quantity.efficiency_source)}
    for key in named - {None}:
        source = hardware.sources[str(key)]
        assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])(-[0-3]\d)?", source.date), key
        assert len(source.title) > 20 or path.stem in FOREIGN_ENGINES, key


@every_file()
def test_the_keys_stand_in_the_documented_order(path: Path) -> None:
    keys = [key for key in json.loads(path.read_text(encoding="utf-8")) if key != "flexgen_constants"]
    assert keys == ["schema", "name", "description", "gpu", "cpu", "disk", "links", "engine", "sources"]


@pytest.mark.parametrize("name", [*DATASHEET, *ONE_MEMORY])
def test_no_source_is_left_over_and_web_addresses_are_whole(name: str) -> None:
    hardware = Hardware.from_catalog(name)
    named = {key for _, quantity in quantities(hardware) for key in (quantity.source, quantity.efficiency_source)}
    assert set(hardware.sources) == named - {None}
    for key, source in hardware.sources.items():
        assert source.url is None or source.url.startswith("https://"), key
        assert key.startswith("assumed") == source.title.startswith("Assumption of this catalogue"), key


@pytest.mark.parametrize("name", DATASHEET)
def test_nominal_numbers_are_the_datasheets(name: str) -> None:
    kind, capacity_gib, gb_per_s, tflops, link_gb_per_s = DATASHEET[name]
    hardware = Hardware.from_catalog(name)
    gpu = hardware.gpu
    assert gpu.kind == kind
    assert gpu.memory_bytes.value == capacity_gib * GIB
    assert gpu.memory_bytes_per_s.value == pytest.approx(gb_per_s * 1e9)
    assert gpu.matmul_flops_per_s.value == pytest.approx(tflops * 1e12)
    assert gpu.attention_flops_per_s.value == pytest.approx(tflops * 1e12)
    assert hardware.links.cpu_to_gpu.bytes_per_s.value == pytest.approx(link_gb_per_s * 1e9)
    assert hardware.links.gpu_to_cpu.bytes_per_s.value == pytest.approx(link_gb_per_s * 1e9)


@pytest.mark.parametrize("name", CLOCKS)
def test_the_matrix_rate_is_dense_and_accumulates_in_fp32(name: str) -> None:
    units, flops_a_clock, ghz = CLOCKS[name]
    rate = Hardware.from_catalog(name).gpu.matmul_flops_per_s.value
    assert rate == pytest.approx(units * flops_a_clock * ghz * 1e9, rel=0.01)


@pytest.mark.parametrize("name", HOSTS)
def test_hosts_are_the_documented_ones(name: str) -> None:
    dram_gib, disk_gb, read_gb_per_s, write_gb_per_s = HOSTS[name]
    hardware = Hardware.from_catalog(name)
    assert hardware.cpu.memory_bytes.effective == pytest.approx(dram_gib * GIB)
    assert hardware.disk.memory_bytes.effective == pytest.approx(disk_gb * 1e9)
    assert hardware.links.disk_read.bytes_per_s.value == pytest.approx(read_gb_per_s * 1e9)
    assert hardware.links.disk_write.bytes_per_s.value == pytest.approx(write_gb_per_s * 1e9)


@pytest.mark.parametrize("name", ["t4", "l4", "a10g"])
def test_ecc_takes_a_sixteenth_of_gddr6(name: str) -> None:
    memory_bytes = Hardware.from_catalog(name).gpu.memory_bytes
    assert memory_bytes.effective == memory_bytes.value * 15 / 16


@pytest.mark.parametrize("name", [*DATASHEET, *ONE_MEMORY])
def test_effective_rates_stay_below_nominal(name: str) -> None:
    hardware = Hardware.from_catalog(name)
    gpu, links = hardware.gpu, hardware.links
    for rate in (
        gpu.memory_bytes_per_s,
        gpu.matmul_flops_per_s,
        gpu.attention_flops_per_s,
        gpu.dequantize_values_per_s,
        links.cpu_to_gpu.bytes_per_s,
        links.gpu_to_cpu.bytes_per_s,
        hardware.cpu.attention_bytes_per_s,
    ):
        assert rate is not None
        assert 0 < rate.effective < rate.value
    assert gpu.attention_flops_per_s.effective < gpu.matmul_flops_per_s.effective
    for latency in (gpu.layer_launch_s, links.cpu_to_gpu.latency_s, links.disk_read.latency_s):
        assert 1e-6 <= latency.effective <= 1e-3


@pytest.mark.parametrize("name", [*DATASHEET, *ONE_MEMORY])
def test_expanding_4_bit_values_is_bound_by_memory(name: str) -> None:
    # 4 bits and two 16-bit numbers a group of 64 are read, 16 bits are written.
    traffic_bytes_per_value = (4 + 2 * 16 / 64) / 8 + 2
    hardware = Hardware.from_catalog(name)
    limit = hardware.gpu.memory_bytes_per_s.value / traffic_bytes_per_value
    assert hardware.gpu.dequantize_values_per_s.value == pytest.approx(limit, rel=1e-3)
    cpu = hardware.cpu
    assert cpu.attention_bytes_per_s is not None
    assert cpu.dequantize_values_per_s is not None
    limit = cpu.attention_bytes_per_s.value / traffic_bytes_per_value
    assert cpu.dequantize_values_per_s.value == pytest.approx(limit, rel=1e-3)


@pytest.mark.parametrize("name", ONE_MEMORY)
def test_one_memory_has_no_second_tier(name: str) -> None:
    kind, budget_gib, dram_gib, gb_per_s, tflops = ONE_MEMORY[name]
    hardware = Hardware.from_catalog(name)
    assert hardware.gpu.kind == kind
    assert hardware.capacity_bytes["gpu"] == budget_gib * GIB < dram_gib * GIB
    assert hardware.capacity_bytes["cpu"] == 0
    assert hardware.capacity_bytes["disk"] > 0
    assert hardware.gpu.memory_bytes_per_s.value == pytest.approx(gb_per_s * 1e9)
    assert hardware.gpu.matmul_flops_per_s.value == pytest.approx(tflops * 1e12, rel=1e-3)
    assert f"{budget_gib} GiB" in hardware.gpu.name
    # A copy inside one memory reads and writes every byte.
    assert hardware.links.cpu_to_gpu.bytes_per_s.value == pytest.approx(gb_per_s * 1e9 / 2)


@pytest.mark.parametrize("name", [*DATASHEET, *ONE_MEMORY])
def test_the_engine_is_ours(name: str) -> None:
    hardware = Hardware.from_catalog(name)
    engine = hardware.engine
    assert (engine.name, engine.prefill_logits) == ("tierwise", "last")
    # Only the flash kernels (Ampere and later, CDNA 3) skip the masked half of the scores.
    skips = hardware.gpu.kind in ("cuda", "rocm") and name not in ("t4", "v100-16gb", "v100-32gb")
    assert engine.attention_causal_share.effective == (0.5 if skips else 1)
    assert engine.attention_scores == ("stored" if hardware.gpu.kind == "metal" else "fused")


@pytest.mark.parametrize("name", [*DATASHEET, *ONE_MEMORY])
def test_working_memory_is_the_runtimes(name: str) -> None:
    # PyTorch calls AMD's GPUs "cuda" as well; the runtime does not run on Metal.
    from runtime.execute import PREFILL_ROWS

    hardware = Hardware.from_catalog(name)
    engine, device = hardware.engine, {"cuda": "cuda", "rocm": "cuda", "cpu": "cpu"}.get(hardware.gpu.kind)
    if device is None:
        assert (engine.prefill_rows, engine.expanded, engine.buffers) == (None, "layer and cache", "as needed")
    else:
        assert engine.prefill_rows == PREFILL_ROWS[device] == {"cuda": 8192, "cpu": 1024}[device]
        assert (engine.expanded, engine.buffers) == ("matrix" if device == "cuda" else "pieces", "always")


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match=r"'rtx309'.*did you mean 'rtx3090'"):
        Hardware.from_catalog("rtx309")
