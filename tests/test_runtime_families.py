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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.policy import Policy, Split
from runtime import LLM, SamplingParams, quantization
from runtime.attention import TOKENS_STEP
from runtime.execute import BlockRun
from runtime.families import FAMILIES
from runtime.kv_cache import KvCache
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
    "phi3, half turned, window of 5": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "sliding_window": 5,
    },
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
    """A copy in depth: transformers writes into the rope parameters that it is given."""
    return copy.deepcopy(SHAPES[MODELS[name]["model_type"]] | MODELS[name])


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


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bytes_of_a_run_are_those_of_the_planner(name: str, models: Path) -> None:
    """In fp32, twice the planner's 16 bits; long enough that a page or a row is not 2 % of anything."""
    prompts, gen_len, policy = [[5, 9, 3, 8] * 10] * 240, 2, placed(gpu_batch_size=240)
    with engine(kept(name, models), policy, models) as (weights, movers):
        options = {"weights": weights, "policy": policy, "movers": movers, "directory": models}
        with BlockRun(batches_of(prompts, 240), gen_len=gen_len, **options) as run:
            spec = weights.architecture.spec
            planned = 2 * spec.num_layers * spec.kv_bytes_per_token(compressed=False) * (40 + gen_len) * len(prompts)
            held = 2 * 2 * spec.total_params
            for tier, share in (("gpu", 0.3), ("cpu", 0.3), ("disk", 0.4)):
                assert abs(weights.bytes_on[tier] - share * held) <= 0.02 * held
                assert abs(run.cache.bytes_on[tier] - share * planned) <= 0.02 * share * planned


# ------------------------------------------------------------------ grouped kv heads


class Allocated(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes; views of what is there already make none."""

    largest_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given, new = (
            {value.untyped_storage().data_ptr(): value.nbytes for value in tree_leaves(tree) if torch.is_tensor(value)}
            for tree in ((args, kwargs), made)
        )
        self.largest_bytes = max([self.largest_bytes, *(new[key] for key in new.keys() - given.keys())])
        return made


@pytest.mark.parametrize(
    ("cache", "cpu_attention"),
    [(Split(gpu=1, cpu=0, disk=0), False), (Split(gpu=0, cpu=1, disk=0), True), (Split(gpu=0, cpu=0, disk=1), True)],
    ids=["first tier", "host memory", "disk"],
)
def test_grouped_kv_heads_are_never_expanded(
    cache: Split, cpu_attention: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 query heads of 32 values on one kv head: scores are a quarter of the keys, expanded keys eight times them."""
    shape = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": 1}
    config = AutoConfig.for_model(**LLAMA_LIKE | shape | {"model_type": "llama", "num_hidden_layers": 1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    plain, attended = KvCache.attend, Allocated()

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        with attended:
            return plain(*args, **options)

    monkeypatch.setattr(KvCache, "attend", watched)
    prompts, tokens = [[5, 9, 3, 8] * 10] * 6, 44
    ours(str(tmp_path), placed(cache=cache, cpu_attention=cpu_attention, gpu_batch_size=6), tmp_path, prompts, 4)
    keys_bytes = len(prompts) * tokens * 32 * 4
    scores_bytes = len(prompts) * 8 * tokens * 4
    gathered_bytes = 2 * len(prompts) * TOKENS_STEP * 32 * 4 if cache.disk else 0  # carried tokens after the prompt
    assert keys_bytes / 8 < attended.largest_bytes <= max(scores_bytes, gathered_bytes) < keys_bytes
