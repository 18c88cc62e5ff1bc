"""Ctrl-C and SIGTERM end every command in one sentence, also while its modules are imported."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MOMENTS = [
    ("costmodel.search --model opt-30b --hardware t4", "costmodel.commands.signals"),
    ("costmodel.search --model opt-30b --hardware t4", "pydantic_core"),
    ("costmodel.frontier --help", "numpy"),
    ("costmodel.commands.tierwise search --help", "pydantic_core"),
    ("costmodel.commands.tierwise generate --model none --prompt a", "torch._C"),
    ("profiler --quick --out x.json", "costmodel.commands.signals"),
    ("profiler --quick --out x.json", "torch._C"),
    ("runtime.generate --help", "costmodel.commands.signals"),
    ("runtime.generate --model none --prompt a", "costmodel.errors"),
    ("runtime.generate --model none --prompt a", "torch._C"),
    ("runtime.chat --help", "pydantic_core"),
    ("runtime.batch --help", "costmodel.errors"),
    ("runtime.bench --model dummy:opt-125m", "torch._C"),
    ("runtime.validate --help", "numpy"),
]
"""Commands, and the module after whose import the signal comes; Python tells of each with ``-X importtime``."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("command", "module"), MOMENTS)
def test_a_signal_while_modules_are_imported_is_one_sentence(
    tmp_path: Path, command: str, module: str, number: signal.Signals
) -> None:
    name, *flags = command.split()
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", name, *flags],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.rpartition("|")[2].strip() == module:
                process.send_signal(number)
                break
        out, err = process.communicate(timeout=60)
    told = [line for line in err.splitlines(keepends=True) if not line.startswith("import time:")]
    assert (process.returncode, out, "".join(told)) == (130, "", "error: interrupted\n")


def test_ignored_signals_stay_ignored(tmp_path: Path) -> None:
    """As under ``nohup``: a job goes on when its terminal closes."""
    code = (
        "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN);"
        "from costmodel.commands import outcome;"
        "raise SystemExit(outcome.ended(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (7, "")


def test_a_program_that_imports_the_packages_keeps_its_own_handlers() -> None:
    code = "import signal, costmodel, runtime, profiler; print(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("True\n", "")
