"""Every family yields the logits of transformers, whatever the policy, from checkpoints as transformers writes them."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runtime_execute import ours, policies, prompt_lists, theirs
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from costmodel.policy import Policy, Split

VOCABULARY = 131

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
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # biases and norms start as 0 and 1, which hides mistakes
            is_norm = parameter.dim() == 1 and key.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if is_norm else 0.0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def saved(name: str, folder: Path) -> str:
    path = folder / name.replace(" ", "-").replace(",", "")
    if not path.exists():
        reference(name).save_pretrained(path)
    return str(path)


def every_model() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", MODELS)


def drawn(examples: int) -> Any:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, suppress_health_check=checks)


PROMPTS = [[5, 9, 11, 40, 77, 3, 8, 2], [9], [17, 2, 100, 51, 60], [1, 1, 8, 2, 4, 4, 90, 12]]


def placed(**changes: Any) -> Policy:
    third = Split(gpu=0.3, cpu=0.3, disk=0.4)
    fields = {"weights": third, "cache": third, "activations": third, "gpu_batch_size": 4, "num_gpu_batches": 1}
    return Policy(**(fields | changes))


@every_model()
def test_logits_of_padded_prompts_are_those_of_transformers(name: str, folder: Path) -> None:
    expected_logits, expected_tokens = theirs("", PROMPTS, 6, model=reference(name))
    logits, tokens, _ = ours(saved(name, folder), placed(), folder, PROMPTS, 6)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


@every_model()
@drawn(4)
@given(policy=policies, prompts=prompt_lists, gen_len=st.integers(1, 5))
def test_any_policy_gives_the_logits_of_transformers(
    name: str, folder: Path, policy: Policy, prompts: list[list[int]], gen_len: int
) -> None:
    expected_logits, expected_tokens = theirs("", prompts, gen_len, model=reference(name))
    logits, tokens, _ = ours(saved(name, folder), policy, folder, prompts, gen_len)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()
