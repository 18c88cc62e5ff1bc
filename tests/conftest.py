"""Settings that every test shares, and a tiny OPT for those that ask for one."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a job in the background SIGINT is ignored, by children too; tests that interrupt themselves must be heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine must not fail a test (no deadline), and CI must fail on the same examples twice.
settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture(scope="module")
def model() -> "PreTrainedModel":
    """A tiny OPT with random weights."""
    from tests.checkpoints import random_model  # here: the tests of planning need neither torch nor transformers

    return random_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: "PreTrainedModel") -> Path:
    """The tiny OPT's checkpoint."""
    from tests.checkpoints import save

    return save(model, tmp_path_factory.mktemp("checkpoint") / "opt-tiny")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for the checkpoints and images of a module's tests."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network; the variables are read when huggingface_hub is imported, so its own are set."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache
