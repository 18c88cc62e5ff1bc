"""Every family yields the logits of transformers, whatever the policy, from checkpoints as transformers writes them."""

import copy
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.model import catalog_config, catalog_names
from costmodel.policy import Policy, Split
from runtime import LLM, SamplingParams, alibi, quantization
from runtime.execute import BlockRun
from runtime.families import FAMILIES, architecture
from runtime.layout import image_layout
from tests.checkpoints import randomised, saved
from tests.runs import VOCABULARY, batches_of, engine, ours, policies, prompt_lists, theirs

LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "max_position_embeddings": 48,
    "pad_token_id": None,
}

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama, 6 heads, 3 kv heads, theta": {
        "model_type": "llama",
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_theta": 500.0,
        "tie_word_embeddings": True,
    },
    "llama, one kv head, wide heads, biases": {
        "model_type": "llama",
        "num_key_value_heads": 1,
        "head_dim": 24,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "llama 3": {"model_type": "llama", "rope_scaling": LLAMA3_SCALING, "num_hidden_layers": 2},
    "llama, yarn": {"model_type": "llama", "rope_scaling": YARN, "num_hidden_layers": 2},
    "llama, linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.5}},
    "llama, dynamic": {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "mistral, window of 4": {"model_type": "mistral", "sliding_window": 4},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, window of 3 in the last layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 3,
        "max_window_layers": 2,
    },
    "qwen2, windows by layer": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 24},
    "qwen3, tied, biases": {"model_type": "qwen3", "tie_word_embeddings": True, "attention_bias": True},
}

GPT_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 48,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PARTLY_TURNED = {"n_embd": 96, "rotary_dim": 8}

MODELS |= {
    "bloom": {"model_type": "bloom"},
    "bloom, 6 heads": {"model_type": "bloom", "hidden_size": 96, "n_head": 6},
    "bloom, 7 heads": {"model_type": "bloom", "hidden_size": 84, "n_head": 7},
    "bloom, untied": {"model_type": "bloom", "tie_word_embeddings": False},
    "bloom, one head": {"model_type": "bloom", "hidden_size": 20, "n_head": 1},
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm, a quarter turned, no biases": {
        "model_type": "glm",
        "head_dim": 24,
        "partial_rotary_factor": 0.25,
        "attention_bias": False,
        "num_key_value_heads": 1,
    },
    "glm4": {"model_type": "glm4", "head_dim": 16},
    "glm4, yarn, tied": {
        "model_type": "glm4",
        "head_dim": 32,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "rope_scaling": YARN,
        "tie_word_embeddings": True,
    },
    "codegen": {"model_type": "codegen", "rotary_dim": 16},
    "codegen, 12 heads": {"model_type": "codegen", **PARTLY_TURNED, "n_head": 12, "rotary_dim": 4},
    "gptj": {"model_type": "gptj", **PARTLY_TURNED},
    "gptj, tied": {"model_type": "gptj", "rotary_dim": 16, "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox"},
    "gpt_neox, in sequence": {"model_type": "gpt_neox", "use_parallel_residual": False, "rotary_pct": 1.0},
    "gpt2": {"model_type": "gpt2"},
    "gpt2, unscaled, wide": {"model_type": "gpt2", "scale_attn_weights": False, "n_inner": 80},
    "phi": {"model_type": "phi", "num_key_value_heads": None},
    "phi, norms of queries and keys": {"model_type": "phi", "qk_layernorm": True},
    "phi3": {"model_type": "phi3", "num_attention_heads": 8},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 6},
}

SHAPES: Mapping[str, dict[str, Any]] = {
    **dict.fromkeys(("codegen", "gpt2", "gptj"), GPT_LIKE),
    **dict.fromkeys(
        ("glm", "glm4", "gpt_neox", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "starcoder2"), LLAMA_LIKE
    ),
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 64, "n_head": 4, "n_layer": 3},
}


def config_of(name: str) -> dict[str, Any]:
    return SHAPES[MODELS[name]["model_type"]] | MODELS[name]


