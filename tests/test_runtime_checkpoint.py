"""Checkpoints: every published form yields transformers' tensors; every defect yields one sentence with a remedy."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from costmodel.errors import InputError
from costmodel.model import catalog_config
from runtime import LLM
from runtime import checkpoint as checkpoint_module
from runtime.architecture import Architecture, TensorSpec
from runtime.checkpoint import Checkpoint, CheckpointError, open_checkpoint, row_chunks, tensor_of
from runtime.families import architecture
from runtime.weight_files import BinFile, SafetensorsFile
from tests.checkpoints import AS_350M, Form, put_in_cache, random_model, save

FORMS: tuple[Form, ...] = ("safetensors", "bin", "old bin")


def architecture_of(checkpoint: Checkpoint) -> Architecture:
    return architecture(checkpoint.config, name=checkpoint.name)


def assert_equal(folder: Path, model: PreTrainedModel, dtype: torch.dtype = torch.float32) -> None:
    """Every tensor of the checkpoint is the model's parameter of the key that transformers gives it."""
    parameters = dict(model.named_parameters())
    with open_checkpoint(folder) as checkpoint:
        found = architecture_of(checkpoint)
        seen = set()
        for spec, layer in found.tensors():
            key = spec.source.format(layer=layer)
            tensor = tensor_of(checkpoint, found, spec, layer)
            assert tensor.dtype == dtype
            assert torch.equal(tensor, parameters[key].to(dtype)), key
            seen.add(key)
        assert seen == set(parameters)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shards", [1, 5])
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_every_form_holds_transformers_tensors(
    tmp_path: Path, model: PreTrainedModel, form: Form, shards: int, prefix: str
) -> None:
    assert_equal(save(model, tmp_path, form=form, shards=shards, prefix=prefix), model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_tensors_come_in_the_type_that_they_are_stored_in(
    tmp_path: Path, model: PreTrainedModel, form: Form, dtype: torch.dtype
) -> None:
    assert_equal(save(model, tmp_path, form=form, dtype=dtype), model, dtype)


@pytest.mark.parametrize("head", [False, True])
def test_tied_head_may_be_stored_or_not(tmp_path: Path, model: PreTrainedModel, head: bool) -> None:
    folder = save(model, tmp_path, head=head)
    with open_checkpoint(folder) as checkpoint:
        assert ("lm_head.weight" in checkpoint.keys) == head
    assert_equal(folder, model)


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, AS_350M, {"enable_bias": False}])
def test_variants(tmp_path: Path, config: dict[str, Any]) -> None:
    model = random_model(**config)
    assert_equal(save(model, tmp_path), model)


@pytest.mark.parametrize("shard_size", ["20KB", "5GB"])
@pytest.mark.parametrize("without_head", [False, True])
def test_what_transformers_saves(tmp_path: Path, model: PreTrainedModel, shard_size: str, without_head: bool) -> None:
    (model.model if without_head else model).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    assert_equal(tmp_path, model)


def test_safetensors_are_preferred(tmp_path: Path, model: PreTrainedModel) -> None:
    save(random_model(seed=1), tmp_path, form="bin")
    save(model, tmp_path)
    assert_equal(tmp_path, model)


def test_what_a_checkpoint_tells(tmp_path: Path, model: PreTrainedModel) -> None:
    folder = save(model, tmp_path / "my-opt", shards=2)
    with open_checkpoint(f"{folder}/") as checkpoint:
        assert checkpoint.name == "my-opt"
        assert checkpoint.config["hidden_size"] == 64
        assert checkpoint.shape("model.decoder.layers.0.fc1.weight") == (80, 64)
        assert checkpoint.keys == set(model.state_dict()) - {"lm_head.weight"}
        assert torch.equal(checkpoint.read("model.decoder.layers.1.fc2.bias"), model.model.decoder.layers[1].fc2.bias)
        assert {path.name for path in checkpoint.files} == {
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
        }
        assert checkpoint.tokenizer_folder is None
        (folder / "tokenizer.json").write_text("{}")
        assert checkpoint.tokenizer_folder == folder
    checkpoint.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("multiple", [1, 16])
