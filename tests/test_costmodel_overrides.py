"""Sizes and rates given on the command line: exactly what was given changes."""

from typing import Any

import pytest

from costmodel.errors import InputError
from costmodel.hardware import Hardware, quantities
from costmodel.overrides import with_overrides

GIB = 2**30


def changed(before: Hardware, after: Hardware) -> dict[str, float]:
    """The quantities that differ, with their new effective value."""
    old, new = dict(quantities(before)), dict(quantities(after))
    assert set(old) == set(new)
    return {path: new[path].effective for path in new if new[path] != old[path]}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"gpu_memory": 24.0 * GIB}, {"gpu.memory_bytes": 24.0 * GIB}),
        ({"cpu_memory": 64.0 * GIB}, {"cpu.memory_bytes": 64.0 * GIB}),
        ({"cpu_memory": 0.0, "disk": 0.0}, {"cpu.memory_bytes": 0.0, "disk.memory_bytes": 0.0}),
        ({"disk_read": 7e9}, {"links.disk_read.bytes_per_s": 7e9}),
        ({"disk_write": 3e9}, {"links.disk_write.bytes_per_s": 3e9}),
        (
            {"host_link": 25e9},
            {"links.cpu_to_gpu.bytes_per_s": 25e9, "links.gpu_to_cpu.bytes_per_s": 25e9},
        ),
    ],
)
def test_only_what_is_given_changes(given: dict[str, float], expected: dict[str, float]) -> None:
    t4 = Hardware.from_catalog("t4")
    assert changed(t4, with_overrides(t4, **given)) == expected


@pytest.mark.parametrize(
    ("given", "constants"),
    [
        ({"disk_read": 7e9}, {"disk_to_cpu_bytes_per_s": 7e9}),
        (
            {"disk_write": 3e9},
            {
                "cpu_to_disk_cache_prefill_bytes_per_s": 3e9,
                "cpu_to_disk_hidden_prefill_bytes_per_s": 3e9,
                "cpu_to_disk_decode_bytes_per_s": 3e9,
            },
        ),
        ({"host_link": 25e9}, {"cpu_to_gpu_bytes_per_s": 25e9, "gpu_to_cpu_hidden_bytes_per_s": 25e9}),
        ({"gpu_memory": 8.0 * GIB}, {}),
    ],
)
def test_the_released_constants_follow(given: dict[str, float], constants: dict[str, float]) -> None:
    paper = Hardware.from_catalog("t4-flexgen")
    found = changed(paper, with_overrides(paper, **given))
    assert {path: value for path, value in found.items() if path.startswith("flexgen")} == {
        f"flexgen_constants.{name}": value for name, value in constants.items()
    }


def test_a_given_number_stands_alone_and_names_its_origin() -> None:
    changed = with_overrides(Hardware.from_catalog("t4"), gpu_memory=16.0 * GIB)
    memory = changed.gpu.memory_bytes
    assert (memory.value, memory.efficiency, memory.efficiency_source) == (16 * GIB, 1.0, None)
    assert changed.sources[memory.source].title == "as given"
    assert Hardware.from_dict(changed.to_dict()) == changed


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu_memory": 0.0}, "gpu_memory is 0: it must be greater than 0"),
        ({"gpu_memory": -1.0}, "gpu_memory is -1: it must be greater than 0"),
        ({"cpu_memory": -1.0}, "cpu_memory is -1: it must be at least 0"),
        ({"disk": -1.0}, "disk is -1: it must be at least 0"),
        ({"disk_read": 0.0}, "disk_read is 0: it must be greater than 0"),
        ({"disk_write": 0.0}, "disk_write is 0: it must be greater than 0"),
        ({"host_link": -3.0}, "host_link is -3: it must be greater than 0"),
        ({"gpu_memory": float("nan")}, "value is nan: it must be finite"),
        ({"disk_read": float("inf")}, "value is inf: it must be finite"),
    ],
)
def test_impossible_numbers_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        with_overrides(Hardware.from_catalog("t4"), **given)
