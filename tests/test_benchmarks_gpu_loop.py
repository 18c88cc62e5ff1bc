"""The GPU's loop without a GPU: bounded calls that go on where the last one ended, killed, failed or out of time."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime_validate import TINY, killed_once_there

from benchmarks import gpu_loop, gpu_stages
from benchmarks.gpu_stages import Place, Stage, Validating, plan, weight_bytes
from costmodel.hardware import Hardware
from costmodel.validation import Validation

COPY = "import pathlib, sys; pathlib.Path(sys.argv[2]).write_bytes(pathlib.Path(sys.argv[1]).read_bytes())"
ORIGIN = {"gpu": None, "cpu": {"name": "A CPU", "cores_usable": 2}, "commit": "abc", "date": "2026-01-01"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A model of 0.2 MB and a machine of the catalogue, which stands for a profile."""
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    (tmp_path / "laptop.json").write_text(json.dumps(Hardware.from_catalog("cpu-laptop").to_dict()))
    (tmp_path / "out").mkdir()
    return Place(folder=tmp_path / "out", offload=tmp_path / "disk", device="cpu", dtype="bfloat16")


def stages_of(tmp_path: Path, runs: int = 3) -> list[Stage]:
    """The stages of the plan with a model, a profile and runs that take no time."""
    model = f"dummy:{tmp_path / 'tiny.json'}"
    profile, *validations, _ = gpu_stages._of_model(
        "opt-125m", "quick", capped=("14MiB", "1MiB"), runs=(runs, 1), max_seconds=1, limits=True
    )
    found: list[Stage] = [
        Stage(
            name=profile.name,
            about="a copy",
            model=model,
            command=("-c", COPY, str(tmp_path / "laptop.json"), "{out}"),
            takes_s=0.1,
        )
    ]
    swaps = {"dummy:opt-125m": model, "64": "8", "8": "4", "1": "0.05"}
    for one in validations:
        assert isinstance(one, Validating)
        command = [swaps.get(word, word) for word in one.command]
        command[command.index("--runs") + 1] = str(one.runs)
        if "--gpu-memory" not in command:
            command += ["--gpu-memory", "17MiB"]
        found.append(
            Validating(
                name=one.name,
                about=one.about,
                model=model,
                command=tuple(command),
                needs=one.needs,
                image_forms=one.image_forms,
                runs=one.runs,
                max_seconds=one.max_seconds,
            )
        )
    return found


def call(place: Place, *more: str) -> int:
    return gpu_loop.main(["--device", "cpu", "--out", str(place.folder), "--offload-dir", str(place.offload), *more])


def test_the_loop_runs_to_its_end_and_says_where(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_loop, "plan", lambda device: stages_of(tmp_path))
    assert call(place) == 0
    told = capfd.readouterr().out
    assert "[2/3] validate-opt-125m-capped: 3 policies in 14MiB + 1MiB" in told
    assert "all 3 stages are done" in told
    found = Validation.from_file(place.result("validate-opt-125m-capped"))
    assert len(found.measurements) == 3
    assert found.hardware.capacity_bytes["gpu"] == 14 * 2**20
    record = json.loads(place.result("loop").read_text())
    assert record["schema"] == "tierwise.gpu-loop/1"
    assert record["stages"]["validate-opt-125m-capped"]["state"] == "3 of 3 runs"
    assert {"date", "commit", "torch", "cpu", "gpu"} <= record["calls"][0].keys()
    assert "predicted" in (place.folder / "validate-opt-125m-capped.log").read_text()
    assert not list(place.offload.iterdir())  # images go with their model's last stage
    assert call(place) == 0
    assert "all 3 stages are done" in capfd.readouterr().out


def test_a_killed_call_is_gone_on_with(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests'); import test_benchmarks_gpu_loop as t\n"
        "t.gpu_loop.plan = lambda device: t.stages_of(Path(sys.argv[1]), runs=12)[:2]\n"
        "t.gpu_loop.main(sys.argv[2:])"
    )
    flags = ["--device", "cpu", "--out", str(place.folder), "--offload-dir", str(place.offload)]
    path = place.result("validate-opt-125m-capped")
    killed_once_there(["-c", code, str(tmp_path), *flags], path)
    killed = Validation.from_file(path)
    monkeypatch.setattr(gpu_loop, "plan", lambda device: stages_of(tmp_path, runs=12)[:2])
    assert call(place) == 0
    whole = Validation.from_file(path)
    assert whole.measurements[: len(killed.measurements)] == killed.measurements
    assert len(whole.measurements) == len(whole.drawn) == len(killed.drawn)


