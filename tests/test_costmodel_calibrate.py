"""The paper's machine: every published run redone, with the errors that docs/calibration.md states."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from costmodel.calibrate import Calibration, calibrate, mean_error, worst_error
from costmodel.calibrate.fit import T4_FLEXGEN, fit, with_constants
from costmodel.calibrate.published import Run, ablations, predict, runs
from costmodel.commands.calibrate import main
from costmodel.estimate import estimate
from costmodel.formulations import get
from costmodel.hardware import Hardware, quantities
from costmodel.overrides import with_overrides

MACHINE = Hardware.from_catalog("t4-flexgen")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(MACHINE)


def test_the_committed_file_is_what_the_fit_gives(calibration: Calibration) -> None:
    for constant, value in calibration.constants:
        assert constant.of(MACHINE) == pytest.approx(value, rel=2e-3), constant.path


def test_leave_one_out_stays_within_the_promise(calibration: Calibration) -> None:
    assert len(calibration.left_out) == 12
    assert mean_error(calibration.left_out) < 0.04
    assert worst_error(calibration.left_out) < 0.10


def test_in_sample_errors_are_those_of_the_documentation(calibration: Calibration) -> None:
    assert mean_error(calibration.in_sample) < 0.017
    assert worst_error(calibration.in_sample) < 0.032


def test_decode_throughputs_were_never_fitted_and_are_within_ten_percent(calibration: Calibration) -> None:
    assert [row.published_tok_per_s for row in calibration.decode] == [38.28, 11.52, 0.83]
    assert worst_error(calibration.decode) < 0.10


def test_ablations_are_predicted_with_the_errors_stated(calibration: Calibration) -> None:
    errors = {row.name: row.error for row in calibration.ablations}
    assert abs(errors["opt-30b no overlapping"]) < 0.05
    assert abs(errors["opt-175b no overlapping"]) < 0.17
    assert abs(errors["opt-30b no CPU compute"]) < 0.22
    assert abs(errors["opt-175b no CPU compute"]) < 0.12
    assert abs(errors["opt-30b DeepSpeed policy"]) < 0.13
    small = next(row for row in calibration.ablations if row.name == "opt-175b DeepSpeed policy")
    assert round(small.predicted_tok_per_s, 2) == small.published_tok_per_s == 0.01


def test_an_ablation_loses_throughput_as_the_paper_says(calibration: Calibration) -> None:
    whole = {"opt-30b": 7.32, "opt-175b": 0.69}
    for row in calibration.ablations:
        assert row.published_tok_per_s < whole[row.name.split()[0]]
    predicted = {row.name: row.predicted_tok_per_s for row in calibration.ablations}
    everything = {run.model.name: predict(run, calibration.hardware, get("roofline"))[0] for run in runs()[5:10:4]}
    for name, throughput in predicted.items():
        assert throughput <= everything[name.split()[0]] * (1 + 1e-9)


def test_the_published_model_misses_its_own_runs_by_what_the_documentation_says(calibration: Calibration) -> None:
    errors = [row.error for row in calibration.flexgen]
    assert min(errors) == pytest.approx(-0.778, abs=0.002)
    assert max(errors) == pytest.approx(1.409, abs=0.002)


def test_every_constant_is_within_its_physical_bound(calibration: Calibration) -> None:
    assert len(calibration.constants) <= 10
    for path, quantity in quantities(calibration.hardware):
        assert quantity.effective <= quantity.value, path
    for constant, value in calibration.constants:
        assert 0 < value <= constant.upper
        assert constant.upper == 1


def test_a_left_out_constant_falls_back_to_its_prior_whatever_the_machine_says() -> None:
    """Leaving out everything must not remember the machine that the fit starts from."""
    spoiled = with_constants(MACHINE, T4_FLEXGEN, [constant.prior / 3 for constant in T4_FLEXGEN])
    fitted = fit(spoiled, [], get("roofline"))
    for constant in T4_FLEXGEN:
        assert constant.of(fitted) == pytest.approx(constant.prior, rel=1e-3)


def test_the_fit_recovers_constants_that_made_the_runs() -> None:
    """Runs invented by the model itself, with rates away from the priors, give those rates back."""
    truth = {"gpu.memory_bytes_per_s": 0.7, "links.disk_read.bytes_per_s": 0.75}
    constants = [dataclasses.replace(constant, spread=1.0) for constant in T4_FLEXGEN if constant.path in truth]
    machine = with_constants(MACHINE, constants, [truth[constant.path] for constant in constants])
    invented = [
        dataclasses.replace(run, throughput_tok_per_s=predict(run, machine, get("roofline"))[0]) for run in runs()
    ]
    fitted = fit(MACHINE, invented, get("roofline"), constants)
    for constant in constants:
        assert constant.of(fitted) == pytest.approx(truth[constant.path], rel=0.02)


def test_published_runs_are_placed_where_flexgen_really_put_the_weights() -> None:
    row = next(run for run in runs() if run.throughput_tok_per_s == 7.32)
    assert row.policy.weights.gpu == pytest.approx(0.0834)
    assert row.policy.weights.cpu == pytest.approx(1 - 0.0834)
    assert row.policy.weights.disk == pytest.approx(0, abs=1e-9)
    assert row.projected
    assert not runs()[0].projected


@pytest.mark.parametrize("run", runs(), ids=lambda run: run.name)
def test_every_published_run_fits_the_machine_it_ran_on(run: Run) -> None:
    """All of the memory: the authors did not keep a tenth of it free."""
    cost = estimate(run.policy, hardware=MACHINE, model=run.model, workload=run.workload, usable_fraction=1.0)
    assert cost.feasible, cost.peak_bytes


def test_without_a_disk_30b_runs_as_before_and_175b_does_not_fit() -> None:
    """The paper's "no disk": 7.32 again, and out of memory."""
    diskless = with_overrides(MACHINE, disk=0.0)
    small, large = (next(run for run in runs() if run.throughput_tok_per_s == rate) for rate in (7.32, 0.69))
    assert predict(small, diskless, get("roofline")) == predict(small, MACHINE, get("roofline"))
    for run, fits in ((small, True), (large, False)):
        cost = estimate(run.policy, hardware=diskless, model=run.model, workload=run.workload, usable_fraction=1.0)
        assert cost.feasible is fits


