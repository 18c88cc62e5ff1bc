"""Every family yields the logits of transformers, whatever the policy, from checkpoints as transformers writes them."""

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_runtime_execute import batches_of, ours, policies, prompt_lists, theirs
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from costmodel.errors import InputError
from costmodel.policy import Policy, Split
from runtime import quantization
from runtime.families import FAMILIES, architecture

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

MODELS: Mapping[str, dict[str, Any]] = {
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

SHAPES: Mapping[str, dict[str, Any]] = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_LIKE)


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
