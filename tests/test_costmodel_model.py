"""ModelSpec against transformers' own models on the meta device, published counts and bad configs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from costmodel import families, records
from costmodel.errors import InputError
from costmodel.model import BYTES_PER_VALUE, COMPRESSED_BYTES_PER_VALUE, ModelSpec, catalog_config, catalog_names

OPT_NAMES = tuple(f"opt-{size}" for size in ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"))
# Parameters as the models' cards or the hub state them; those of GLM as llama.cpp prints them, rounded.
OTHER_PARAMS = {
    "bloom-560m": 559_214_592,
    "bloom-1b1": 1_065_314_304,
    "bloom-1b7": 1_722_408_960,
    "bloom-3b": 3_002_557_440,
    "bloom-7b1": 7_069_016_064,
    "bloom-176b": 176_247_271_424,
    "glm-4-9b": 9_400e6,
    "glm-4-32b-0414": 32_570e6,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}
CODEGEN_NAMES = tuple(f"codegen-{size}" for size in ("350m", "2b", "6b", "16b"))
EMBEDDING = re.compile(
    r"\b(embed_tokens|embed_positions|project_in|wte|wpe|embed_in|word_embeddings|word_embeddings_layernorm)\b"
)


def meta_model(model_type: str, **fields: Any) -> torch.nn.Module:
    config = CONFIG_MAPPING[model_type](**fields)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def spec_of(model: Any) -> ModelSpec:
    return ModelSpec.from_config(json.loads(json.dumps(model.config.to_dict())), name="random")


def assert_counts_agree(spec: ModelSpec, model: Any) -> None:
    """Total, layer, embedding and head parameters, told apart by the names of transformers' modules."""
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    in_layers = {id(p) for p in layers.parameters()}
    outside = [(name, p.numel()) for name, p in model.named_parameters() if id(p) not in in_layers]
    assert len(layers) == spec.num_layers
    for layer in (layers[0], layers[-1]):
        sizes = [(p.ndim, p.numel()) for p in layer.parameters()]
        assert spec.layer_matrix_params == sum(size for ndim, size in sizes if ndim == 2)
        assert spec.layer_vector_params == sum(size for ndim, size in sizes if ndim == 1)
    assert spec.embedding_params == sum(size for name, size in outside if EMBEDDING.search(name))
    assert spec.head_params == sum(size for name, size in outside if not EMBEDDING.search(name))
    assert spec.total_params == sum(p.numel() for p in model.parameters())
    assert spec.head_matrix_params == model.get_output_embeddings().weight.numel() + (
        0 if spec.embedding_size == spec.hidden_size else spec.hidden_size * spec.embedding_size
    )


# ---- the catalogue


@pytest.mark.parametrize("name", [*OPT_NAMES, *CODEGEN_NAMES, *OTHER_PARAMS])
def test_the_catalogue_counts_every_parameter_of_transformers(name: str) -> None:
    spec = ModelSpec.from_catalog(name)
    config = catalog_config(name)
    model = meta_model(config["model_type"], **{key: value for key, value in config.items() if key != "model_type"})
    assert_counts_agree(spec, model)
    assert dataclasses.replace(spec_of(model), name=name) == spec


def test_the_catalogue_is_sorted_smallest_first() -> None:
    assert set(catalog_names()) == {*OPT_NAMES, *CODEGEN_NAMES, *OTHER_PARAMS}
    sizes = [ModelSpec.from_catalog(name).total_params for name in catalog_names()]
    assert sizes == sorted(sizes)
    assert tuple(name for name in catalog_names() if name.startswith("opt-")) == OPT_NAMES


@pytest.mark.parametrize("name", OTHER_PARAMS)
def test_counts_of_other_families_are_the_published_ones(name: str) -> None:
    assert ModelSpec.from_catalog(name).total_params == pytest.approx(OTHER_PARAMS[name], abs=5e6)


@pytest.mark.parametrize("name", [*CODEGEN_NAMES, *OTHER_PARAMS])
def test_catalogue_files_of_other_families_name_their_source(name: str) -> None:
    path = Path(families.__file__).parent / "catalog" / "models" / f"{name}.json"
    source = json.loads(path.read_text())["_source"]
    assert source.startswith("config.json of ")
    assert "arXiv" in source or "pull request" in source
    assert "_source" not in catalog_config(name)


