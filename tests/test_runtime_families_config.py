"""What a family's config means: angles, slopes and bytes as transformers and the planner have them, or a refusal."""

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from test_runtime_families import LLAMA3_SCALING, LLAMA_LIKE, SHAPES, YARN, config_of
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import _get_alibi_slopes

from costmodel.errors import InputError
from costmodel.model import catalog_config, catalog_names
from costmodel.policy import Split
from runtime import alibi
from runtime.families import architecture
from runtime.layout import image_layout

ROOT = Path(__file__).parents[1]

ONE_HEAD = {"hidden_size": 128, "num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 131072}

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
    "phi": {"model_type": "phi", "partial_rotary_factor": 0.4, "hidden_size": 80},
}


@pytest.mark.parametrize("case", ROTARY)
def test_angles_are_those_of_transformers_in_both_forms_of_config(case: str) -> None:
    sizes = {"num_hidden_layers": 1, "vocab_size": 96, "intermediate_size": 64, "pad_token_id": None}
    old_form = ONE_HEAD | sizes | ROTARY[case]
    config = AutoConfig.for_model(**copy.deepcopy(old_form))
    rotary = AutoModelForCausalLM.from_config(config).base_model.rotary_emb
    new_form = config.to_dict()
    assert "rope_theta" not in new_form
    for form in (old_form, new_form):
        found = architecture(form, name="one head").rotary
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


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", catalog_names())
def test_bytes_of_weights_on_each_tier_are_those_of_the_planner(name: str, compressed: bool) -> None:
    """Within 2 % of the tier's, of whatever size."""
    found = architecture(catalog_config(name), name=name)
    spec, layout = found.spec, image_layout(found, dtype=torch.bfloat16, compressed=compressed)
    planned = spec.num_layers * spec.layer_weight_bytes(compressed=compressed) + spec.embedding_bytes + spec.head_bytes
    for split in (
        Split(gpu=0.2, cpu=0.5, disk=0.3),
        Split(gpu=0.55, cpu=0.45, disk=0),
        Split(gpu=0, cpu=0.1, disk=0.9),
    ):
        on = [0, 0, 0]
        for (_, unit), (first, second) in zip(layout.units, layout.cuts(split), strict=True):
            on = [on[0] + first, on[1] + second - first, on[2] + unit.nbytes - second]
        for tier, nbytes in zip(("gpu", "cpu", "disk"), on, strict=True):
            share = getattr(split, tier)
            assert abs(nbytes - share * planned) <= 0.02 * planned * share


def test_no_running_code_asks_for_the_family() -> None:
    """Only the two descriptions and the reader of configs do; a message names it, and the profiler writes a config."""
    asked = re.compile(r"\.family\b|model_type")
    files = [path for package in ("costmodel", "runtime", "profiler") for path in (ROOT / package).rglob("*.py")]
    asking = {str(path.relative_to(ROOT)) for path in files if asked.search(path.read_text(encoding="utf-8"))}
    described = {"costmodel/families.py", "costmodel/config_reader.py", "runtime/families.py"}
    assert asking == described | {"runtime/checkpoint.py", "profiler/engine_run.py"}


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "gemma2", "attn_logit_softcapping": 50.0},
            "'gemma2' caps its logits .*, which is not supported",
        ),
        (
            {"model_type": "llama", "final_logit_softcapping": 30.0},
            "caps its logits .*'final_logit_softcapping' is 30",
        ),
        ({"model_type": "qwen3", "attn_logit_softcapping": 50.0}, "'qwen3' caps its logits .*, which is not supported"),
        ({"model_type": "llama", "num_local_experts": 8}, "is a mixture of experts"),
        ({"model_type": "granite"}, "models of type 'granite' can be planned for, but not yet run"),
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