@functools.cache
def reference(name: str) -> PreTrainedModel:
    torch.manual_seed(5)
    config = AutoConfig.for_model(**config_of(name))
    return randomised(AutoModelForCausalLM.from_config(config, attn_implementation="eager"), std=0.2)


def kept(name: str, models: Path) -> str:
    """The checkpoint of a model, saved once."""
    return saved(reference(name), models, name)


def every_model() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", MODELS)


def drawn(examples: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    phases = [phase for phase in Phase if phase is not Phase.shrink]  # an example is small as it is
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks, phases=phases)


PROMPTS = [[5, 9, 11, 40, 77, 3, 8, 2], [9], [17, 2, 100, 51, 60], [1, 1, 8, 2, 4, 4, 90, 12]]


def placed(**changes: Any) -> Policy:
    third = Split(gpu=0.3, cpu=0.3, disk=0.4)
    fields = {"weights": third, "cache": third, "activations": third, "gpu_batch_size": 4, "num_gpu_batches": 1}
    return Policy(**(fields | changes))


@every_model()
def test_logits_of_padded_prompts_are_those_of_transformers(name: str, models: Path) -> None:
    expected_logits, expected_tokens = theirs(reference(name), PROMPTS, 6)
    logits, tokens, _ = ours(kept(name, models), placed(), models, PROMPTS, 6)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


@every_model()
@drawn(3)
@given(policy=policies, prompts=prompt_lists, gen_len=st.integers(1, 5))
def test_any_policy_gives_the_logits_of_transformers(
    name: str, models: Path, policy: Policy, prompts: list[list[int]], gen_len: int
) -> None:
    expected_logits, expected_tokens = theirs(reference(name), prompts, gen_len)
    logits, tokens, _ = ours(kept(name, models), policy, models, prompts, gen_len)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


# ------------------------------------------------------------------ 4 bits

ONE_OF_EACH = [name for name in MODELS if name in FAMILIES]