@pytest.mark.parametrize("name", OPT_NAMES)
def test_catalogue_files_name_their_source(name: str) -> None:
    path = Path(families.__file__).parent / "catalog" / "models" / f"{name}.json"
    source = json.loads(path.read_text())["_source"]
    assert "2205.01068" in source
    assert name == "opt-175b" or f"facebook/{name}" in source
    assert "_source" not in catalog_config(name)


# Table 1 of the OPT paper (arXiv 2205.01068): layers, heads, hidden size.
@pytest.mark.parametrize(
    ("name", "num_layers", "num_heads", "hidden_size"),
    [
        ("opt-125m", 12, 12, 768),
        ("opt-350m", 24, 16, 1024),
        ("opt-1.3b", 24, 32, 2048),
        ("opt-2.7b", 32, 32, 2560),
        ("opt-6.7b", 32, 32, 4096),
        ("opt-13b", 40, 40, 5120),
        ("opt-30b", 48, 56, 7168),
        ("opt-66b", 64, 72, 9216),
        ("opt-175b", 96, 96, 12288),
    ],
)
def test_opt_shapes_are_those_of_the_paper(name: str, num_layers: int, num_heads: int, hidden_size: int) -> None:
    spec = ModelSpec.from_catalog(name)
    assert (spec.num_layers, spec.num_heads, spec.hidden_size) == (num_layers, num_heads, hidden_size)
    assert spec.num_kv_heads == num_heads
    assert spec.ffn_size == 4 * hidden_size
    assert spec.head_dim == {"opt-2.7b": 80}.get(name, 64 if hidden_size <= 2048 else 128)
    assert spec.embedding_size == (512 if name == "opt-350m" else hidden_size)
    assert spec.final_norm == (name != "opt-350m")


def test_opt_30b_by_hand() -> None:
    spec = ModelSpec.from_catalog("opt-30b")
    h, vocab = 7168, 50272
    assert spec.layer_matrix_params == 12 * h**2 == 616_562_688
    assert spec.layer_vector_params == (3 + 1) * h + (4 + 1) * h + 2 * 2 * h == 93_184
    assert spec.embedding_params == vocab * h + 2050 * h
    assert spec.head_params == 2 * h
    assert spec.head_matrix_params == vocab * h
    assert spec.total_params == 48 * spec.layer_params + spec.embedding_params + spec.head_params == 29_974_540_288
    assert spec.layer_matmul_flops_per_token == 24 * h**2
    assert spec.head_flops_per_token == 2 * vocab * h
    assert spec.layer_weight_bytes(compressed=False) == 2 * (12 * h**2 + 13 * h)
    assert spec.layer_weight_bytes(compressed=True) == 4.5 / 8 * 12 * h**2 + 2 * 13 * h
    assert spec.kv_values_per_token == 2 * h
    assert spec.kv_bytes_per_token(compressed=False) == 4 * h
    assert spec.kv_bytes_per_token(compressed=True) == 4.5 / 8 * 2 * h
    assert spec.attention_flops(context_len=512) == 4 * h * 512
    assert spec.embedding_bytes == 2 * (50272 + 2050) * h
    assert spec.head_bytes == 2 * 2 * h
    assert spec.head_load_bytes == 2 * (vocab * h + 2 * h)
    assert (spec.max_positions, spec.position_rows, spec.positions) == (2048, 2050, "learned")


def test_opt_350m_projects_between_embedding_and_layers() -> None:
    spec = ModelSpec.from_catalog("opt-350m")
    assert spec.embedding_params == 50272 * 512 + 2050 * 1024 + 512 * 1024
    assert spec.head_params == 512 * 1024
    assert spec.head_matrix_params == 50272 * 512 + 512 * 1024
    assert spec.head_load_bytes == 2 * spec.head_matrix_params


def test_compressed_value_is_four_bits_and_two_fp16_numbers_per_group_of_64() -> None:
    group_bytes = 64 * COMPRESSED_BYTES_PER_VALUE
    assert group_bytes == (64 * 4 + 2 * 16) / 8
    assert torch.empty((), dtype=torch.float16).element_size() == BYTES_PER_VALUE