def test_a_projected_run_repeats_the_first_decode_step() -> None:
    """By hand: 31 steps that each attend to prompt_len + 1 tokens take less than 31 growing ones."""
    run = next(run for run in runs() if run.throughput_tok_per_s == 7.32)
    grown = dataclasses.replace(run, projected=False)
    roofline = get("roofline")
    faster, slower = predict(run, MACHINE, roofline)[1], predict(grown, MACHINE, roofline)[1]
    # CPU attention is linear in the context: the mean of 513 … 543 is 528.
    assert slower < faster < slower * 528 / 513


def test_the_small_batch_is_the_least_that_the_link_allows() -> None:
    small = next(a for a in ablations() if a.variant == "DeepSpeed policy" and a.run.model.name == "opt-30b")
    weights_bytes = small.run.model.layer_weight_bytes(compressed=False) * small.run.model.num_layers
    assert small.published_tok_per_s is not None
    passes_per_s = small.published_tok_per_s / small.run.policy.block_size
    assert weights_bytes * passes_per_s < 15.75e9 < weights_bytes * small.published_tok_per_s / 4
    assert math.log2(small.run.policy.block_size).is_integer()


def test_the_command_prints_writes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved, figure, data = tmp_path / "machine.json", tmp_path / "errors.svg", tmp_path / "calibration.json"
    assert main(["--save", str(saved), "--plot", str(figure), "--json", str(data)]) == 0
    printed = capsys.readouterr().out
    assert "-77.8 %" in printed
    assert "+140.9 %" in printed
    assert Hardware.from_file(saved).name == "t4-flexgen"
    assert figure.read_bytes().startswith(b"<?xml")
    assert len(json.loads(data.read_text())["left_out"]) == 12


def test_the_command_refuses_what_it_cannot_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plot", str(tmp_path / "errors.gif")]) == 2
    assert "errors.gif" in capsys.readouterr().err
    assert main(["--gpu", "t4"]) == 2
    assert "--gpu" in capsys.readouterr().err