def dequantised(name: str) -> PreTrainedModel:
    """transformers' model with the matrices of its layers as 4 bits leave them; GPT-2's are transposed."""
    model = copy.deepcopy(reference(name))
    layers = max((m for m in model.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    for module in layers.modules():
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 2:
            continue
        turned = type(module).__name__ == "Conv1D"
        packed = quantization.quantize_linear(weight.data.t() if turned else weight.data)
        plain = quantization.dequantize_linear(packed, dtype=torch.float32)
        module.weight.data = (plain.t() if turned else plain).contiguous()
    return model


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_compressed_weights_are_exactly_the_dequantised_ones(name: str, models: Path) -> None:
    expected, _ = theirs(dequantised(name), PROMPTS, 3)
    logits, _, _ = ours(kept(name, models), placed(compress_weights=True), models, PROMPTS, 3)
    torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_compressed_cache_gives_the_same_wherever_it_lies(name: str, models: Path) -> None:
    resident = placed(compress_cache=True, cache=Split(gpu=1, cpu=0, disk=0))
    expected, expected_tokens, _ = ours(kept(name, models), resident, models, PROMPTS, 4)
    for cpu_attention in (False, True):
        policy = placed(compress_cache=True, cpu_attention=cpu_attention)
        logits, tokens, _ = ours(kept(name, models), policy, models, PROMPTS, 4)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
        assert tokens.tolist() == expected_tokens.tolist()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_stays_near_float32(name: str, models: Path) -> None:
    expected, _ = theirs(reference(name), PROMPTS, 1)
    logits, _, _ = ours(kept(name, models), placed(), models, PROMPTS, 1, dtype=torch.bfloat16)
    error = float((logits - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    assert error < 0.06


@pytest.mark.parametrize("name", ["bloom", "codegen", "glm4", "qwen3"])
def test_the_engine_searches_a_policy_and_generates(name: str, models: Path) -> None:
    _, expected = theirs(reference(name), PROMPTS, 4)
    params = SamplingParams(max_new_tokens=4, ignore_eos=True)
    memory = {"gpu_memory": "64MiB", "cpu_memory": "64MiB", "offload_dir": str(models)}
    with LLM(kept(name, models), dtype="float32", hardware=Hardware.from_catalog("cpu-laptop"), **memory) as llm:
        found = [list(completion.token_ids) for completion in llm.generate(PROMPTS, params)]
    assert found == expected.tolist()


# ------------------------------------------------------------------ what checkpoints and configs look like


def rewritten(name: str, models: Path, label: str, rename: Any) -> str:
    """A copy of a saved model whose keys are renamed."""
    path = models / f"{label}-{name}"
    shutil.copytree(kept(name, models), path)
    tensors = load_file(path / "model.safetensors")
    save_file({rename(key): value for key, value in tensors.items()}, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bloom", "transformer.", ""),
        ("gpt2", "transformer.", ""),
        ("gpt_neox", "embed_out.", "lm_head."),
        ("gpt_neox", "lm_head.", "embed_out."),
        ("llama", "model.", ""),
    ],
)
def test_other_names_of_the_same_tensors(name: str, old: str, new: str, models: Path) -> None:
    model = rewritten(name, models, f"from-{old}to-{new}", lambda key: key.replace(old, new))
    expected, _, _ = ours(kept(name, models), placed(), models, PROMPTS, 2)
    logits, _, _ = ours(model, placed(), models, PROMPTS, 2)
    assert torch.equal(logits, expected)


def test_a_fused_matrix_of_another_shape_is_named(models: Path) -> None:
    path = models / "misshapen"
    shutil.copytree(kept("bloom", models), path)
    tensors = load_file(path / "model.safetensors")
    key = "transformer.h.1.self_attention.query_key_value.weight"
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(InputError, match=r"query_key_value.weight' has shape \[191, 64\]: .* \[192, 64\] is expected"):
        ours(str(path), placed(), models, PROMPTS, 1)


WIDE = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 2, "max_position_embeddings": 131072}

ROTARY: Mapping[str, dict[str, Any]] = {
    "plain": {"model_type": "llama"},
    "theta": {"model_type": "llama", "rope_theta": 500000.0},
    "linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": LLAMA3_SCALING | {"original_max_position_embeddings": 8192},
    },
    "yarn": {
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "rope_scaling": YARN | {"original_max_position_embeddings": 8192},
    },
    "yarn, all given": {
        "model_type": "qwen3",
        "rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.9},
    },
    "yarn, attention factor, not truncated": {
        "model_type": "llama",
        "rope_scaling": YARN | {"attention_factor": 1.25, "truncate": False},
    },
    "glm": {"model_type": "glm"},
    "glm4, share given": {"model_type": "glm4", "partial_rotary_factor": 0.25},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20000},
    "gpt_neox, defaults": {"model_type": "gpt_neox"},
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.4, "hidden_size": 2560},
}


@pytest.mark.parametrize("case", ROTARY)
def test_angles_are_those_of_transformers_in_both_forms_of_config(case: str) -> None:
    old_form = WIDE | {"vocab_size": 96, "intermediate_size": 64, "pad_token_id": None} | ROTARY[case]
    with torch.device("cpu"):
        config = AutoConfig.for_model(**copy.deepcopy(old_form))
        base = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**copy.deepcopy(old_form) | {"num_hidden_layers": 1})
        )
    rotary = base.base_model.rotary_emb
    new_form = config.to_dict()
    assert "rope_theta" not in new_form
    for form in (old_form, new_form):
        found = architecture(form, name="wide").rotary
        assert found is not None
        assert torch.equal(torch.tensor(found.inverse_frequencies), rotary.inv_freq)
        assert found.factor == rotary.attention_scaling


@pytest.mark.parametrize("heads", [*range(1, 34), 40, 71, 112, 128])
def test_slopes_are_those_of_transformers(heads: int) -> None:
    torch.testing.assert_close(torch.tensor(alibi.slopes(heads)), _get_alibi_slopes(heads, torch.device("cpu")))


