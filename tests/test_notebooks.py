"""Every notebook is valid, stripped, thin, and runs from committed data within its time; and the rules bite."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from PIL import Image

from notebooks import execution
from notebooks.execution import ROOT, NotebookError

PATHS = execution.paths()
NAMES = [path.stem for path in PATHS]

RESULT = re.compile(
    r"\d[\d.,]*\s*(?:%|token/s|tokens/s|GB/s|[GT]FLOP/s|ms\b|s\b|min\b|h\b|times\b|×|\$|dollars?\b|kWh\b)"
)
"""A number with the unit of a result: it belongs in a cell that computes it."""


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in execution.read(path).cells if cell.cell_type == "code"]


def made(folder: Path, *sources: str) -> Path:
    """A notebook of these code cells."""
    path = folder / "made.ipynb"
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def is_cut_off(figure: Path) -> bool:
    """Whether anything but white touches the border of a picture."""
    pixels = np.asarray(Image.open(figure).convert("L"))
    return bool((np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]) < 250).any())


def test_notebooks_are_numbered() -> None:
    assert len(NAMES) == len({name[:2] for name in NAMES}) > 0


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_notebook_is_valid_and_stripped(path: Path) -> None:
    notebook = execution.read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor >= 5) == (4, True), "cells have ids from 4.5 on"
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in code_cells(path):
        assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {}), cell.id
    assert path.read_text(encoding="utf-8") == nbformat.writes(notebook) + "\n", "write it with nbformat"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_notebook_begins_with_a_question_and_ends_with_what_it_shows(path: Path) -> None:
    first, *_, heading, last = execution.read(path).cells
    assert first.source.startswith(f"# {path.stem[:2]} ")
    assert "?**" in first.source, "the question, in bold"
    assert heading.source.startswith("## What this shows")
    assert last.cell_type == "code"


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_notebook_is_thin(path: Path) -> None:
    """What deserves a test is in a package: cells call, comprehend and print."""
    logic = (ast.FunctionDef, ast.ClassDef, ast.Lambda, ast.For, ast.While, ast.If, ast.Try, ast.With)
    for cell in code_cells(path):
        tree = ast.parse(cell.source)
        assert not [node for node in ast.walk(tree) if isinstance(node, logic)], cell.id
        beside_imports = [node for node in tree.body if not isinstance(node, ast.Import | ast.ImportFrom)]
        assert sum((node.end_lineno or 0) - node.lineno + 1 for node in beside_imports) <= 12, cell.id
        modules = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
        assert not [name for name in modules if name.startswith("matplotlib")], cell.id


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_prose_states_no_result(path: Path) -> None:
    for cell in execution.read(path).cells:
        if cell.cell_type == "markdown":
            assert RESULT.findall(cell.source) == [], cell.id


@pytest.mark.parametrize("text", ["3.5 % of", "at 12 token/s", "takes 4 s", "1,200 × as", "0.9 GB/s", "6 times"])
def test_a_result_in_prose_is_seen(text: str) -> None:
    assert RESULT.search(text)
    assert not RESULT.search("OPT-30B in 4 bits on a 24 GB card, arXiv 2303.06865, 1 sentence")


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_notebook_runs_from_committed_data(path: Path, tmp_path: Path) -> None:
    """As ``make notebooks`` runs it: no network, no torch, no warning, within its processor time."""
    command = [sys.executable, "-m", "notebooks", path.stem, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "What this shows" in (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
    figures = sorted(tmp_path.glob("*.png"))
    assert figures
    assert [figure.name for figure in figures if is_cut_off(figure)] == [], "something runs over the border"
    assert [figure.with_suffix(".pdf").read_bytes()[:4] for figure in figures] == [b"%PDF"] * len(figures)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('old', UserWarning)", "UserWarning: old"),
        ("import sys\nprint('noise', file=sys.stderr)", "wrote to stderr"),
        ("import torch", "torch"),
        ("import urllib.request\nurllib.request.urlopen('http://127.0.0.1:9')", "no network"),
    ],
)
def test_what_a_notebook_must_not_do_fails(source: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="(?s)cell '.*' .*" + said):
        execution.execute(made(tmp_path, "print('begun')", source))


def test_processor_time_is_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "CPU_LIMIT_S", 0.01)
    with pytest.raises(NotebookError, match=r"processor time: the limit is 0 s"):
        execution.execute(made(tmp_path, "print('begun')"))
