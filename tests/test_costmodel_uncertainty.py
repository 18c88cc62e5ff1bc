"""Intervals of predictions: solved by hand from spreads and covariances, and what search and estimate print."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibrated import Calibrated
from costmodel.commands import estimate, search
from costmodel.hardware import Hardware
from costmodel.policy import Policy, Split
from costmodel.uncertainty import Intervals, Uncertainty, intervals
from costmodel.workload import Workload
from tests.instances import link, machine, plain_model

DISK = "links.disk_read.bytes_per_s"
MATMUL = "gpu.matmul_flops_per_s"
MODEL = plain_model()
WORKLOAD = Workload(prompt_len=128, gen_len=8)
ALL_ON_GPU = Split(gpu=1, cpu=0, disk=0)


def _machine(**spreads: float) -> Hardware:
    """A machine with a slow disk, and a spread at the paths named ``disk`` and ``matmul``."""
    links = dataclasses.replace(machine().links, disk_read=link(1e8))
    found = machine(links=links)
    for name, spread in spreads.items():
        path = {"disk": DISK, "matmul": MATMUL}[name]
        found = found.changed(path, lambda old, spread=spread: dataclasses.replace(old, spread=spread))
    return found


def _policy(disk: float, *, batch: int = 4, overlap: bool = True) -> Policy:
    return Policy(
        weights=Split(gpu=1 - disk, cpu=0, disk=disk),
        cache=ALL_ON_GPU,
        activations=ALL_ON_GPU,
        gpu_batch_size=batch,
        num_gpu_batches=1,
        compress_weights=False,
        compress_cache=False,
        cpu_attention=False,
        overlap=overlap,
    )


def _intervals(hardware: Hardware, *policies: Policy) -> Intervals:
    found = intervals(list(policies), hardware=hardware, model=MODEL, workload=WORKLOAD, formulation="roofline")
    assert found is not None
    return found


def test_a_policy_that_waits_for_the_disk_alone_is_as_uncertain_as_the_disk() -> None:
    """ln(throughput) = ln(rate) + const: the interval is 1.96 standard deviations, one being 1/1.349 of the spread."""
    found = _intervals(_machine(disk=0.1), _policy(1.0))
    assert found.basis == "spreads"
    # A secant of 1/x over ± 0.074 is sinh(0.074) / 0.074 = 1 + 9e-4 of its slope.
    assert found.each[0].relative == pytest.approx(1.96 * 0.1 / 1.349, rel=2e-3)
    interval = found.each[0]
    assert interval.low * interval.high == pytest.approx(interval.throughput_tok_per_s**2)


def test_a_policy_that_does_not_use_the_disk_is_certain() -> None:
    assert _intervals(_machine(disk=0.1), _policy(0.0)).each[0].relative == 0.0


def test_independent_rates_add_in_squares() -> None:
    """Without overlap seconds add up, and each rate's share of them weighs its deviation."""
    policy = _policy(0.02, batch=64, overlap=False)
    both, disk, matmul = (
        _intervals(hardware, policy).each[0].deviation
        for hardware in (_machine(disk=0.02, matmul=0.05), _machine(disk=0.02), _machine(matmul=0.05))
    )
    assert disk > 0.001
    assert matmul > 0.001
    assert both == pytest.approx(math.hypot(disk, matmul), rel=1e-9)


def test_what_two_policies_share_cancels_in_their_difference() -> None:
    """Both wait for the disk only: a slower disk slows both, so 3 % apart is certain, though each is ± 60 %."""
    uncertain = _machine(disk=0.4)
    first, second = _policy(1.0), _policy(0.97)
    found = _intervals(uncertain, second, first)
    assert found.each[0].relative > 0.5
    assert found.each[0].low < found.each[1].throughput_tok_per_s < found.each[0].high
    assert found.apart == (True,)


def test_policies_that_wait_for_different_rates_are_told_apart_by_both_deviations() -> None:
    """A rate each: apart when |ln ratio| exceeds 1.96 √(a² + b²)."""
    first, second = _policy(1.0, batch=64), _policy(0.0, batch=64)
    for spread in (0.01, 3.0):
        hardware = _machine(disk=spread, matmul=spread)
        found = _intervals(hardware, first, second)
        ratio = abs(math.log(found.each[0].throughput_tok_per_s / found.each[1].throughput_tok_per_s))
        width = 1.96 * math.hypot(found.each[0].deviation, found.each[1].deviation)
        assert found.apart == (ratio > width,)


def _calibrated(hardware: Hardware, covariance: list[list[float]], **scatter: float) -> Hardware:
    for path in (DISK, MATMUL):
        hardware = hardware.changed(path, lambda old: dataclasses.replace(old, spread=9.0))
    section = Calibrated(
        source="test",
        runs=24,
        constants=(DISK, MATMUL),
        covariance=tuple(tuple(row) for row in covariance),
        **{"prefill_spread": 0.0, "decode_spread": 0.0, "correlation": 0.0} | scatter,  # type: ignore[arg-type]
    )
    return dataclasses.replace(hardware, calibration=section)


