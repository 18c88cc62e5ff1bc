"""Images hold transformers' parameters, appear whole or not at all, and are made once for each content."""

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from runtime import checkpoint as checkpoint_module
from runtime import conversion
from runtime.image import Image
from runtime.quantization import Quantized4bitLinear, dequantize_linear, pack_linear, quantize, quantize_linear
from tests.checkpoints import AS_350M, SHAPE, Form, random_model, save
from tests.images import DTYPES, made, read_unit


def fields(image: Image) -> Iterator[tuple[str, str, Tensor | Quantized4bitLinear]]:
    """Unit, key in transformers and value of every tensor of an image."""
    found = image.architecture
    for name, _ in image.layout.units:
        layer = int(name.removeprefix("layers.")) if name.startswith("layers.") else None
        specs = {
            "table": (found.table,),
            "positions": (found.positions,) if found.positions else (),
            "embedding": found.embedding,
            "head": found.head,
        }.get(name, found.layer)
        tensors = read_unit(image, name)
        assert set(tensors) == {spec.name for spec in specs}
        for spec in specs:
            yield name, spec.source.format(layer=layer), tensors[spec.name]


def assert_holds(image: Image, model: PreTrainedModel, *, stored: torch.dtype = torch.float32) -> None:
    """Every field is the parameter as stored, converted: to the image's type, or to 4 bits."""
    dtype = image.layout.dtype
    parameters = {name: parameter.detach().to(stored) for name, parameter in model.named_parameters()}
    seen = set()
    for unit, key, found in fields(image):
        if isinstance(found, Quantized4bitLinear):
            assert unit.startswith("layers.")
            parameter_dtype = torch.float16 if dtype == torch.float16 else torch.bfloat16
            expected = pack_linear(quantize(parameters[key], group_size=64, parameter_dtype=parameter_dtype))
            assert torch.equal(found.packed, expected.packed)
            assert torch.equal(found.scales_and_zeros, expected.scales_and_zeros)
            assert (found.out_features, found.group_size) == (expected.out_features, 64)
        else:
            assert found.dtype == dtype
            assert torch.equal(found, parameters[key].to(dtype)), key
            assert not (image.layout.compressed and unit.startswith("layers.") and found.dim() > 1)
        seen.add(key)
    assert seen == set(parameters)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
def test_image_holds_the_models_parameters(
    tmp_path: Path, model: PreTrainedModel, dtype: torch.dtype, compressed: bool, stored: torch.dtype
) -> None:
    folder = save(model, tmp_path / "opt-tiny", dtype=stored)
    image = made(folder, tmp_path, dtype=dtype, compressed=compressed)
    assert_holds(image, model, stored=stored)
    assert (image.name, image.config["hidden_size"], image.tokenizer_folder) == ("opt-tiny", 64, None)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, AS_350M, {"enable_bias": False}])
@pytest.mark.parametrize("compressed", [False, True])
def test_variants(tmp_path: Path, config: dict[str, Any], compressed: bool) -> None:
    model = random_model(**config)
    assert_holds(made(save(model, tmp_path / "m"), tmp_path, compressed=compressed), model)


@pytest.mark.parametrize("form", ["safetensors", "bin", "old bin"])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_forms_of_checkpoints(tmp_path: Path, model: PreTrainedModel, form: Form, prefix: str) -> None:
    folder = save(model, tmp_path / "m", form=form, prefix=prefix, shards=3, head=True)
    assert_holds(made(folder, tmp_path, compressed=True), model)


@pytest.mark.parametrize("compressed", [False, True])
def test_conversion_in_small_parts_is_the_same(
    tmp_path: Path, folder: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, compressed: bool
) -> None:
    """Parts that end anywhere, as those of a token table of gigabytes do."""
    whole = made(folder, tmp_path / "whole", compressed=compressed)
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 6000)
    monkeypatch.setattr(conversion, "CHUNK_BYTES", 4400)
    parts = made(folder, tmp_path / "parts", compressed=compressed)
    assert_holds(parts, model)
    assert parts.path.read_bytes() == whole.path.read_bytes()


def test_quantised_as_quantize_linear_does(tmp_path: Path, folder: Path, model: PreTrainedModel) -> None:
    image = made(folder, tmp_path, dtype=torch.bfloat16, compressed=True)
    found = read_unit(image, "layers.1")["down.weight"]
    assert isinstance(found, Quantized4bitLinear)
    weight = model.model.decoder.layers[1].fc2.weight.detach()
    assert torch.equal(found.packed, quantize_linear(weight).packed)
    relative = (dequantize_linear(found, dtype=torch.float32) - weight).norm() / weight.norm()
    assert relative < 0.11  # 0.09 for Gaussian weights in groups of 64, and the rounding of 16-bit scales


@pytest.mark.parametrize("compressed", [False, True])
def test_gaps_are_zero(tmp_path: Path, folder: Path, compressed: bool) -> None:
    image = made(folder, tmp_path, compressed=compressed)
    content = bytearray(image.path.read_bytes())
    assert len(content) == image.layout.nbytes
    for name, unit in image.layout.units:
        for field in unit.fields:
            start = image.layout.offsets[name] + field.offset
            content[start : start + field.nbytes] = bytes(field.nbytes)
    assert not any(content)


MEASURE = """
    import sys, torch
    from pathlib import Path
    from runtime import checkpoint, content, conversion, weight_files
    from runtime.image import open_image

    small, large, directory = sys.argv[1:]
    checkpoint.CHUNK_BYTES = content.CHUNK_BYTES = conversion.CHUNK_BYTES = 2**20
    weight_files.RENEW_BYTES = 4 * 2**20

    def peak_bytes(model):
        open_image(model, directory=Path(directory), dtype=torch.bfloat16, compressed=True)
        (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(peak.split()[1])

    before = peak_bytes(small)
    print(peak_bytes(large) - before)
"""


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, folder: Path, form: Form) -> None:
    """A checkpoint of 84 MB is converted in the memory of its parts, which are 1 MiB here."""
    shape = {"hidden_size": 512, "ffn_dim": 2048, "word_embed_proj_dim": 512, "vocab_size": 20000}
    config = AutoConfig.for_model("opt", **(SHAPE | shape | {"num_hidden_layers": 3}))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    large = empty.to_empty(device="cpu")
    for parameter in large.parameters():
        parameter.data.fill_(0.5)
    save(large, tmp_path / "large", form=form)
    assert sum(parameter.nbytes for parameter in large.parameters()) > 78e6
    arguments = [str(folder), str(tmp_path / "large"), str(tmp_path / "offload")]
    code = textwrap.dedent(MEASURE)
    told = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert 0 < int(told.stdout) < 30e6