class Clock:
    """Time passes only while a stage runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stage_s: float) -> None:
        self.now_s = 0.0
        real = gpu_loop._execute

        def execute(*args: Any, **options: Any) -> tuple[int, str]:
            self.now_s += stage_s
            return real(*args, **options)

        monkeypatch.setattr(gpu_loop, "_execute", execute)

    def __call__(self) -> float:
        return self.now_s


def plain(name: str, code: str = "import sys; open(sys.argv[1], 'w').write('[]')", takes_s: float = 100.0) -> Stage:
    return Stage(name=name, about="", model="dummy:x", command=("-c", code, "{out}"), takes_s=takes_s)


def looped(stages: list[Stage], place: Place, clock: Clock, seconds: float) -> int:
    with (place.folder / ".lock").open("w") as lock:
        began = clock()
        return gpu_loop.Loop(stages, place, ORIGIN, lock.fileno(), began=began, end=began + seconds, now=clock).run()


def test_a_call_ends_before_a_stage_that_would_end_too_late(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch, 100.0)
    stages = [plain(name) for name in "abcde"]
    # 130 s each, its start and what is kept for the end included: the third would end at 330 s.
    assert looped(stages, place, clock, 329) == 75
    assert sorted(path.name for path in place.folder.glob("?.json")) == ["a.json", "b.json"]
    assert "the time is up: 3 stages left, about 5 min 45 s" in capfd.readouterr().out
    assert looped(stages, place, clock, 329) == 75
    assert looped(stages, place, clock, 329) == 0
    record = json.loads(place.result("loop").read_text())
    assert len(record["calls"]) == 3
    assert record["stages"]["e"] == {"seconds": 100.0, "state": "done"}


def test_a_stage_for_which_no_call_is_long_enough_is_an_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(gpu_loop.InputError, match="a needs 2 min 10 s in one go.*: raise --max-minutes"):
        looped([plain("a")], place, Clock(monkeypatch, 1.0), 129)


def test_a_failed_stage_is_told_and_tried_again_after_the_others(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = plain("broken", "import sys; print('so it is'); sys.exit(3)")
    stages = [broken, plain("after")]
    clock = Clock(monkeypatch, 1.0)
    with pytest.raises(gpu_loop.TierwiseError, match="broken failed: see the logs"):
        looped(stages, place, clock, 1000)
    assert place.result("after").is_file()
    record = json.loads(place.result("loop").read_text())
    assert record["stages"]["broken"] == {"seconds": 1.0, "state": "failed", "error": "so it is"}
    assert "broken failed: so it is" in capfd.readouterr().out
    mended = [plain("broken"), plain("later")]
    assert looped(mended, place, clock, 1000) == 0
    told = capfd.readouterr().out
    assert told.index("later") < told.index("broken")
    assert "error" not in json.loads(place.result("loop").read_text())["stages"]["broken"]


def test_results_of_another_machine_are_not_added_to(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, 1.0)
    assert looped([plain("a")], place, clock, 1000) == 0
    monkeypatch.setitem(ORIGIN, "cpu", {"name": "Another", "cores_usable": 2})
    with pytest.raises(gpu_loop.InputError, match="its results are of A CPU, 2 cores, and this is Another, 2 cores"):
        looped([plain("b")], place, clock, 1000)


def test_without_a_gpu_it_refuses_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_loop.main(["--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: --device is cuda: torch ")
    assert len(told.err.splitlines()) == 1
    assert told.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max-minutes", "0"], "--max-minutes is 0: it must be greater than 0"),
        (["--max-minutes", "x"], "minutes are"),
    ],
)
def test_wrong_flags(more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_loop.main(more) == 2
    assert message in capsys.readouterr().err


def test_the_plan_covers_what_it_should(tmp_path: Path) -> None:
    """Three models, each with memory for all three tiers and with all that is free, and a thorough profile."""
    stages = plan("cuda")
    commands = [" ".join(stage.command) for stage in stages]
    for model in ("opt-1.3b", "opt-6.7b", "opt-13b"):
        runs = [command for command in commands if "runtime.validate" in command and f"dummy:{model} " in command]
        assert [("--gpu-memory" in command) for command in runs] == [True, False]
    assert sum("--thorough" in command for command in commands) == 1
    place = Place(folder=tmp_path, offload=tmp_path, device="cuda", dtype="float16")
    for stage in stages:  # by bytes at 1 GB/s each way: no part is too long for a call of eight minutes
        assert stage.least_s(place) + gpu_loop.ENDING_S < 8 * 60, stage.name
        assert stage.progress(place) == "to be run"
    assert sum(stage.left_s(place) for stage in stages) < 40 * 60


@pytest.mark.parametrize(
    ("model", "published_billions"), [("dummy:opt-1.3b", 1.316), ("dummy:opt-6.7b", 6.658), ("dummy:opt-13b", 12.853)]
)
def test_bytes_of_an_image_follow_the_published_parameters(model: str, published_billions: float) -> None:
    assert weight_bytes(model, compressed=False) == pytest.approx(2e9 * published_billions, rel=2e-3)
    assert weight_bytes(model, compressed=True) < 0.35 * weight_bytes(model, compressed=False)