def test_a_calibration_replaces_spreads_and_adds_its_scatter() -> None:
    hardware = _calibrated(_machine(), [[0.01, 0.0], [0.0, 0.01]], prefill_spread=0.2, decode_spread=0.2, correlation=1)
    found = _intervals(hardware, _policy(1.0))
    assert found.basis == "calibration"
    # Both phases are off together by 20 %, the disk by 10 %.
    assert found.each[0].deviation == pytest.approx(math.hypot(0.1, 0.2), rel=2e-3)


def test_correlated_constants_may_cancel() -> None:
    """Two rates that are wrong together in opposite ways: the sum of their seconds hardly moves."""
    policy = _policy(0.02, batch=64, overlap=False)
    independent, opposed = (
        _intervals(_calibrated(_machine(), [[1e-4, one], [one, 1e-4]]), policy).each[0].deviation
        for one in (0.0, -1e-4)
    )
    slopes = [
        _intervals(_calibrated(_machine(), m), policy).each[0].deviation
        for m in ([[1e-4, 0], [0, 0]], [[0, 0], [0, 1e-4]])
    ]
    assert independent == pytest.approx(math.hypot(*slopes), rel=1e-9)
    assert opposed == pytest.approx(abs(slopes[0] - slopes[1]), rel=1e-9)


def test_a_number_given_since_the_calibration_is_taken_as_it_is() -> None:
    hardware = _calibrated(_machine(), [[0.04, 0.0], [0.0, 1e-8]])
    given = hardware.replace(DISK, 1e8, source="as given")
    assert _intervals(hardware, _policy(1.0)).each[0].deviation == pytest.approx(0.2, rel=0.01)
    assert _intervals(given, _policy(1.0)).each[0].deviation < 1e-4


def test_phases_have_deviations_of_their_own() -> None:
    hardware = _calibrated(_machine(), [[0.0, 0.0], [0.0, 0.0]], prefill_spread=0.3, decode_spread=0.4)
    uncertainty = Uncertainty.of(hardware)
    assert uncertainty is not None
    assert uncertainty.phase_deviations(uncertainty.predict(_policy(1.0), MODEL, WORKLOAD)) == pytest.approx((0.3, 0.4))


def test_files_without_spreads_and_other_formulations_have_no_interval() -> None:
    assert Uncertainty.of(machine()) is None
    assert Uncertainty.of(Hardware.from_catalog("t4")) is None
    assert Uncertainty.of(_machine(disk=0.1), "flexgen") is None


# ------------------------------------------------------------------ what the commands say


def _file(folder: Path, hardware: Hardware) -> str:
    path = folder / "machine.json"
    path.write_text(json.dumps(hardware.to_dict()), encoding="utf-8")
    return str(path)


FLAGS = ["--model", "opt-125m", "--prompt-len", "64", "--gen-len", "8"]
PERCENT = ["--percent", "0", "0", "100", "0", "100", "0", "--gpu-batch-size", "4", "--num-gpu-batches", "1"]


def test_estimate_prints_and_writes_the_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--hardware", _file(tmp_path, _machine(disk=0.1)), *FLAGS, *PERCENT]
    assert estimate.main(flags) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "token/s ± 15 %" in said
    assert "by the spreads of its measured rates alone" in said
    assert estimate.main([*flags, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)["uncertainty"]
    assert found["level"] == 0.95
    assert found["relative"] == pytest.approx(1.96 * 0.1 / 1.349, rel=2e-3)


def test_a_catalogue_machine_prints_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate.main([*FLAGS, *PERCENT]) == 0
    assert "±" not in capsys.readouterr().out
    assert estimate.main([*FLAGS, *PERCENT, "--json", "-"]) == 0
    assert "uncertainty" not in json.loads(capsys.readouterr().out)


def test_search_says_which_policies_cannot_be_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any uncertainty every difference counts; with runs that scatter by half, none of these does."""
    sizes = ["--gpu-memory", "300MiB", "--gpu-batch-size", "4", "--num-gpu-batches", "1", "--top", "4"]
    for scatter in (0.0, 0.5):
        hardware = _calibrated(_machine(), np.zeros((2, 2)).tolist(), prefill_spread=scatter, decode_spread=scatter)
        flags = ["--hardware", _file(tmp_path, hardware), *FLAGS, *sizes]
        assert search.main([*flags, "--json", "-"]) == 0
        found = json.loads(capsys.readouterr().out)
        best = found["estimate"]["throughput_tok_per_s"]
        slower = [one["estimate"]["throughput_tok_per_s"] < best for one in found["alternatives"]]
        assert any(slower)
        assert [one["told_apart"] for one in found["uncertainty"]["alternatives"]] == [
            one and not scatter for one in slower
        ]
        assert search.main(flags) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("The first policy and rows 2, 3 and 4 cannot be told apart" in said) == bool(scatter)