# ---- names and paths


@pytest.mark.parametrize("name", ["opt-30b", "OPT-30B", "facebook/opt-30b", "Facebook/Opt-30B"])
def test_catalogue_names_ignore_case_and_organisation(name: str) -> None:
    assert ModelSpec.from_catalog(name) == ModelSpec.load(name) == ModelSpec.from_catalog("opt-30b")
    assert ModelSpec.load(name).name == "opt-30b"
    assert catalog_config(name)["hidden_size"] == 7168


@pytest.mark.parametrize("name", ["opt-31b", "opt30b"])
def test_unknown_names_suggest_the_nearest(name: str) -> None:
    expected = f"unknown model '{name}': did you mean 'opt-30b'"
    other = rf"an id of the Hugging Face hub, or the path of a config\.json.*, works too, but '{name}' is none"
    with pytest.raises(InputError, match=f"{expected}.*; {other}"):
        ModelSpec.load(name)
    with pytest.raises(InputError, match=expected):
        ModelSpec.from_catalog(name)
    with pytest.raises(InputError, match=expected):
        ModelSpec.from_catalog(f"facebook/{name}")


@pytest.mark.parametrize("name", ["", "/", "no/such/config.json", "opt-30b/", "./opt-30b", "x" * 5000, "nul\0"])
def test_what_is_neither_a_name_nor_a_path_is_told_so(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError):
        ModelSpec.load(name)


def write_config(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {**catalog_config("opt-125m"), **changes}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def test_a_path_may_be_a_file_or_a_folder(tmp_path: Path, monkeypatch: Any) -> None:
    folder = write_config(tmp_path / "my-opt", num_hidden_layers=3)
    (tmp_path / "other.json").write_text((folder / "config.json").read_text())
    for path, name in [(folder, "my-opt"), (folder / "config.json", "my-opt"), (tmp_path / "other.json", "other")]:
        for given_path in (path, str(path)):
            spec = ModelSpec.load(given_path)
            assert spec == ModelSpec.from_file(given_path)
            assert (spec.name, spec.num_layers) == (name, 3)
    monkeypatch.chdir(folder)
    assert (
        ModelSpec.load(".").name == ModelSpec.load("config.json").name == ModelSpec.load("../my-opt/").name == "my-opt"
    )


def test_a_bare_name_is_the_catalogues_and_an_existing_path_with_a_slash_is_the_path(
    tmp_path: Path, monkeypatch: Any
) -> None:
    write_config(tmp_path / "opt-30b", num_hidden_layers=1)
    write_config(tmp_path / "facebook" / "opt-30b", num_hidden_layers=2)
    monkeypatch.chdir(tmp_path)
    assert ModelSpec.load("opt-30b").num_layers == 48
    assert ModelSpec.load("./opt-30b").num_layers == 1
    assert ModelSpec.load(Path("opt-30b")).num_layers == 1
    assert ModelSpec.load("facebook/opt-30b").num_layers == 2
    assert ModelSpec.load("facebook/opt-66b").num_layers == 64


def test_a_saved_transformers_config_reads_back(tmp_path: Path) -> None:
    config = CONFIG_MAPPING["llama"](num_key_value_heads=8, hidden_size=512, num_attention_heads=16)
    config.save_pretrained(tmp_path / "tiny-llama")
    spec = ModelSpec.load(tmp_path / "tiny-llama")
    assert (spec.name, spec.family, spec.num_kv_heads, spec.head_dim) == ("tiny-llama", "llama", 8, 32)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b'{"model_type": "opt"', "not valid JSON at line 1"),
        (b"[1, 2]", "is not the JSON object"),
        (b"null", "null is not the JSON object"),
        (b"\xff\xfe", "not UTF-8"),
        (b"{}", "field 'model_type' is missing; supported families: bloom, codegen, "),
        (b'{"model_type": 3}', "field 'model_type' is 3: it must be text; supported families: bloom"),
    ],
)
def test_unreadable_files_are_one_sentence_with_the_path(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path)) + ".*" + re.escape(message)):
        ModelSpec.load(tmp_path)


def test_a_folder_without_a_config_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json: cannot be read: No such file"):
        ModelSpec.load(tmp_path)


# ---- every family, against transformers