def test_rows_in_chunks(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, form: Form, multiple: int
) -> None:
    monkeypatch.setattr(checkpoint_module, "CHUNK_BYTES", 5000)  # 19 rows of 64 values
    with open_checkpoint(save(model, tmp_path, form=form)) as checkpoint:
        found = architecture_of(checkpoint)
        chunks = list(row_chunks(checkpoint, found, found.table, None, multiple=multiple))
        assert [len(chunk) for chunk in chunks] == ([19] * 5 + [1] if multiple == 1 else [16] * 6)
        assert torch.equal(torch.cat(chunks), model.model.decoder.embed_tokens.weight)


def test_take_makes_a_tensor_of_another(tmp_path: Path, model: PreTrainedModel) -> None:
    """As families with fused or permuted matrices have it: half of the rows, in reverse."""
    fc1 = model.model.decoder.layers[1].fc1.weight
    with open_checkpoint(save(model, tmp_path)) as checkpoint:
        found = architecture_of(checkpoint)
        source = "model.decoder.layers.{layer}.fc1.weight"
        half = TensorSpec(name="up.weight", shape=(40, 64), source=source, take=lambda fused: fused[:40].flip(0))
        assert torch.equal(tensor_of(checkpoint, found, half, 1), fc1[:40].flip(0))
        assert torch.equal(torch.cat(list(row_chunks(checkpoint, found, half, 1))), fc1[:40].flip(0))
        wrong = TensorSpec(name="up.weight", shape=(41, 64), source=source, take=lambda fused: fused[:40])
        with pytest.raises(CheckpointError, match=r"fc1.weight' has shape \[40, 64\]: by config.json \[41, 64\]"):
            tensor_of(checkpoint, found, wrong, 1)


def test_tensors_at_odd_offsets(tmp_path: Path, model: PreTrainedModel) -> None:
    """A header may have any length, so that no tensor lies at a multiple of its values' size."""
    folder = save(model, tmp_path)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].rstrip()
    odd = header + b" " * (1 - len(header) % 2)
    path.write_bytes(struct.pack("<Q", len(odd)) + odd + content[8 + length :])
    assert len(odd) % 2 == 1
    assert_equal(folder, model)


# --- defects ---------------------------------------------------------------------------------------------------------


def read_all(folder: Path) -> None:
    with open_checkpoint(folder) as checkpoint:
        found = architecture_of(checkpoint)
        for spec, layer in found.tensors():
            tensor_of(checkpoint, found, spec, layer)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("nbytes", "told"),
    [
        (-1, r"model.safetensors: tensor '\S+' ends at byte \d+, but the file has only \d+ bytes \(1 B missing\): it "),
        (200, "model.safetensors: the file of 200 bytes does not begin with a safetensors header that fits it: it is "),
        (5, "model.safetensors: the file of 5 bytes does not begin with"),
        (0, "model.safetensors: the file of 0 bytes does not begin with"),
    ],
)
def test_safetensors_cut_off(tmp_path: Path, model: PreTrainedModel, nbytes: int, told: str) -> None:
    path = save(model, tmp_path) / "model.safetensors"
    os.truncate(path, path.stat().st_size + nbytes if nbytes < 0 else nbytes)
    with pytest.raises(CheckpointError, match=told + r".*download or copy the file again$" if nbytes else told):
        read_all(tmp_path)


def test_shard_cut_off_is_found_at_once(tmp_path: Path, model: PreTrainedModel) -> None:
    path = save(model, tmp_path, shards=4) / "model-00003-of-00004.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="model-00003-of-00004.safetensors: tensor .* it is cut off"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("header", [b"[1, 2]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1]}}', b"\xff{}"])
def test_safetensors_header_damaged(tmp_path: Path, model: PreTrainedModel, header: bytes) -> None:
    save(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"x" * 100)
    with pytest.raises(CheckpointError, match="model.safetensors: its safetensors header is damaged; download"):
        read_all(tmp_path)


def test_safetensors_length_against_shape(tmp_path: Path, model: PreTrainedModel) -> None:
    def edit(header: dict[str, Any]) -> None:
        header["model.decoder.layers.0.fc1.bias"]["shape"] = [79]

    edit_header(save(model, tmp_path) / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=r"layers.0.fc1.bias' has 320 bytes: F32 \[79\] takes 316; the header is"):
        read_all(tmp_path)


