"""The promises that no single module can keep: pure imports, one version number, pinned versions, wired commands."""

import json
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent

# Prints which of the modules named in argv[2:] were loaded by running the code in argv[1].
_REPORT_LOADED = """
import json, sys
exec(sys.argv[1])
print(json.dumps(sorted(set(sys.argv[2:]) & set(sys.modules))))
"""

_IMPORT_EVERYTHING = """
import importlib, pkgutil, costmodel
names = [module.name for module in pkgutil.walk_packages(costmodel.__path__, "costmodel.")]
assert len(names) > 10, names
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
"""


def loaded_by(code: str, names: list[str]) -> list[str]:
    """Run ``code`` in a fresh interpreter; return those of the modules ``names`` that it loaded."""
    command = [sys.executable, "-W", "error", "-c", _REPORT_LOADED, code, *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins() -> dict[str, Version]:
    """Return the exact version that constraints.txt gives each distribution, by lower-case name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    exact = [line.partition("==") for line in lines if line and not line.startswith("#")]
    assert all(version for _, _, version in exact), "constraints.txt holds `name==version` lines only"
    return {name.lower(): Version(version) for name, _, version in exact}


def test_detector_sees_a_loaded_module() -> None:
    assert loaded_by("import decimal", ["decimal", "torch"]) == ["decimal"]


def test_importing_costmodel_loads_nothing_heavy() -> None:
    assert loaded_by("import costmodel", ["torch", "transformers", "pandas", "matplotlib", "scipy"]) == []


def test_no_module_of_costmodel_loads_torch_or_transformers() -> None:
    assert loaded_by(_IMPORT_EVERYTHING, ["torch", "transformers"]) == []


def test_version_is_the_top_entry_of_the_changelog() -> None:
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == project()["version"]


def test_torch_is_pinned_to_one_build() -> None:
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_constraints_hold_no_cuda_packages() -> None:
    assert [name for name in pins() if name.startswith(("nvidia", "cuda", "triton"))] == []


def test_every_dependency_is_pinned_within_its_range() -> None:
    extras = project()["optional-dependencies"].values()
    texts = [*project()["dependencies"], *(text for extra in extras for text in extra)]
    requirements = [Requirement(text) for text in texts if not text.startswith("tierwise[")]
    versions = pins()
    assert [str(wanted) for wanted in requirements if wanted.name.lower() not in versions] == []
    assert [str(wanted) for wanted in requirements if versions[wanted.name.lower()] not in wanted.specifier] == []


def declared_commands() -> dict[str, str]:
    return project()["scripts"] | project()["entry-points"]["tierwise.commands"]


@pytest.mark.parametrize("target", declared_commands().values(), ids=declared_commands().keys())
def test_declared_command_exists(target: str) -> None:
    assert callable(pkgutil.resolve_name(target))


def test_continuous_integration_script_is_executable() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory", "-C", ROOT], capture_output=True, text=True, check=True)
    targets = [line.split()[1] for line in done.stdout.splitlines()]
    assert targets == [
        "help",
        "demo",
        "test",
        "test-gpu",
        "lint",
        "bench",
        "bench-gpu",
        "notebooks",
        "clean",
        "distclean",
    ]