def draw_heads(draw: Any) -> tuple[int, int, int]:
    """Query heads, kv heads that divide them, hidden size that the heads divide."""
    kv_heads = draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    return heads, kv_heads, heads * 4 * draw(st.integers(1, 4))


@st.composite
def gpt_fields(draw: Any, *, rotary: bool) -> dict[str, Any]:
    heads, _, hidden = draw_heads(draw)
    return {
        "n_embd": hidden,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "n_positions": draw(st.integers(1, 64)),
        "n_inner": draw(st.none() | st.integers(1, 64)),
        "vocab_size": draw(st.integers(4, 99)),
        "tie_word_embeddings": draw(st.booleans()),
    } | ({"rotary_dim": 2} if rotary else {})


@st.composite
def llama_fields(
    draw: Any, *, kv_groups: bool = True, head_dim: bool = True, flags: tuple[str, ...] = (), **extra: Any
) -> dict[str, Any]:
    heads, kv_heads, hidden = draw_heads(draw)
    fields = {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "intermediate_size": draw(st.integers(1, 64)),
        "max_position_embeddings": draw(st.integers(32, 64)),
        "vocab_size": draw(st.integers(4, 99)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": None,
        **{flag: draw(st.booleans()) for flag in flags},
        **{key: draw(value) for key, value in extra.items()},
    }
    if kv_groups:
        fields["num_key_value_heads"] = kv_heads
    if head_dim:
        fields["head_dim"] = 4 * draw(st.integers(1, 8))
    return fields


@st.composite
def opt_fields(draw: Any) -> dict[str, Any]:
    flags = ("do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine")
    fields = draw(llama_fields(kv_groups=False, head_dim=False, flags=flags))
    fields["ffn_dim"] = fields.pop("intermediate_size")
    fields["word_embed_proj_dim"] = draw(st.none() | st.integers(1, 64))
    return fields


@st.composite
def bloom_fields(draw: Any) -> dict[str, Any]:
    heads, _, hidden = draw_heads(draw)
    return {
        "hidden_size": hidden,
        "n_head": heads,
        "n_layer": draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(4, 99)),
        "tie_word_embeddings": draw(st.booleans()),
    }


SWITCHES = ("attention_bias",)
WINDOW = {"sliding_window": st.integers(1, 40) | st.none()}
QWEN_WINDOW = {"use_sliding_window": st.booleans(), "max_window_layers": st.integers(0, 2)} | WINDOW
FAMILY_FIELDS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "bloom": bloom_fields(),
    "codegen": gpt_fields(rotary=True),
    "gemma": llama_fields(flags=SWITCHES),
    "glm": llama_fields(flags=SWITCHES),
    "glm4": llama_fields(flags=SWITCHES),
    "gpt2": gpt_fields(rotary=False),
    "gpt_neox": llama_fields(kv_groups=False, head_dim=False, flags=SWITCHES),
    "gptj": gpt_fields(rotary=True),
    "granite": llama_fields(flags=(*SWITCHES, "mlp_bias")),
    "llama": llama_fields(flags=(*SWITCHES, "mlp_bias")),
    "mistral": llama_fields(**WINDOW),
    "opt": opt_fields(),
    "phi": llama_fields(head_dim=False, flags=("qk_layernorm",)),
    "phi3": llama_fields(**WINDOW),
    "qwen2": llama_fields(**QWEN_WINDOW),
    "qwen3": llama_fields(flags=SWITCHES, **QWEN_WINDOW),
    "starcoder2": llama_fields(flags=("use_bias",), **WINDOW),
}


