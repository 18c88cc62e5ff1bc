"""Execute a notebook from top to bottom, in a kernel of its own that forbids what a notebook must not need."""

import base64
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "notebooks"

CPU_LIMIT_S = 60.0
"""Seconds of processor time that one notebook may take."""

ALL_LIMIT_S = 180.0
"""Seconds of processor time that all notebooks together may take."""

WALL_LIMIT_S = 240
"""Seconds after which a cell that hangs is given up, on however busy a machine."""

FORBIDDEN = ("torch", "transformers")

_RULES = f"""\
import socket, sys, warnings

def refused(*args, **kwargs):
    raise OSError("a notebook runs from committed data: no network")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused

class Refusal:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FORBIDDEN!r}:
            raise ImportError("a notebook plans and draws: it does not import " + name)

sys.meta_path.insert(0, Refusal())
warnings.simplefilter("error")
"""

_COST = (
    "import time, warnings\nwarnings.simplefilter('ignore')  # the kernel's own, as it ends\nprint(time.process_time())"
)


class NotebookError(Exception):
    """A notebook failed, warned or took too long; the message names the cell."""


@dataclass(frozen=True, kw_only=True)
class Executed:
    """A notebook with its outputs, and the processor time of its kernel."""

    name: str
    node: NotebookNode
    cpu_s: float


def paths() -> list[Path]:
    """The notebooks, in order."""
    return sorted(FOLDER.glob("[0-9]*.ipynb"))


def read(path: Path) -> NotebookNode:
    """One notebook, as it is in the file."""
    return nbformat.read(path, as_version=4)


def execute(path: Path) -> Executed:
    """Run all cells; raises :class:`NotebookError` for an error, a warning, or too much processor time.

    The kernel runs in the notebook's folder, as an editor would have it. Warnings are errors there, and
    whatever is written to stderr is one; torch, transformers and the network are refused.
    """
    notebook = read(path)
    before, after = (nbformat.v4.new_code_cell(source) for source in (_RULES, _COST))
    notebook.cells = [before, *notebook.cells, after]
    search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # The editor's back end would write to the notebook on import; the figures show themselves.
    environment = {**os.environ, "PYTHONPATH": search_path, "MPLBACKEND": "agg", "CUDA_VISIBLE_DEVICES": ""}
    try:
        _run(notebook, folder=path.parent, environment=environment)
    except CellTimeoutError:
        raise NotebookError(f"{path.name}: a cell took more than {WALL_LIMIT_S} s") from None
    except CellExecutionError as error:
        raise NotebookError(f"{path.name}: {_failure(notebook, error)}") from None
    cpu_s = float(notebook.cells.pop()["outputs"][0]["text"])
    del notebook.cells[0]
    _check_silence(path, notebook)
    if cpu_s > CPU_LIMIT_S:
        raise NotebookError(f"{path.name}: {cpu_s:.0f} s of processor time: the limit is {CPU_LIMIT_S:.0f} s")
    return Executed(name=path.stem, node=notebook, cpu_s=cpu_s)


def _run(notebook: NotebookNode, *, folder: Path, environment: dict[str, str]) -> None:
    """All cells in a new kernel; client and kernel meet in files of a private folder rather than on ports."""
    with tempfile.TemporaryDirectory(prefix="tierwise-") as private:
        meeting = {
            "transport": "tcp" if os.name == "nt" else "ipc",
            "connection_file": str(Path(private) / "kernel.json"),
        }
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            config=Config({"AsyncKernelManager": meeting}),
            timeout=WALL_LIMIT_S,
            startup_timeout=WALL_LIMIT_S,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(env=environment)


def figures(executed: Executed) -> Iterator[tuple[str, bytes]]:
    """(file name, content) of every figure: a PNG and a PDF for each, named after notebook and cell."""
    for cell in executed.node.cells:
        for output in cell.get("outputs", ()):
            for kind, suffix in (("image/png", "png"), ("application/pdf", "pdf")):
                content = output.get("data", {}).get(kind)
                if content is not None:
                    yield f"{executed.name}-{cell['id']}.{suffix}", base64.b64decode(content)


def _failure(notebook: NotebookNode, error: CellExecutionError) -> str:
    """Which cell failed, with the end of its traceback."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "error":
                trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(output["traceback"]))
                return f"cell {cell['id']!r} failed\n{trace}"
    return str(error)


def _check_silence(path: Path, notebook: NotebookNode) -> None:
    """Raise where a cell wrote to stderr: warnings end up there."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output["output_type"] == "stream" and output["name"] == "stderr":
                raise NotebookError(f"{path.name}: cell {cell['id']!r} wrote to stderr\n{output['text']}")
