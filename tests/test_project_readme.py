"""Every command of the README runs, its Python too, and what it shows is what they print; so with the other documents.

Commands run in this process, each in a folder of its own, where the files that they name have been prepared. The quick
profile is run as shown; the ``my-machine.json`` of all other commands is a machine of the catalogue, because rates
measured beside other tests would change what is planned.
"""

import importlib
import io
import json
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from documents import ROOT, Shown, is_command, shown
from engines import save_model

from costmodel import records
from costmodel.commands import tierwise
from costmodel.hardware import Hardware
from costmodel.model import catalog_config
from costmodel.overrides import with_overrides
from costmodel.units import GiB

README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PIECES = [piece for path in DOCUMENTS for piece in shown(path)]
COMMANDS = [piece for piece in PIECES if piece.kind == "command" and piece.words[0] != "make"]
MAKE = [piece for piece in PIECES if piece.kind == "command" and piece.words[0] == "make"]
PYTHON = [piece for piece in PIECES if piece.kind == "python"]

SHORTER = {
    "bench": ["--num-prompts", "8"],
    "validate": ["--runs", "2", "--gen-len", "2", "--max-seconds", "0.2"],
    "gpu_loop": ["--list"],
}
"""What makes seconds of minutes; of the loop on a GPU only the plan is shown."""

STAND_INS = {'"facebook/opt-6.7b"': '"my-checkpoint"', "14GiB": "256MiB", "100GiB": "64MiB", "/mnt/nvme": "."}
"""In the README's Python: a checkpoint of random weights for 13 GB from the hub, and budgets that fit it."""

RUN_S = r"\d[\d.,]* m?s\)"
"""How long a search took, which no two runs agree on."""

VALIDATION = Path(__file__).parent.parent / "benchmarks/results/2026-11-29-epyc-2-cores-validation.json"

pytestmark = pytest.mark.xdist_group("readme")  # of several workers one measures the machine, once


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that commands name, and the directory in which temporary ones go."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "my-model").mkdir()
    (folder / "my-model/config.json").write_text(json.dumps(catalog_config("opt-1.3b")))
    save_model(folder / "my-checkpoint")
    request = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 4}}
    (folder / "requests.jsonl").write_text(json.dumps(request) + "\n")
    machine = with_overrides(Hardware.from_catalog("cpu-laptop"), gpu_memory=16 * GiB, disk=10**12)
    records.write_json(machine.to_dict(), folder / "my-machine.json")
    records.write_json(machine.to_dict(), folder / "calibrated.json")
    shutil.copy(VALIDATION, folder / "validation.json")
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of one command."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("runtime.machine._profiled", lambda *args: Hardware.from_catalog("cpu-laptop"))
    offload = prepared.with_name("readme-offload")  # where one command finds the images that another one made
    offload.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(offload))
    monkeypatch.setattr("sys.stdin", io.StringIO("the\n!exit\n"))  # what is said to chat
    return tmp_path / "here"


def runner(piece: Shown) -> Callable[[], int]:
    """How to run a command here; a program that nothing is known of fails the test."""
    program, *rest = piece.words
    name = Path(program).name
    if name == "tierwise":
        return lambda: tierwise.main([*rest, *SHORTER.get(rest[0], [])])
    if name.startswith("python") and rest[:1] == ["-m"]:
        module = importlib.import_module(rest[1])
        if not hasattr(module, "main"):
            module = importlib.import_module(f"{rest[1]}.__main__")
        return lambda: int(module.main([*rest[2:], *SHORTER.get(rest[1].rpartition(".")[2], [])]))
    return pytest.fail(f"{piece}: the test does not know how to run {program!r}: say so in {Path(__file__).name}")


@pytest.mark.parametrize("piece", COMMANDS, ids=str)
def test_command_runs_and_prints_what_is_shown(piece: Shown, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if any(word.endswith("validate") for word in piece.words):  # which makes the file that other commands find prepared
        (place / "validation.json").unlink()
    code = runner(piece)()
    told = capsys.readouterr()
    assert code == 0, f"{piece}: exit code {code}: {told.err}"
    assert told.out.strip(), f"{piece}: prints nothing"
    printed, expected = (re.sub(RUN_S, "0 s)", text) for text in (told.out, piece.output))
    missing = [line for line in expected.splitlines() if line not in printed.splitlines()]
    assert not missing, f"{piece}: prints other than the {len(missing)} lines {missing[:3]} that are shown:\n{printed}"
    assert expected in printed, f"{piece}: prints what is shown in another order"
    if piece.words[1] == "profile":
        assert Hardware.from_file("my-machine.json").links.disk_read.bytes_per_s.source == "profile"


@pytest.mark.parametrize("piece", PYTHON, ids=str)
def test_python_runs(piece: Shown, place: Path) -> None:
    code = piece.text
    for theirs, ours in STAND_INS.items():
        code = code.replace(theirs, ours)
    names: dict[str, object] = {}
    exec(compile(code, piece.where, "exec"), names)
    if "best" in names:
        assert names["best"].gap <= 1e-3  # type: ignore[attr-defined]


@pytest.mark.parametrize("piece", MAKE, ids=str)
def test_make_knows_its_targets(piece: Shown) -> None:
    """They install and run everything, so that they are only asked what they would do."""
    words = shlex.split(re.split(r" {2,}|;", piece.text)[0])
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{piece}: {done.stderr}"


def test_the_readme_shows_nothing_that_is_not_tested() -> None:
    kinds = {piece.where: piece.kind for piece in PIECES if piece.where.startswith("README.md:")}
    others = [where for where, kind in kinds.items() if kind == "other"]
    assert not others, f"{others}: neither commands, Python nor a list of folders: say in tests/documents.py what it is"
    assert list(kinds.values()).count("command") >= 15
    for piece in PIECES:
        if piece.kind == "listing" and piece.where.startswith("README.md:"):
            folders = [line.split()[0] for line in piece.text.splitlines()]
            assert [folder for folder in folders if not (ROOT / folder).is_dir()] == [], piece.where


def test_a_document_is_read_by_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "# Title\n\nText\n    that is no block.\n\n    tierwise search   # why\n\n    An answer\n      of two lines\n\n"
        "    make demo\n    make test\n\n```python\nimport this\n```\n\n    a/    folder\n\nor\n\n    x = 1\n"
    )
    (tmp_path / "a.md").write_text(text)
    monkeypatch.setattr("documents.ROOT", tmp_path)
    found = [(piece.where, piece.kind, piece.output) for piece in shown(tmp_path / "a.md")]
    assert found == [
        ("a.md:6", "command", "An answer\n  of two lines"),
        ("a.md:11", "command", ""),
        ("a.md:12", "command", ""),
        ("a.md:15", "python", ""),
        ("a.md:18", "listing", ""),
        ("a.md:22", "other", ""),
    ]
    assert is_command(".venv/bin/python -m runtime.chat")
    assert not is_command("makeshift")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_exist(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{path.name}: {target}"