def transformers_window(config: Any) -> tuple[int | None, int]:
    """The window and how many layers transformers limits by it, leaving out windows that limit nothing."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    layers = kinds.count("sliding_attention")
    limits = window is not None and window < config.max_position_embeddings and layers > 0
    return (window, layers) if limits else (None, 0)


def described(setting: Any) -> list[Any]:
    """The keys and flags that one field of a family consists of."""
    if isinstance(setting, families.Window):
        return [part for field in dataclasses.fields(setting) for part in described(getattr(setting, field.name))]
    return [part for part in (setting if isinstance(setting, tuple) else [setting]) if hasattr(part, "default")]


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    family, config_class = families.FAMILIES[model_type], CONFIG_MAPPING[model_type]
    theirs = {field.name: field.default for field in dataclasses.fields(config_class)}
    for field in dataclasses.fields(family):
        for part in described(getattr(family, field.name)):
            names = part.names if isinstance(part, families.Key) else (part.name,)
            known = {theirs[name] for name in names if name in theirs}
            assert known == {part.default} or part.default == families.REQUIRED or names == ("head_dim",), names
            if names == ("head_dim",):
                assert known <= {part.default}  # not a field of every class, yet read by every model


def test_every_family_is_compared_with_transformers() -> None:
    assert set(FAMILY_FIELDS) == set(families.FAMILIES)


@pytest.mark.parametrize("model_type", FAMILY_FIELDS)
def test_counts_equal_transformers_for_any_shape(model_type: str) -> None:
    @settings(max_examples=40, deadline=None)
    @given(fields=FAMILY_FIELDS[model_type])
    def check(fields: dict[str, Any]) -> None:
        model = meta_model(model_type, **fields)
        spec = spec_of(model)
        assert_counts_agree(spec, model)
        heads = fields.get("num_attention_heads", fields.get("n_head"))
        hidden = fields.get("hidden_size", fields.get("n_embd"))
        head_dim = fields.get("head_dim", hidden // heads)
        assert spec.kv_values_per_token == 2 * fields.get("num_key_value_heads", heads) * head_dim
        assert spec.tied_head == fields["tie_word_embeddings"]
        assert spec.max_positions == (None if model_type == "bloom" else model.config.max_position_embeddings)
        assert (spec.sliding_window, spec.num_sliding_layers) == transformers_window(model.config)
        assert records.from_dict(ModelSpec, json.loads(json.dumps(spec.to_dict())), where="spec") == spec

    check()


GPT_SHAPE: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": None,
}
CACHED: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "codegen": GPT_SHAPE | {"rotary_dim": 4},
    "gpt2": GPT_SHAPE,
    "gpt_neox": LLAMA_SHAPE | {"intermediate_size": 64},
    "gptj": GPT_SHAPE | {"rotary_dim": 4},
    "opt": LLAMA_SHAPE | {"ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    "phi": LLAMA_SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2},
}


@pytest.mark.parametrize("model_type", families.FAMILIES)
def test_kv_values_are_what_transformers_caches(model_type: str) -> None:
    """Three real tokens through a model of two layers leave exactly these values in one layer's cache."""
    grouped = LLAMA_SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 24}
    config = CONFIG_MAPPING[model_type](vocab_size=99, **CACHED.get(model_type, grouped))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        layer = model(torch.tensor([[5, 6, 7]]), use_cache=True).past_key_values.layers[0]
    spec = spec_of(model)
    assert layer.keys.numel() + layer.values.numel() == 3 * spec.kv_values_per_token
    assert spec.kv_bytes_per_token(compressed=False) * 3 == layer.keys.half().nbytes + layer.values.half().nbytes


