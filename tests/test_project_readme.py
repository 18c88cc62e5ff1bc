"""The README's commands run, and what it shows is what they print."""

import io
import json
import re
import shlex
import tempfile
from pathlib import Path

import pytest

from costmodel.commands import tierwise
from costmodel.commands.search import main as search
from costmodel.hardware import Hardware
from costmodel.model import catalog_config

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
LINES = [line.split("#")[0].strip() for line in README.splitlines() if line.startswith("    tierwise ")]
RUNTIME = [line for line in LINES if line.split()[1] in ("profile", "bench", "validate", "generate", "batch", "chat")]
COMMANDS = [line for line in LINES if line not in RUNTIME]
SHORTER = {"validate": ["--runs", "2", "--gen-len", "2", "--max-seconds", "0.2"]}
"""What makes a command that takes minutes take seconds."""


def test_there_are_commands_to_run() -> None:
    assert len(COMMANDS) >= 7


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my-machine.json").write_text(json.dumps(Hardware.from_catalog("rtx3060").to_dict()))
    Path("my-model").mkdir()
    Path("my-model/config.json").write_text(json.dumps(catalog_config("opt-13b")))
    assert tierwise.main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert len(capsys.readouterr().out.splitlines()) > 10


@pytest.mark.parametrize("command", RUNTIME)
def test_runtime_command_runs(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engines import save_model
    from test_profiler_command import TINY

    from profiler import effort

    monkeypatch.setitem(effort.EFFORTS, "quick", TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TIERWISE_CACHE", str(tmp_path / "cache"))
    laptop = json.dumps(Hardware.from_catalog("cpu-laptop").to_dict())
    Path("my-machine.json").write_text(laptop)
    monkeypatch.setattr("runtime.machine._profiled", lambda *args: Hardware.from_catalog("cpu-laptop"))
    save_model(Path("my-checkpoint"))
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 4}}
    Path("requests.jsonl").write_text(json.dumps(request) + "\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n!exit\n"))
    words = shlex.split(command)[1:]
    assert tierwise.main([*words, *SHORTER.get(words[0], [])]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


def test_the_printed_answer_is_the_one_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = re.search(r"^    (Best policy:.*?)\n\n    Proof", README, flags=re.MULTILINE | re.DOTALL)
    assert shown is not None
    assert search(["--gpu", "t4", "--model", "opt-175b"]) == 0
    printed = capsys.readouterr().out
    assert re.sub(r"^    ", "", shown.group(1), flags=re.MULTILINE) in printed


def test_the_python_example_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    names: dict[str, object] = {}
    exec(code.group(1), names)
    assert names["best"].gap <= 1e-3  # type: ignore[attr-defined]


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", README):
        assert (Path(__file__).parent.parent / target).is_file(), target