def test_gpt_neox_angles_by_hand() -> None:
    rotary = architecture(config_of("gpt_neox"), name="neox").rotary
    assert rotary is not None
    assert rotary.inverse_frequencies == pytest.approx((1.0, 10000**-0.5))  # a quarter of heads of 16, two pairs
    assert rotary.rotary_dim == 4


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", catalog_names())
def test_bytes_of_weights_on_each_tier_are_those_of_the_planner(name: str, compressed: bool) -> None:
    found = architecture(catalog_config(name), name=name)
    spec, layout = found.spec, image_layout(found, dtype=torch.bfloat16, compressed=compressed)
    planned = spec.num_layers * spec.layer_weight_bytes(compressed=compressed) + spec.embedding_bytes + spec.head_bytes
    for split in (
        Split(gpu=0.2, cpu=0.5, disk=0.3),
        Split(gpu=0.55, cpu=0.45, disk=0),
        Split(gpu=0, cpu=0.1, disk=0.9),
    ):
        on = [0, 0, 0]
        for _, unit in layout.units:
            first, second = unit.cuts(split)
            on = [on[0] + first, on[1] + second - first, on[2] + unit.nbytes - second]
        for tier, nbytes in zip(("gpu", "cpu", "disk"), on, strict=True):
            assert abs(nbytes - getattr(split, tier) * planned) <= 0.02 * planned


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bytes_of_a_run_are_those_of_the_planner(name: str, models: Path) -> None:
    """In fp32, twice the planner's 16 bits; the cache's share is honoured to one row."""
    prompts, gen_len, policy = [[5, 9, 3, 8]] * 4, 3, placed()
    with engine(kept(name, models), policy, models) as (weights, movers):
        options = {"weights": weights, "policy": policy, "movers": movers, "directory": models}
        with BlockRun(batches_of(prompts, 4), gen_len=gen_len, **options) as run:
            spec = weights.architecture.spec
            planned = 2 * spec.num_layers * spec.kv_bytes_per_token(compressed=False) * (4 + gen_len) * len(prompts)
            row = planned / (spec.num_layers * spec.num_kv_heads * len(prompts))
            held = 2 * 2 * spec.total_params
            for tier, share in (("gpu", 0.3), ("cpu", 0.3), ("disk", 0.4)):
                assert abs(weights.bytes_on[tier] - share * held) <= 0.02 * held
                padding = 4096 * spec.num_layers * (1 + gen_len) if tier == "disk" else 64 * spec.num_layers * 9
                assert -2 * row <= run.cache.bytes_on[tier] - share * planned <= 2 * row + padding


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 50.0},
            "'gemma2' caps its logits .*, which is not supported",
        ),
        ({"model_type": "llama", "num_local_experts": 8}, "is a mixture of experts"),
        ({"model_type": "chatglm"}, "runs only the checkpoint's own code, .* native successors are glm and glm4"),
        ({"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}}, "runs the checkpoint's own code"),
        ({"model_type": "gemma", "head_dim": 16}, "models of type 'gemma' can be planned for, but not yet run"),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "longrope", "factor": 2}},
            "rope_type is 'longrope': it must be one of default, dynamic, linear, llama3, yarn",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "linear"}},
            "factor of the rotary positions is None: it must be a number above 0",
        ),
        (
            {"model_type": "llama", "rope_parameters": {"full_attention": {"rope_type": "default"}}},
            "field 'rope_parameters' is .*: it must be one set of numbers for all layers",
        ),
        (
            {"model_type": "glm", "head_dim": 16, "partial_rotary_factor": 0.2},
            "partial_rotary_factor is 0.2: it must make an even number of a head's 16 values",
        ),
        ({"model_type": "codegen", "rotary_dim": 32}, "'rotary_dim' is 32: it must be an even number of at most 16"),
        ({"model_type": "codegen", "n_head": 2, "rotary_dim": 8}, "the model has 2 heads: CodeGen fuses them by 4"),
        (
            {"model_type": "bloom", "apply_residual_connection_post_layernorm": True},
            "'apply_residual_connection_post_layernorm' is True: models with it cannot be run",
        ),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "'scale_attn_by_inverse_layer_idx' is True"),
        ({"model_type": "llama", "rms_norm_eps": "small"}, "'rms_norm_eps' is 'small': it must be a number"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_sentence(config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        architecture(SHAPES.get(config["model_type"], LLAMA_LIKE) | config, name="x", where="here")
    assert str(refusal.value).startswith("here: ")
    assert "\n" not in str(refusal.value)
