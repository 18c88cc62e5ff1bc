"""Calibration to measured runs: a machine of known truth, a case solved by hand, outliers, refusals, files."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from costmodel.calibrate.constants import MACHINE_CONSTANTS, stated
from costmodel.calibrate.held_out import errors, folds
from costmodel.calibrate.identify import identified, standard_deviations
from costmodel.calibrate.machine import Recalibration, recalibrate
from costmodel.calibrate.observations import observed, read
from costmodel.calibrate.robust import fit, pull
from costmodel.commands.calibrate import main
from costmodel.errors import InputError
from costmodel.figures.recalibration import MOST_SHOWN, recalibration_figure
from costmodel.figures.style import PAGE
from costmodel.hardware import Hardware, quantities
from costmodel.measurement import Measurement
from costmodel.offset import moved
from costmodel.policy import Split
from costmodel.uncertainty import Uncertainty
from costmodel.validation import Drawn, Validation
from costmodel.workload import Workload
from tests.measured import measured_machine, measurement, measurements, policies, truth

PLANNED = measured_machine()
FACTORS = {"disk-read": 0.6, "cpu-to-gpu": 1.25, "matmul": 0.8}
REALLY = truth(PLANNED, FACTORS)


@pytest.fixture(scope="module")
def found() -> Recalibration:
    runs = measurements(REALLY, PLANNED, noise=0.04, seed=1)
    return recalibrate(PLANNED, runs, constants=list(FACTORS), draws=100, files=["runs.json"])


def test_the_fit_recovers_the_truth_within_its_intervals(found: Recalibration) -> None:
    for one in found.constants:
        true = one.before * FACTORS[one.constant.name]
        assert one.low < true < one.high, one.constant.name
        assert one.after == pytest.approx(true, rel=0.08)
        assert one.high / one.low < 1.25


def test_runs_that_were_not_fitted_to_are_predicted_better(found: Recalibration) -> None:
    before, after = found.held_out.before["throughput"], found.held_out.after["throughput"]
    assert before.median > 0.15
    assert after.median < 0.05
    assert after.p90 < 0.1
    assert [row.place for row in found.rows] == list(range(24))


def test_a_quantity_keeps_its_error_by_hand() -> None:
    one = measurement(policies()[0], really=PLANNED, planned=PLANNED, factor=(2.0, 2.0))
    found = errors(observed(one, PLANNED), PLANNED)
    assert found == pytest.approx({"throughput": 1.0, "prefill": -0.5, "decode": -0.5})


def test_one_constant_solved_by_hand() -> None:
    """All time is disk reading, every run took twice as long: the prior gives way as n / scatter² to 1 / deviation²."""
    all_on_disk = Split(gpu=0, cpu=0, disk=1)
    policy = policies()[0].replace(weights=all_on_disk, overlap=True)
    slow_disk = PLANNED.replace("links.disk_read.bytes_per_s", 1e8, source="test").changed(
        "links.disk_read.bytes_per_s", lambda old: dataclasses.replace(old, spread=0.05)
    )
    slow_disk = slow_disk.changed("engine.unhidden_share", lambda old: dataclasses.replace(old, value=0.0))
    workload = Workload(prompt_len=16, gen_len=1)
    runs = [
        measurement(policy, really=slow_disk, planned=slow_disk, factor=(2.0, 1.0), workload=workload) for _ in range(8)
    ]
    made = fit([observed(run, slow_disk) for run in runs], slow_disk, [MACHINE_CONSTANTS["disk-read"]])
    assert [run.what for run in (observed(runs[0], slow_disk),)] == [(("prefill", None), ("prefill", "disk_read"))]
    data, prior = 8 * (1 + 0.5**2) / 0.02**2, 1 / (0.2**2 + (0.05 / 1.349) ** 2)
    assert made.offsets[0] == pytest.approx(-math.log(2) * data / (data + prior), abs=2e-4)
    assert made.information()[0, 0] == pytest.approx(data, rel=0.02)


def test_one_run_in_ten_that_something_disturbed_changes_little() -> None:
    runs = measurements(REALLY, PLANNED, noise=0.04, seed=2, outliers=3)
    made = fit([observed(run, PLANNED) for run in runs], PLANNED, [MACHINE_CONSTANTS[name] for name in FACTORS])
    for factor, offset in zip(FACTORS.values(), made.offsets, strict=True):
        assert math.exp(offset) == pytest.approx(factor, rel=0.1)


def test_a_large_residual_pulls_with_a_bounded_force() -> None:
    sizes = np.array([0.01, 1.5, 100.0])
    forces = sizes * pull(sizes**2)
    assert forces == pytest.approx([0.01, 1.5 / math.sqrt(2), 1.5], rel=1e-3)


def test_what_the_runs_do_not_identify_is_left_out_and_named() -> None:
    """One prompt length: prefill attention is a fixed share of the products, and only the stronger of them is told."""
    runs = [observed(run, PLANNED) for run in measurements(REALLY, PLANNED, noise=0.04, seed=1)]
    made, left_out = identified(runs, PLANNED, stated(PLANNED))
    fitted, kept = {one.name for one in made.constants}, {one.constant.name: one for one in left_out}
    assert set(FACTORS) <= fitted
    assert fitted | set(kept) == {one.name for one in stated(PLANNED)}
    assert kept["disk-write"].why == "no run depends on it"
    assert "tierwise bench --percent" in kept["disk-write"].sentence()
    assert kept["prefill-attention"].why == "in these runs its effect looks like that of matrix products (matmul)"


def test_a_mixture_that_changes_nothing_is_not_identified() -> None:
    """Two constants with the same slopes: only their sum is known; a third one stands alone with 1 / √information."""
    information = np.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 25.0]])
    assert standard_deviations(information) == pytest.approx([math.inf, math.inf, 0.2])


def test_folds_hold_every_regime_in_turn() -> None:
    regimes = ["disk_read"] * 10 + ["gpu_compute"] * 5
    made = folds(regimes, seed=3)
    assert sorted(place for fold in made for place in fold) == list(range(15))
    assert [sum(regimes[place] == "disk_read" for place in fold) for fold in made] == [2] * 5


def test_a_nominal_rate_is_never_exceeded() -> None:
    nominal = PLANNED.replace("links.disk_read.bytes_per_s", 2e9, source="test")
    runs = measurements(truth(PLANNED, {"disk-read": 1.5}), nominal, noise=0.01)
    made = recalibrate(nominal, runs, constants=["disk-read"], draws=20)
    quantity = made.hardware.rates["links.disk_read.bytes_per_s"]
    assert quantity.value == 2e9
    assert quantity.efficiency <= 1.0
    assert made.constants[0].at_bound
    slower = moved(nominal, "links.disk_read.bytes_per_s", math.log(0.5)).rates["links.disk_read.bytes_per_s"]
    assert (slower.value, slower.efficiency) == (2e9, 0.5)


def test_a_measured_rate_may_be_exceeded_and_a_share_stays_one() -> None:
    faster = moved(PLANNED, "links.disk_read.bytes_per_s", math.log(1.5)).rates["links.disk_read.bytes_per_s"]
    assert (faster.value, faster.efficiency) == (pytest.approx(3e9), 1.0)
    for offset, share in ((0.2, 0.25), (-1.0, 0.0), (3.0, 1.0)):
        changed = moved(PLANNED, "engine.unhidden_share", offset)
        assert changed.engine.unhidden_share.effective == pytest.approx(share)


# ------------------------------------------------------------------ intervals


def test_the_stated_interval_covers_what_it_says() -> None:
    """Noise of 10 %: 95 of 100 new runs lie inside, give or take; the interval is not wider than it must be."""
    runs = measurements(REALLY, PLANNED, noise=0.1, seed=4)
    made = recalibrate(PLANNED, runs, constants=list(FACTORS), draws=50)
    assert made.coverage > 0.85
    uncertainty = Uncertainty.of(made.hardware)
    assert uncertainty is not None
    inside = []
    for one in measurements(REALLY, PLANNED, noise=0.1, seed=5, repeats=3):
        interval = uncertainty.interval(uncertainty.predict(one.policy, one.model, one.workload))
        inside.append(interval.low < one.measured.throughput_tok_per_s < interval.high)
        assert interval.deviation < 0.2
    assert 0.90 < np.mean(inside) <= 1.0
    section = made.hardware.calibration
    assert section is not None
    assert section.prefill_spread == pytest.approx(0.1, rel=0.4)
    assert abs(section.correlation) < 0.5


# ------------------------------------------------------------------ files and refusals


def test_the_file_says_where_its_numbers_come_from(found: Recalibration, tmp_path: Path) -> None:
    path = tmp_path / "calibrated.json"
    path.write_text(json.dumps(found.hardware.to_dict()), encoding="utf-8")
    again = Hardware.from_file(path)
    assert again == found.hardware
    assert again.sources["calibration"].title == "Calibrated to 24 runs of this machine in runs.json"
    assert again.sources["calibration"].date == "2026-11-23"
    assert again.capacity_bytes == PLANNED.capacity_bytes
    before = dict(quantities(PLANNED))
    for name, quantity in quantities(again):
        fitted = name in {MACHINE_CONSTANTS[one].path for one in FACTORS}
        assert (quantity.source == "calibration") == fitted
        assert fitted or quantity == before[name]


def test_a_file_with_a_calibration_that_is_none_is_refused(found: Recalibration) -> None:
    for key, wrong, words in (
        ("constants", ["links.disk_read.bytes_per_s"], "covariance must have 1 rows"),
        ("constants", ["links.disk_read.bytes_per_s", "gpu.colour", "gpu.memory_bytes_per_s"], "gpu.colour"),
        ("source", "elsewhere", "elsewhere"),
        ("decode_spread", -1.0, "decode_spread is -1"),
        ("correlation", 2.0, "correlation is 2"),
    ):
        data = json.loads(json.dumps(found.hardware.to_dict()))
        data["calibration"][key] = wrong
        with pytest.raises(InputError, match=words):
            Hardware.from_dict(data)


def test_what_lies_beyond_the_figure_is_marked_and_counted(found: Recalibration) -> None:
    far = dataclasses.replace(found.rows[0], before={**found.rows[0].before, "throughput": 2.4})
    figure = recalibration_figure(dataclasses.replace(found, rows=(far, *found.rows[1:])))
    assert figure.get_size_inches()[0] == PAGE
    ((x, y),) = [line.get_xydata()[0] for line in figure.axes[0].lines if line.get_marker() in ("<", ">")]
    assert x == MOST_SHOWN
    assert round(y) == 23, "the run with the largest error is on top"
    assert "1 error beyond ±100 %, drawn as arrows at the edge" in " ".join(text.get_text() for text in figure.texts)
    plain = recalibration_figure(found)
    assert "beyond" not in " ".join(text.get_text() for text in plain.texts)


def _validation(path: Path, runs: list[Measurement], hardware: Hardware = PLANNED) -> str:
    drawn = tuple(Drawn(origin="drawn", about="", policy=run.policy) for run in runs)
    Validation(request={}, hardware=hardware, drawn=drawn, runs=tuple(runs)).save(path)
    return str(path)


def test_of_a_repeated_policy_the_middle_run_is_fitted_to(tmp_path: Path) -> None:
    """What a disturbed run of it says is not read."""
    slower = [truth(PLANNED, {"disk-read": factor}) for factor in (0.8, 0.4, 0.6)]
    rounds = [[measurement(policy, really=one, planned=PLANNED) for policy in policies()[:8]] for one in slower]
    drawn = tuple(Drawn(origin="drawn", about="", policy=run.policy) for run in rounds[0])
    runs = tuple(run for turn in rounds for run in turn)
    Validation(request={}, hardware=PLANNED, drawn=drawn, repeats=3, runs=runs).save(tmp_path / "v.json")
    _, found = read([tmp_path / "v.json"])
    assert [one.policy for one in found] == [one.policy for one in drawn]
    for one, three in zip(found, zip(*rounds, strict=True), strict=True):
        assert one.measured.latency_s == sorted(run.measured.latency_s for run in three)[1]


def _saved(path: Path, data: dict[str, object]) -> str:
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_the_command_writes_report_json_hardware_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = measurements(REALLY, PLANNED, noise=0.04, seed=1)
    file = _validation(tmp_path / "validation.json", runs[:20])
    loose = [_saved(tmp_path / f"run{place}.json", run.to_dict()) for place, run in enumerate(runs[20:])]
    out = {flag: str(tmp_path / f"out{suffix}") for flag, suffix in (("--json", ".json"), ("--plot", ".svg"))}
    saved = tmp_path / "calibrated.json"
    flags = ["--constants", *FACTORS, "--save", str(saved), *(text for pair in out.items() for text in pair)]
    assert main([file, *loose, *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "disk-read 2 GB/s" in said
    assert "Calibration takes the error of throughput of runs that it has not seen from" in said
    assert "lay within the interval stated for 95 % of runs" in said
    data = json.loads(Path(out["--json"]).read_text(encoding="utf-8"))
    assert data["schema"] == "tierwise.recalibration/1"
    assert data["runs"] == 24
    assert Path(out["--plot"]).read_bytes().startswith(b"<?xml")
    assert Hardware.from_file(saved).calibration is not None


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["{v}", "--constants", "disk-write"],
            "disk writes, rate (disk-write): no run depends on it; a run that shows",
        ),
        (["{v}", "--constants", "disk-reed"], "did you mean 'disk-read'?"),
        (["{v}", "--constants", "cpu-attention-call"], "does not state cpu.attention_call_s"),
        (["{few}"], "5 runs given: at least 6 are needed"),
        (["{v}", "{other}"], "give runs of one machine only"),
        (["{v}", "{rates}"], "links.disk_read.bytes_per_s differs"),
        (["{run}"], "give its file with --hardware"),
        (["{hardware}"], "a validation (tierwise.validation/1) or a measurement"),
        (["--constants", "disk-read"], "--constants needs FILE"),
        (["{v}", "--save", "{v}"], "that file is read by"),
    ],
)
def test_refusals_are_one_sentence(
    flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [measurement(policy, really=REALLY, planned=PLANNED) for policy in policies()[:8]]
    other = dataclasses.replace(REALLY, name="another")
    files = {
        "v": _validation(tmp_path / "v.json", runs),
        "few": _validation(tmp_path / "few.json", runs[:5]),
        "other": _validation(tmp_path / "other.json", runs, other),
        "rates": _validation(tmp_path / "rates.json", runs, truth(PLANNED, {"disk-read": 0.6})),
        "run": _saved(tmp_path / "run.json", runs[0].to_dict()),
        "hardware": _saved(tmp_path / "hardware.json", PLANNED.to_dict()),
    }
    assert main([flag.format(**files) for flag in flags]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_runs_that_identify_nothing_are_refused() -> None:
    runs = measurements(REALLY, PLANNED, noise=2.0, seed=6)[:6]
    with pytest.raises(InputError, match="the runs identify no constant of this machine; the nearest is .* run that"):
        recalibrate(PLANNED, runs)


def test_measurements_alone_need_the_file_they_were_planned_with(tmp_path: Path) -> None:
    run = measurement(policies()[0], really=REALLY, planned=PLANNED)
    files = [_saved(tmp_path / "run.json", run.to_dict())]
    hardware = _saved(tmp_path / "hardware.json", PLANNED.to_dict())
    assert read(files, hardware=hardware) == (PLANNED, (run,))
    floats = _saved(tmp_path / "float.json", dataclasses.replace(run, dtype="float32").to_dict())
    with pytest.raises(InputError, match="float32"):
        read([floats], hardware=hardware)