# Config.json files as published on the Hugging Face hub (older forms, keys missing that equal the
# defaults), with the parameter counts that the hub shows for their safetensors files.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "openai-community/gpt2": (
        {"model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024}
        | {"vocab_size": 50257},
        124_439_808,
    ),
    "bigscience/bloom": (
        {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "n_inner": None}
        | {"vocab_size": 250880, "torch_dtype": "bfloat16", "seq_length": 2048},
        176_247_271_424,
    ),
    "meta-llama/Llama-2-7b-hf": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 32000, "rope_scaling": None}
        | {"max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16"},
        6_738_415_616,
    ),
    "meta-llama/Meta-Llama-3-8B": (
        {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0},
        8_030_261_248,
    ),
    "mistralai/Mistral-7B-v0.1": (
        {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 32000, "sliding_window": 4096}
        | {"max_position_embeddings": 32768, "tie_word_embeddings": False},
        7_241_732_096,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14}
        | {"num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 151936, "sliding_window": 32768}
        | {"tie_word_embeddings": True, "use_sliding_window": False, "max_window_layers": 24},
        494_032_768,
    ),
    "google/gemma-2b": (
        {"model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8}
        | {"num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 256000},
        2_506_172_416,
    ),
    "microsoft/phi-2": (
        {"model_type": "phi", "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 32}
        | {"num_hidden_layers": 32, "num_key_value_heads": 32, "vocab_size": 51200, "partial_rotary_factor": 0.4},
        2_779_683_840,
    ),
}


@pytest.mark.parametrize("hub_id", PUBLISHED)
def test_published_configs_give_the_published_parameter_counts(hub_id: str) -> None:
    config, params = PUBLISHED[hub_id]
    assert ModelSpec.from_config(config, name=hub_id).total_params == params


LLAMA: dict[str, Any] = PUBLISHED["meta-llama/Meta-Llama-3-8B"][0]
QWEN: dict[str, Any] = PUBLISHED["Qwen/Qwen2.5-0.5B"][0]
MISTRAL: dict[str, Any] = PUBLISHED["mistralai/Mistral-7B-v0.1"][0]


def read(config: dict[str, Any], **changes: Any) -> ModelSpec:
    return ModelSpec.from_config(config | changes, name="model")


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


# Each required or defaulted key left out, compared with what transformers builds from the same file.
@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (LLAMA, "num_key_value_heads"),
        (LLAMA, "max_position_embeddings"),
        (MISTRAL, "num_key_value_heads"),
        (MISTRAL, "sliding_window"),
        (
            without(QWEN, "num_attention_heads") | {"num_attention_heads": 32, "hidden_size": 1024},
            "num_key_value_heads",
        ),
        (PUBLISHED["google/gemma-2b"][0] | {"num_attention_heads": 16}, "num_key_value_heads"),
        (PUBLISHED["google/gemma-2b"][0], "head_dim"),
        (PUBLISHED["microsoft/phi-2"][0], "num_key_value_heads"),
        (PUBLISHED["openai-community/gpt2"][0], "n_positions"),
        (catalog_config("opt-125m"), "max_position_embeddings"),
        (catalog_config("opt-125m"), "word_embed_proj_dim"),
        (catalog_config("opt-125m"), "do_layer_norm_before"),
        (catalog_config("opt-125m"), "tie_word_embeddings"),
    ],
)
def test_missing_keys_mean_what_transformers_takes_them_to_mean(config: dict[str, Any], missing: str) -> None:
    small = without(config, missing) | ({"n_layer": 2} if "n_layer" in config else {"num_hidden_layers": 2})
    model = meta_model(**small)
    assert_counts_agree(read(small), model)
    assert read(small) == dataclasses.replace(spec_of(model), name="model")


def test_old_and_new_key_forms_describe_the_same_model() -> None:
    old = LLAMA | {"torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling": {"factor": 8.0}}
    new = without(LLAMA, "rope_theta") | {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 500000.0}}
    assert read(old) == read(new) == read(LLAMA)
    gpt2 = PUBLISHED["openai-community/gpt2"][0]
    renamed = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "max_position_embeddings": 1024}
    assert read(without(gpt2, "n_embd", "n_head", "n_layer", "n_positions"), **renamed) == read(gpt2)


# ---- what the numbers mean


def test_grouped_heads_and_gated_mlp_by_hand() -> None:
    spec = read(LLAMA)  # hidden 4096, 32 heads and 8 kv heads of 128, MLP of 14336
    assert spec.layer_matrix_params == 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert spec.layer_vector_params == 2 * 4096
    assert spec.kv_values_per_token == 2 * 8 * 128
    assert spec.attention_flops(context_len=1000) == 2 * 2 * 32 * 128 * 1000  # every query head reads its group
    assert spec.head_params == 4096 + 128256 * 4096
    assert spec.head_load_bytes == spec.head_bytes == 2 * (4096 + 128256 * 4096)


def test_bloom_has_no_position_limit() -> None:
    spec = read(PUBLISHED["bigscience/bloom"][0])
    assert (spec.max_positions, spec.positions, spec.position_rows) == (None, "alibi", 0)
    assert spec.embedding_params == 250880 * 14336 + 2 * 14336