def test_safetensors_of_an_unknown_type(tmp_path: Path, model: PreTrainedModel) -> None:
    def edit(header: dict[str, Any]) -> None:
        header["model.decoder.layers.0.fc1.bias"]["dtype"] = "F4"

    edit_header(save(model, tmp_path) / "model.safetensors", edit)
    with pytest.raises(CheckpointError, match=r"layers.0.fc1.bias' is of type F4: this reader knows F64, F32"):
        read_all(tmp_path)


@pytest.mark.parametrize("form", ["bin", "old bin"])
@pytest.mark.parametrize("nbytes", [3, 700, -20])
def test_bin_cut_off(tmp_path: Path, model: PreTrainedModel, form: Form, nbytes: int) -> None:
    path = save(model, tmp_path, form=form) / "pytorch_model.bin"
    os.truncate(path, path.stat().st_size + nbytes if nbytes < 0 else nbytes)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: .* damaged.*; download or copy the file again$"):
        read_all(tmp_path)


class Malice:
    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.unlink, ("victim",)


@pytest.mark.parametrize("new", [True, False])
def test_bin_that_would_run_code(
    tmp_path: Path, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("victim").touch()
    save(model, tmp_path, form="bin")
    torch.save({"a": Malice()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match="pytorch_model.bin: holds Python objects other than tensors, .* never"):
        open_checkpoint(tmp_path)
    assert Path("victim").exists()


def test_bin_without_names(tmp_path: Path, model: PreTrainedModel) -> None:
    save(model, tmp_path, form="bin")
    torch.save([torch.ones(2)], tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pytorch_model.bin: holds a list: tensors by name are expected"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_pointer_of_git_lfs(tmp_path: Path, model: PreTrainedModel, name: str) -> None:
    model.config.save_pretrained(tmp_path)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 250540281\n")
    with pytest.raises(CheckpointError, match=f"{name}: is a pointer of Git LFS, not the weights: run `git lfs pull`"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_tensor(tmp_path: Path, form: Form) -> None:
    save(random_model(num_hidden_layers=1), tmp_path, form=form)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    told = r"tensor 'model.decoder.layers.1.\S+' is missing \(found: \d+ others\): the weights are incomplete, or of"
    with pytest.raises(CheckpointError, match=told):
        read_all(tmp_path)


def test_missing_head_of_its_own(tmp_path: Path) -> None:
    save(random_model(tie_word_embeddings=False), tmp_path, head=False)
    with pytest.raises(CheckpointError, match="tensor 'lm_head.weight' is missing"):
        read_all(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_wrong_shape(tmp_path: Path, model: PreTrainedModel, form: Form) -> None:
    save(model, tmp_path, form=form)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": 97}))
    told = r": tensor 'model.decoder.embed_tokens.weight' has shape \[96, 64\]: by config.json \[97, 64\] is expected; "
    with pytest.raises(CheckpointError, match=told):
        read_all(tmp_path)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_shapes_are_checked_before_anything_is_read_searched_or_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Form, shards: int
) -> None:
    """Of the last layer, by an LLM that has not been told any work yet."""
    folder = save(random_model(ffn_dim=80), tmp_path, form=form, shards=shards)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"ffn_dim": 81}))
    for reader in (SafetensorsFile, BinFile):
        for method in ("read", "read_rows"):
            monkeypatch.setattr(reader, method, lambda *args: pytest.fail("a tensor was read"))
    monkeypatch.setattr("runtime.llm.machine", lambda *args, **options: pytest.fail("the machine was measured"))
    told = r"'model.decoder.layers.0.fc1.(bias' has shape \[80\]|weight' has shape \[80, 64\]): by config.json \[81"
    with pytest.raises(CheckpointError, match=told):
        LLM(folder, offload_dir=tmp_path, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_types_that_are_no_plain_floats(tmp_path: Path, model: PreTrainedModel, dtype: torch.dtype) -> None:
    save(model, tmp_path, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(CheckpointError, match=f"embed_tokens.weight' is {name}: float64, float32, float16 or bfloat16"):
        read_all(tmp_path)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_missing_shards(tmp_path: Path, model: PreTrainedModel, form: Form) -> None:
    save(model, tmp_path, form=form, shards=3)
    next(tmp_path.glob("*-00002-of-00003.*")).unlink()
    with pytest.raises(CheckpointError, match=r"\S+-00002-of-00003.\S+ of the index is missing: the checkpoint is inc"):
        open_checkpoint(tmp_path)


def test_missing_index(tmp_path: Path, model: PreTrainedModel) -> None:
    (save(model, tmp_path, shards=3) / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="model-00001-of-00003.safetensors is one of several files, but their in"):
        open_checkpoint(tmp_path)


def test_index_without_a_tensor_and_with_one_too_many(tmp_path: Path, model: PreTrainedModel) -> None:
    index = save(model, tmp_path, shards=3) / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    key = "model.decoder.layers.1.fc1.bias"
    home = data["weight_map"].pop(key)
    index.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"tensor '{key}' is missing"):
        read_all(tmp_path)
    other = next(name for name in data["weight_map"].values() if name != home)
    index.write_text(json.dumps({"weight_map": data["weight_map"] | {key: other}}))
    with pytest.raises(CheckpointError, match=f"{other}: tensor '{key}' is missing, though the index says that it is"):
        read_all(tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON at line 1"),
        ("[]", "field 'weight_map', which names the file of every tensor, is missing or empty"),
        ('{"weight_map": {}}', "field 'weight_map'"),
        (
            '{"weight_map": {"a": "../../etc/passwd"}}',
            "tensor 'a' is in '../../etc/passwd': the name of a .safetensors",
        ),
        ('{"weight_map": {"a": "x.bin"}}', "tensor 'a' is in 'x.bin': the name of a .safetensors file is expected"),
        ('{"weight_map": {"a": 3}}', "tensor 'a' is in 3: "),
    ],
)
def test_damaged_index(tmp_path: Path, model: PreTrainedModel, content: str, told: str) -> None:
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=f"model.safetensors.index.json: {told}"):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path: Path, model: PreTrainedModel) -> None:
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="there are no weights: model.safetensors or pytorch_model.bin"):
        open_checkpoint(tmp_path)


