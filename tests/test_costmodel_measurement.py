"""Measurement files that people or programs have spoilt are refused, naming the file and the field."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from costmodel.calibrate.observations import read
from costmodel.errors import InputError
from costmodel.measurement import Measurement

VALIDATION = Path(__file__).parent.parent / "benchmarks/results/2026-11-29-epyc-2-cores-validation.json"
RUN = json.loads(VALIDATION.read_text(encoding="utf-8"))["measurements"][0]


def spoilt(path: str, value: Any) -> dict[str, Any]:
    data = copy.deepcopy(RUN)
    *way, last = path.split(".")
    part = data
    for key in way:
        part = part[key]
    part[last] = value
    return data


def test_a_run_is_read_as_it_was_written() -> None:
    assert Measurement.from_dict(RUN).to_dict() == RUN


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("measured.prefill_s", float("nan"), "measured: prefill_s is nan: a finite number"),
        ("measured.decode_s", "fast", "measured: decode_s is 'fast': a finite number"),
        ("measured.latency_s", -1, "measured: latency_s is -1: a finite number of at least 0"),
        ("measured.latency_s", 1e9, r"latency_s is 1e\+09: prefill and decode take"),
        ("measured.resources.prefill.gpu_compute.busy_s", float("inf"), r"busy_s\.prefill\.gpu_compute is inf"),
        ("measured.resources.prefill.gpu_compute.busy_s", "x", "this is no measurement"),
        ("measured.resources", None, "this is no measurement"),
        ("block_s", [[1]], "this is no measurement"),
    ],
)
def test_what_no_run_can_have_measured_is_refused(path: str, value: Any, told: str) -> None:
    with pytest.raises(InputError, match=f"run.json.*{told}"):
        Measurement.from_dict(spoilt(path, value), where="run.json")


def test_a_run_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match=r"the same run is given twice \(number 35 of 68 is number 1\)"):
        read([VALIDATION, VALIDATION])