@pytest.mark.parametrize(
    ("config", "window", "layers"),
    [
        (MISTRAL, 4096, 32),
        (MISTRAL | {"sliding_window": None}, None, 0),
        (MISTRAL | {"max_position_embeddings": 4096}, None, 0),  # as wide as the model is long: limits nothing
        (without(MISTRAL, "sliding_window"), 4096, 32),
        (QWEN, None, 0),
        (QWEN | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}, 4096, 4),
        (QWEN | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 0}, 4096, 24),
        (QWEN | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 24}, None, 0),
        (QWEN | {"use_sliding_window": True, "sliding_window": None}, None, 0),
        (
            QWEN
            | {"use_sliding_window": True, "sliding_window": 64}
            | {"layer_types": ["sliding_attention", "full_attention"] * 12},
            64,
            12,
        ),
        (LLAMA | {"sliding_window": 64}, None, 0),  # llama has none: transformers ignores the key
    ],
)
def test_sliding_windows_are_kept(config: dict[str, Any], window: int | None, layers: int) -> None:
    spec = read(config)
    assert (spec.sliding_window, spec.num_sliding_layers) == (window, layers)


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts (field 'num_local_experts' is 8)"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "mixture of experts"),
        ({"model_type": "deepseek_v3", "n_routed_experts": 256}, "mixture of experts"),
        ({"num_experts": 4}, "mixture of experts"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "llava", "text_config": {"model_type": "llama"}}, "multimodal"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "runs the checkpoint's own code (field 'auto_map'"),
        ({"model_type": "chatglm"}, "own code, which is not supported: its native successors are glm and glm4"),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, "attends in both directions"),
        ({"model_type": "bert"}, "is not supported"),
        ({"model_type": "OPT"}, "is not supported"),
        ({"per_layer_config": {"0": {}}}, "layers that differ"),
    ],
)
def test_other_architectures_are_refused_in_one_sentence(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    config = LLAMA | changes
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError) as caught:
        ModelSpec.from_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: model_type '{config['model_type']}' ")
    assert reason in message
    assert message.endswith(", ".join(sorted(families.FAMILIES)))
    assert "\n" not in message


def test_features_that_are_switched_off_are_accepted() -> None:
    off: dict[str, Any] = {"is_encoder_decoder": False, "num_experts": 0, "num_local_experts": None, "auto_map": {}}
    assert read(LLAMA, **off) == read(LLAMA)


BAD_FIELDS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LLAMA, {"hidden_size": "4096"}, "field 'hidden_size' is '4096': it must be an integer"),
    (LLAMA, {"hidden_size": 4096.0}, "field 'hidden_size' is 4096.0: it must be an integer"),
    (LLAMA, {"hidden_size": True}, "field 'hidden_size' is True: it must be an integer"),
    (LLAMA, {"hidden_size": None}, "field 'hidden_size' is null: it must be an integer"),
    (LLAMA, {"hidden_size": [4096]}, "field 'hidden_size' is [4096]: it must be an integer"),
    (LLAMA, {"hidden_size": 0}, "field 'hidden_size' is 0: it must be at least 1"),
    (LLAMA, {"num_hidden_layers": -1}, "field 'num_hidden_layers' is -1: it must be at least 1"),
    (LLAMA, {"vocab_size": 0}, "field 'vocab_size' is 0: it must be at least 1"),
    (LLAMA, {"vocab_size": 2**31}, "vocab_size is 2147483648: it must lie in [1, 2147483647]"),
    (LLAMA, {"vocab_size": 10**500}, "vocab_size is an integer of 1661 bits: it must lie in [1, 2147483647]"),
    (LLAMA, {"max_position_embeddings": None}, "field 'max_position_embeddings' is null"),
    (LLAMA, {"num_key_value_heads": False}, "field 'num_key_value_heads' is False: it must be an integer"),
    (LLAMA, {"num_key_value_heads": 5}, "num_key_value_heads is 5: it must divide num_attention_heads, which is 32"),
    (LLAMA, {"num_key_value_heads": 64}, "num_key_value_heads is 64: it must divide num_attention_heads"),
    (LLAMA, {"num_attention_heads": 24}, "field 'num_attention_heads' is 24: it must divide 'hidden_size', which is"),
    (LLAMA, {"attention_bias": "yes"}, "field 'attention_bias' is 'yes': it must be true or false"),
    (LLAMA, {"tie_word_embeddings": 1}, "field 'tie_word_embeddings' is 1: it must be true or false"),
    (without(QWEN, "num_key_value_heads"), {}, "num_key_value_heads (absent: the default of qwen2) is 32: it must"),
    (QWEN, {"use_sliding_window": True, "sliding_window": 0}, "field 'sliding_window' is 0: it must be at least 1"),
    (
        QWEN,
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": -1},
        "field 'max_window_layers' is -1: it must be an integer of at least 0",
    ),
    (
        QWEN,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention"]},
        "field 'layer_types' is ['full_attention']: it must list 24 entries",
    ),
    (
        QWEN,
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["linear_attention"] * 24},
        "it must list 24 entries, each 'full_attention' or 'sliding_attention'",
    ),
    (
        PUBLISHED["bigscience/bloom"][0],
        {"hidden_size": 64},
        "fields 'n_embed' and 'hidden_size' are 14336 and 64: they are two names of one number and must be equal",
    ),
    (PUBLISHED["openai-community/gpt2"][0], {"n_embd": "768"}, "field 'n_embd' is '768': it must be an integer"),
    (catalog_config("opt-125m"), {"word_embed_proj_dim": 0}, "field 'word_embed_proj_dim' is 0: it must be at least 1"),
    (catalog_config("opt-125m"), {"_remove_final_layer_norm": 0}, "field '_remove_final_layer_norm' is 0: it must be"),
]