def test_no_config(tmp_path: Path, model: PreTrainedModel) -> None:
    (save(model, tmp_path) / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: cannot be read: No such file or directory"):
        open_checkpoint(tmp_path)


def test_config_that_is_no_object(tmp_path: Path, model: PreTrainedModel) -> None:
    (save(model, tmp_path) / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json: a JSON object is expected"):
        open_checkpoint(tmp_path)


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_model_in_the_hubs_cache(tmp_path: Path, hub_cache: Path, model: PreTrainedModel, form: Form) -> None:
    snapshot = put_in_cache(hub_cache, save(model, tmp_path / "made", form=form, shards=2), "someone/opt-tiny")
    with open_checkpoint("someone/opt-tiny") as checkpoint:
        assert checkpoint.name == "opt-tiny"
        assert checkpoint.folder == snapshot
    assert_equal(snapshot, model)


@pytest.mark.parametrize("name", ["opt-350m", "OPT-350m", "facebook/OPT-350M"])
def test_a_name_of_the_catalogue_is_its_model_on_the_hub(
    tmp_path: Path, hub_cache: Path, model: PreTrainedModel, name: str
) -> None:
    snapshot = put_in_cache(hub_cache, save(model, tmp_path / "made"), "facebook/opt-350m")
    with open_checkpoint(name) as checkpoint:
        assert (checkpoint.name, checkpoint.folder) == ("opt-350m", snapshot)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "gemma"}, "models of type 'gemma' can be planned for, but not yet run"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "model_type 'mixtral' is a mixture of experts"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "model_type 'llama' runs the checkpoint's own code"),
    ],
)
def test_what_cannot_be_run_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], told: str
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text(json.dumps(catalog_config("llama-2-7b") | config))
    put_in_cache(hub_cache, tmp_path / "made", "someone/else")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: pytest.fail("weights"))
    with pytest.raises(InputError, match=f"^config.json of someone/else: {told}"):
        open_checkpoint("someone/else")


def test_model_that_is_not_in_the_cache(hub_cache: Path) -> None:
    told = f"model 'someone/opt-tiny': is not in the hub's cache at {hub_cache} and HF_HUB_OFFLINE is set: unset it"
    with pytest.raises(InputError, match=told):
        open_checkpoint("someone/opt-tiny")


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./here", "a/b/c", "", "nul\0l", "x" * 5000 + "!"])
def test_neither_a_folder_nor_a_name(name: str) -> None:
    with pytest.raises(InputError, match=r"there is no such folder, and it is no name of a model on the hub either"):
        open_checkpoint(name)


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: is a file: give the folder that holds config.json"):
        open_checkpoint(tmp_path / "model.safetensors")
