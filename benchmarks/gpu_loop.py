"""The whole loop on a GPU: profile, predict, run, compare, from OPT-1.3B to 13B, a few minutes a call.

``python -m benchmarks.gpu_loop`` (``make bench-gpu``) runs the stages of :mod:`benchmarks.gpu_stages` one after
another on random weights, without a network. A call ends before a stage, or a run of a validation, that would go beyond
``--max-minutes``; the same command goes on where the last one ended, however it ended. All that must survive
between calls is in ``--out``: one JSON file a stage, its log, and ``loop.json`` with machine, driver, versions, commit
and date. What is on the third tier (``--offload-dir``) is made again where it is gone.

``--list`` shows the stages with the time that each should take. ``--device cpu`` runs the same loop in small.
"""

import argparse
import fcntl
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.gpu_stages import Place, Stage, discard_images, plan
from costmodel import records, units, words
from costmodel.commands import outcome, parsing, terminal
from costmodel.errors import InputError, TierwiseError
from runtime.progress_bar import Conversions

SCHEMA = "tierwise.gpu-loop/1"

AGAIN = 75
"""More is left: call again (EX_TEMPFAIL of sysexits.h)."""

ENDING_S = 15.0
"""Of a call's time, what is kept for a program to end in."""

EPILOG = """\
exit codes: 0 all done, 1 a stage failed (its log says why; a further call tries it again), 2 bad input,
75 more is left: call again, 130 interrupted
"""

_ORIGIN = """
import json, sys
from pathlib import Path
from runtime import environment, tiers
print(json.dumps(environment.describe(tiers.select_device(sys.argv[1]), Path(sys.argv[2]))))
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    return outcome.ended(lambda: _run(_parser().read(argv)))


def _parser() -> parsing.Parser:
    description, _, _ = (__doc__ or "").partition("\n\n``--list``")
    parser = parsing.Parser(prog="python -m benchmarks.gpu_loop", description=description, epilog=EPILOG)
    group = parser.add_argument_group("loop")
    group.add_argument(
        "--out", metavar="DIR", type=Path, default=Path("build/bench-gpu"), help="results (default: %(default)s)"
    )
    group.add_argument(
        "--offload-dir",
        metavar="DIR",
        type=Path,
        default=Path("build/bench-gpu-offload"),
        help="a directory on the disk that is the third tier: up to 33 GiB of OPT-13B at a time (default: %(default)s)",
    )
    group.add_argument("--max-minutes", metavar="N", type=_minutes, default=8.0, help="of a call (default: 8)")
    group.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(default: %(default)s)")
    group.add_argument("--list", action="store_true", help="show the stages and what is left, and run nothing")
    return parser


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text[:40]}: minutes are expected, such as 8") from None
    if not 0 < value < 1e4:
        raise argparse.ArgumentTypeError(f"is {text[:40]}: it must be greater than 0")
    return value


def _run(args: argparse.Namespace) -> int:
    dtype = "float16" if args.device == "cuda" else "bfloat16"
    place = Place(folder=args.out, offload=args.offload_dir, device=args.device, dtype=dtype)
    stages = plan(args.device)
    if args.list:
        _show(stages, place)
        return 0
    _check_device(args.device)
    for flag, folder in (("--out", args.out), ("--offload-dir", args.offload_dir)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{flag} is {folder}: it cannot be made: {error.strerror}") from None
    began = time.monotonic()
    with _alone(place.folder) as lock:
        return Loop(stages, place, _origin(place), lock, began=began, end=began + 60 * args.max_minutes).run()


@contextmanager
def _alone(folder: Path) -> Iterator[int]:
    """A lock on the results, which the programs that are started hold too: what a killed call left ends first."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            _say(f"another call, or what is left of one, is at work in {folder}: waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _check_device(device: str) -> None:
    """Raise :class:`InputError` where there is no such device."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device is cuda: torch {torch.__version__} sees no CUDA device here (--device cpu tries the loop out)"
        )


def _origin(place: Place) -> dict[str, Any]:
    """What this call runs on; asked of another process, so that this one takes nothing of the GPU."""
    command = [sys.executable, "-c", _ORIGIN, place.device, str(place.offload)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise TierwiseError(f"this machine cannot be described: {_last_line(done.stderr)}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Loop:
    """One call: as many stages as fit into the time from ``began`` to ``end``, by the clock ``now``.

    ``lock`` is an open file that the programs keep open as well.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        place: Place,
        origin: dict[str, Any],
        lock: int,
        *,
        began: float,
        end: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.place, self.origin, self._lock = place, origin, lock
        self.began, self.end, self._now = began, end, now
        self.record = self._recorded()
        # A stage that failed in an earlier call must not keep others from their turn.
        self.stages = sorted(stages, key=lambda stage: "error" in self.record["stages"].get(stage.name, {}))

    def run(self) -> int:
        """The exit code; see :data:`EPILOG`."""
        _say(f"{_machine(self.origin)}, commit {self.origin['commit']}: results in {self.place.folder}")
        failed = []
        for number, stage in enumerate(self.stages, start=1):
            if stage.is_done(self.place):
                continue
            if stage.needs is not None and not self.place.result(stage.needs).is_file():
                _say(f"[{number}/{len(self.stages)}] {stage.name}: {stage.needs} is missing")
                failed.append(stage)
                continue
            if not self._fits(stage):
                return self._stopped()
            _say(f"[{number}/{len(self.stages)}] {stage.name}: {stage.about}, {_about(stage.left_s(self.place))}")
            error = self._timed(stage)
            if error is not None:
                _say(f"[{number}/{len(self.stages)}] {stage.name} failed: {error}")
                failed.append(stage)
            elif not stage.is_done(self.place):
                return self._stopped()
            discard_images(stage, self.stages, self.place)
        if failed:
            names = ", ".join(stage.name for stage in failed)
            raise TierwiseError(f"{names} failed: see the logs in {self.place.folder}; a further call tries again")
        _say(f"all {len(self.stages)} stages are done: commit {self.place.folder} under benchmarks/results")
        return 0

    def _fits(self, stage: Stage) -> bool:
        """Whether what gets the stage further should end in time; an error where no call of this length is enough."""
        least_s, whole_s = stage.least_s(self.place) + ENDING_S, self.end - self.began
        if least_s > whole_s:
            raise InputError(
                f"{stage.name} needs {units.format_seconds(least_s)} in one go, by bytes and rates, and a call has "
                f"{units.format_seconds(whole_s)}: raise --max-minutes"
            )
        return least_s <= self.end - self._now()

    def _stopped(self) -> int:
        left = [stage for stage in self.stages if not stage.is_done(self.place)]
        left_s = sum(stage.left_s(self.place) for stage in left)
        _say(f"the time is up: {words.counted(len(left), 'stage')} left, {_about(left_s)}; the same command goes on")
        return AGAIN

    # ---------------------------------------------------------------- one stage

    def _timed(self, stage: Stage) -> str | None:
        """Run a stage and record it; what went wrong, if anything did."""
        began = self._now()
        error: str | None = "interrupted"
        try:
            error = self._attempt(stage)
        finally:
            entry = self.record["stages"].setdefault(stage.name, {"seconds": 0.0})
            entry["seconds"] = round(entry["seconds"] + self._now() - began, 1)
            entry["state"] = "failed" if error else stage.progress(self.place)
            entry.pop("error", None)
            if error:
                entry["error"] = error
            self._keep()
        return error

    def _attempt(self, stage: Stage) -> str | None:
        images = Conversions()
        try:
            stage.make_images(self.place, images)
        except TierwiseError as error:
            return str(error)
        finally:
            images.close()
        left_s = self.end - self._now() - ENDING_S
        if left_s <= 0:
            return None
        command = stage.words(self.place)
        if "runtime.validate" in command:
            command += ["--time-limit", f"{left_s:.0f}s"]
        before = stage.progress(self.place)
        log = self.place.folder / f"{stage.name}.log"
        code, last_line = _execute(command, log, limit_s=left_s + ENDING_S / 2, lock=self._lock)
        if code in (0, AGAIN) or stage.is_done(self.place):
            return None
        if self._now() > self.end - ENDING_S / 2:
            return None if stage.progress(self.place) != before else "the time was up before anything was done"
        return last_line.removeprefix("error: ") or f"exit code {code}"

    # ---------------------------------------------------------------- the record

    def _recorded(self) -> dict[str, Any]:
        """``loop.json``, with this call; :class:`InputError` where it is of another machine."""
        path = self.place.result("loop")
        found: dict[str, Any] = {"calls": [], "stages": {}}
        if path.is_file():
            found = records.check_schema(records.read_json(path), SCHEMA, where=str(path))
            before = found["calls"][0]
            if _machine(before) != _machine(self.origin):
                raise InputError(
                    f"--out is {self.place.folder}: its results are of {_machine(before)}, and this is "
                    f"{_machine(self.origin)}: name another folder"
                )
        found["calls"].append(self.origin)
        return found

    def _keep(self) -> None:
        records.write_json({"schema": SCHEMA, **self.record}, self.place.result("loop"))