@pytest.mark.parametrize(("config", "changes", "message"), BAD_FIELDS)
def test_bad_fields_name_file_field_value_and_limit(
    config: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | changes))
    with pytest.raises(InputError) as caught:
        ModelSpec.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (LLAMA, key)
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    ]
    + [(catalog_config("opt-125m"), "ffn_dim")],
)
def test_missing_shape_keys_are_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(InputError, match=f"model 'model': field '{key}' is missing"):
        read(without(config, key))


def test_a_missing_key_is_named_in_all_its_spellings() -> None:
    with pytest.raises(InputError, match="field 'n_embd' or 'hidden_size' is missing"):
        read(without(PUBLISHED["openai-community/gpt2"][0], "n_embd"))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
READ_KEYS = ["model_type", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
READ_KEYS += [
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_bias",
    "num_experts",
]


@settings(max_examples=300, deadline=None)
@given(
    model_type=st.sampled_from(sorted(families.FAMILIES)),
    changes=st.dictionaries(st.sampled_from(READ_KEYS), JSON_VALUES, max_size=4),
    base=st.sampled_from([LLAMA, QWEN, MISTRAL, PUBLISHED["openai-community/gpt2"][0], catalog_config("opt-350m"), {}]),
)
def test_any_config_gives_a_spec_or_one_sentence(
    model_type: str, changes: dict[str, Any], base: dict[str, Any]
) -> None:
    config = {**base, "model_type": model_type, **changes}
    try:
        spec = ModelSpec.from_config(config, name="fuzzed")
    except InputError:
        with pytest.raises(InputError, match=r"^model 'fuzzed': "):
            ModelSpec.from_config(config, name="fuzzed")
        return
    assert spec.total_params > 0
    assert spec.layer_weight_bytes(compressed=True) < spec.layer_weight_bytes(compressed=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads is 0: it must lie in"),
        ({"num_kv_heads": 5}, "num_kv_heads is 5: it must divide num_heads, which is 56"),
        ({"head_dim": True}, "head_dim is True: it must be an integer"),
        ({"position_rows": 0}, "position_rows is 0: it must be above 0 for learned positions"),
        ({"sliding_window": 64}, "num_sliding_layers is 0 with sliding_window 64"),
        ({"sliding_window": 64, "num_sliding_layers": 49}, "num_sliding_layers is 49: the limit is num_layers, 48"),
    ],
)
def test_a_spec_checks_itself_when_made(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        dataclasses.replace(ModelSpec.from_catalog("opt-30b"), **changes)


def test_planning_imports_neither_torch_nor_transformers() -> None:
    code = "import sys; from costmodel.model import ModelSpec; ModelSpec.load('Qwen/Qwen2.5-7B-Instruct')\n"
    code += "print({'torch', 'transformers', 'pandas', 'huggingface_hub'} & set(sys.modules))"
    root = Path(families.__file__).parents[1]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert result.stdout == "set()\n"
