"""A call in a process of its own: what comes back, what is raised, and that nothing outlives the caller."""

import operator
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from costmodel.errors import InfeasibleError, TierwiseError
from runtime import own_process


def refuse() -> None:
    raise InfeasibleError("nothing fits", reason={"tier": "gpu"})


def tidy(started: Path, tidied: Path) -> None:
    """Say when it begins and, told to end, when it has tidied up."""
    try:
        started.write_text(str(os.getpid()))
        time.sleep(60)
    finally:
        tidied.write_text("yes")


def appeared(path: Path) -> str:
    """The file's text, once there is some."""
    patience = time.monotonic() + 60
    while time.monotonic() < patience:
        if path.exists() and (text := path.read_text()):
            return text
        time.sleep(0.01)
    raise AssertionError(f"no {path}")


def gone(pid: int) -> bool:
    """Whether the process ends within 30 seconds."""
    patience = time.monotonic() + 30
    while time.monotonic() < patience:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":  # ended, and not yet seen to by the server that it is a copy of
            return True
        time.sleep(0.01)
    return False


def test_what_it_returns_comes_from_another_process_every_time() -> None:
    first, second = own_process.call(os.getpid), own_process.call(os.getpid)
    assert len({first, second, os.getpid()}) == 3


def test_errors_are_raised_here_as_they_were_there() -> None:
    with pytest.raises(InfeasibleError, match="nothing fits") as refused:
        own_process.call(refuse)
    assert refused.value.reason == {"tier": "gpu"}
    with pytest.raises(ZeroDivisionError) as broken:
        own_process.call(operator.truediv, 1, 0)
    assert any("Traceback" in note for note in broken.value.__notes__)


def test_an_end_without_an_answer_is_one_sentence() -> None:
    with pytest.raises(TierwiseError, match=r"ended without a result \(exit code 7\)"):
        own_process.call(os._exit, 7)
    with pytest.raises(TierwiseError, match="was killed: the system may have wanted its memory"):
        own_process.call(signal.raise_signal, signal.SIGKILL)


def test_an_interrupted_call_lets_it_tidy_up(tmp_path: Path) -> None:
    def interrupt() -> None:
        appeared(tmp_path / "started")
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        own_process.call(tidy, tmp_path / "started", tmp_path / "tidied")
    assert (tmp_path / "tidied").read_text() == "yes"
    assert gone(int((tmp_path / "started").read_text()))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_does_not_outlive_a_killed_caller(tmp_path: Path, how: signal.Signals) -> None:
    root = Path(__file__).parent
    code = f"""
import sys
sys.path[:0] = [{str(root)!r}, {str(root.parent)!r}]
from pathlib import Path
import test_runtime_own_process as tests
from runtime import own_process
own_process.call(tests.tidy, Path(sys.argv[1]), Path(sys.argv[2]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "started"), str(tmp_path / "tidied")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as caller:
        pid = int(appeared(tmp_path / "started"))
        caller.send_signal(how)
    assert gone(pid)