def _execute(command: list[str], log: Path, *, limit_s: float, lock: int) -> tuple[int, str]:
    """Run a program, what it says on the terminal and in the log; its exit code and the last line.

    It is told to end after ``limit_s``.
    """
    last = ""
    with (
        log.open("a", encoding="utf-8") as kept,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=(lock,)
        ) as process,
    ):
        kept.write(f"$ {' '.join(command)}\n")
        timers = [threading.Timer(limit_s, process.terminate), threading.Timer(limit_s + ENDING_S / 2, process.kill)]
        for timer in timers:
            timer.daemon = True
            timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                kept.write(line)
                outcome.say(f"    {line}")
                last = line.strip() or last
            return process.wait(), last
        finally:
            for timer in timers:
                timer.cancel()
            process.terminate()


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it says nothing"


def _machine(origin: dict[str, Any]) -> str:
    """What must not change between two calls."""
    gpu, cpu = origin["gpu"], origin["cpu"]
    cores = f"{cpu['name']}, {words.counted(cpu['cores_usable'], 'core')}"
    return cores if gpu is None else f"{gpu['name']} ({units.format_bytes(gpu['memory_bytes'])}), {cores}"


def _about(seconds: float) -> str:
    return f"about {units.format_seconds(round(seconds))}"


def _say(text: str) -> None:
    outcome.say(f"{text}\n")


def _show(stages: Sequence[Stage], place: Place) -> None:
    table = terminal.table("stage", "what", ">takes about", "state")
    for stage in stages:
        table.add_row(stage.name, stage.about, units.format_seconds(round(stage.left_s(place))), stage.progress(place))
    left_s = sum(stage.left_s(place) for stage in stages if not stage.is_done(place))
    terminal.show(table, terminal.facts(("left", f"{_about(left_s)} by bytes and rates, at the most")))


if __name__ == "__main__":
    sys.exit(main())
