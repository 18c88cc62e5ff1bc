"""Dummy models: random weights that compute finite logits, the same in every run, for any known shape."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from costmodel.errors import InputError
from costmodel.model import catalog_config
from runtime import dummy
from runtime.disk import DiskError
from runtime.image import Image
from runtime.quantization import Quantized4bitLinear, dequantize_linear
from tests.checkpoints import AS_350M, SHAPE
from tests.images import made, read_unit

CONFIG = {"model_type": "opt", **SHAPE, "activation_function": "relu"}


def config_file(folder: Path, **more: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | more))
    return folder / "config.json"


def state(image: Image) -> dict[str, torch.Tensor]:
    """All weights under transformers' names, dequantised."""
    found = image.architecture
    assert found.positions is not None
    units: dict[str, Any] = {
        "table": (found.table,),
        "positions": (found.positions,),
        "embedding": found.embedding,
        "head": found.head,
    }
    weights = {}
    for name, _ in image.layout.units:
        tensors = read_unit(image, name)
        for spec in units.get(name, found.layer):
            tensor = tensors[spec.name]
            if isinstance(tensor, Quantized4bitLinear):
                tensor = dequantize_linear(tensor, dtype=image.layout.dtype)
            weights[spec.source.format(layer=name.removeprefix("layers."))] = tensor
    return weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("more", [{}, AS_350M, {"tie_word_embeddings": False}])
def test_logits_are_finite_and_differ(
    tmp_path: Path, dtype: torch.dtype, compressed: bool, more: dict[str, Any]
) -> None:
    config = config_file(tmp_path / "tiny", **more)
    image = made(f"dummy:{config}", tmp_path, dtype=dtype, compressed=compressed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(CONFIG | more))).to(dtype).eval()
    missing, unexpected = model.load_state_dict(state(image), strict=False)
    assert unexpected == []
    assert set(missing) <= ({"lm_head.weight"} if image.architecture.tied_head else set())
    logits = model(torch.arange(2, 18).view(2, 8)).logits
    assert logits.isfinite().all()
    assert logits.std(dim=-1).min() > 0


def test_values_are_those_that_the_documentation_tells(tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny")
    weights = state(made(f"dummy:{config}", tmp_path))
    for name, weight in weights.items():
        if weight.dim() == 2:
            assert abs(float(weight.std()) - 0.02) < 0.001, name
            assert abs(float(weight.mean())) < 0.001, name
            assert len(weight.unique(dim=0)) == len(weight), name
        else:
            assert (weight == (1 if name.endswith("norm.weight") else 0)).all(), name
    matrices = [weight.reshape(-1)[:1000] for weight in weights.values() if weight.dim() == 2]
    assert len(torch.stack(matrices).unique(dim=0)) == len(matrices)


def test_compressed_values_have_the_same_spread(tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny")
    image = made(f"dummy:{config}", tmp_path, compressed=True)
    for number in range(2):
        for name, weight in read_unit(image, f"layers.{number}").items():
            if isinstance(weight, Quantized4bitLinear):
                values = dequantize_linear(weight, dtype=torch.float32)
                assert abs(float(values.std()) - 0.02) < 0.001, name
                assert abs(float(values.mean())) < 0.001, name


def test_types_differ_by_rounding_alone_and_runs_not_at_all(tmp_path: Path) -> None:
    config = config_file(tmp_path / "tiny")
    exact, rounded = (
        state(made(f"dummy:{config}", tmp_path, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)
    )
    assert all(torch.equal(exact[name].bfloat16(), rounded[name]) for name in exact)
    again = made(f"dummy:{config}", tmp_path / "again")
    assert again.path.read_bytes() == made(f"dummy:{config}", tmp_path).path.read_bytes()


def test_values_repeat_only_after_a_period(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dummy, "PERIOD_VALUES", 1009)
    image = made(f"dummy:{config_file(tmp_path / 'tiny')}", tmp_path)
    table = read_unit(image, "table")["tokens"]
    assert isinstance(table, torch.Tensor)
    flat = table.reshape(-1)
    assert torch.equal(flat[1009:], flat[:-1009])
    assert len(flat[:1009].unique()) > 1000
    assert len(table.unique(dim=0)) == len(table)


@pytest.mark.parametrize("form", ["{}", "{}/config.json"])
def test_a_path_names_the_model_after_its_folder(tmp_path: Path, form: str) -> None:
    config_file(tmp_path / "my-model")
    image = made("dummy:" + form.format(tmp_path / "my-model"), tmp_path)
    assert (image.name, image.tokenizer_folder) == ("my-model", None)
    assert image.path.parent.name.startswith("dummy-my-model-float32-")
    assert image.config == CONFIG
    assert json.loads((image.path.parent / "manifest.json").read_text())["source"].startswith("dummy:")


def test_catalogue_model_that_does_not_fit_the_disk(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match=r"the image of opt-175b takes 32\d\.?\d* GiB, but only .* are free: make room"):
        made("dummy:opt-175b", tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["opt-125m", "facebook/OPT-125M"])
def test_catalogue_model(tmp_path: Path, name: str) -> None:
    assert dummy.dummy_config(f"dummy:{name}") == ("opt-125m", catalog_config("opt-125m"))


def test_folder_of_a_models_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere: a bare name is the catalogue's, a path is a path."""
    monkeypatch.chdir(tmp_path)
    config_file(tmp_path / "opt-125m")
    assert dummy.dummy_config("dummy:opt-125m")[1] == catalog_config("opt-125m")
    assert dummy.dummy_config("dummy:./opt-125m")[1] == CONFIG


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("dummy:opt-31b", "model 'dummy:opt-31b': unknown model 'opt-31b': did you mean 'opt-30b'"),
        ("dummy:", "model 'dummy:': unknown model '': "),
        ("dummy:/nowhere/config.json", "unknown model '/nowhere/config.json': .* but '/nowhere/config.json' is none"),
    ],
)
def test_unknown_models(tmp_path: Path, model: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        made(model, tmp_path)
