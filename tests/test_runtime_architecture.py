"""Architectures name each tensor of a model once, with the shape that transformers gives it."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from costmodel.errors import InputError
from costmodel.model import ModelSpec, catalog_config, catalog_names
from runtime.architecture import LAYER_MATRICES, TensorSpec
from runtime.families import architecture
from runtime.layers import Norm

TINY = {
    "model_type": "opt",
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 20,
    "word_embed_proj_dim": 32,
    "activation_function": "relu",
}

VARIANTS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "as 350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "no final norm": {"_remove_final_layer_norm": True},
    "no biases": {"enable_bias": False},
    "norms without parameters": {"layer_norm_elementwise_affine": False},
    "untied and projected": {"tie_word_embeddings": False, "word_embed_proj_dim": 16},
}


def transformers_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of transformers' model; tied ones once, under their first name."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", catalog_names())
def test_tensors_of_the_catalogue_are_those_of_transformers(name: str) -> None:
    config = catalog_config(name)
    tensors = list(architecture(config, name=name).tensors())
    shapes = {tensor.source.format(layer=layer): tensor.stored or tensor.shape for tensor, layer in tensors}
    assert shapes == transformers_shapes(config)
    assert sum(torch.Size(tensor.shape).numel() for tensor, _ in tensors) == ModelSpec.from_catalog(name).total_params


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_of_variants_are_those_of_transformers(variant: str) -> None:
    config = TINY | VARIANTS[variant]
    found = architecture(config, name="tiny")
    shapes = {tensor.source.format(layer=layer): tensor.shape for tensor, layer in found.tensors()}
    assert shapes == transformers_shapes(config)
    assert found.tied_head == ("untied" not in variant)


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_that_the_planner_counts(variant: str) -> None:
    found = architecture(TINY | VARIANTS[variant], name="tiny")
    spec = found.spec

    def params(*tensors: TensorSpec) -> int:
        return sum(torch.Size(tensor.shape).numel() for tensor in tensors)

    assert params(*found.layer) == spec.layer_params
    assert found.positions is not None
    assert params(found.table, found.positions, *found.embedding) == spec.embedding_params
    assert params(*found.head) == spec.head_params


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_holds_each_of_its_tensors_in_its_place(variant: str) -> None:
    found = architecture(TINY | VARIANTS[variant], name="tiny")
    tensors = {tensor.name: torch.randn(tensor.shape) for tensor in found.layer}
    layer = found.layer_weights(tensors)
    for name in LAYER_MATRICES:
        linear = getattr(layer, name)
        assert (linear is None) == (f"{name}.weight" not in tensors)
        if linear is not None:
            assert linear.weight is tensors[f"{name}.weight"]
            assert linear.bias is tensors.get(f"{name}.bias")
    place, other = ("before", "residual") if found.norms >= {"mlp_norms.before"} else ("residual", "before")
    assert place == ("residual" if variant == "as 350m" else "before")
    for sublayer in ("attention_norms", "mlp_norms"):
        norms = getattr(layer, sublayer)
        norm = getattr(norms, place)
        assert isinstance(norm, Norm)
        assert norm.weight is tensors.get(f"{sublayer}.{place}.weight")
        assert norm.bias is tensors.get(f"{sublayer}.{place}.bias")
        assert norm.epsilon == 1e-5
        assert getattr(norms, other) is None
        assert norms.output is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_embedding_and_head_hold_their_tensors(variant: str) -> None:
    found = architecture(TINY | VARIANTS[variant], name="tiny")
    table = torch.randn(found.table.shape)
    embedding = {tensor.name: torch.randn(tensor.shape) for tensor in found.embedding}
    head = {tensor.name: torch.randn(tensor.shape) for tensor in found.head}
    matrix = table if found.tied_head else head["matrix.weight"]
    weights = found.head_weights(head | {"matrix.weight": matrix})
    assert weights.matrix.weight is matrix
    assert (weights.norm is None) == (variant in ("as 350m", "no final norm"))
    assert (weights.project_out is None) == (found.spec.embedding_size == 32)
    project_in = found.embedding_weights(embedding).project_in
    assert (project_in is None) == (found.spec.embedding_size == 32)
    if project_in is not None:
        assert project_in.weight is embedding["project_in.weight"]
        assert project_in.bias is None


def test_layer_shape_is_the_configs() -> None:
    found = architecture(TINY | {"activation_function": "gelu"}, name="tiny")
    assert (found.layer_shape.num_heads, found.layer_shape.head_dim) == (4, 8)
    assert found.layer_shape.activation == "gelu"
    assert found.layer_shape.attention_scale == 8**-0.5
    assert found.position_offset == 2


def test_unknown_activation_is_named() -> None:
    with pytest.raises(InputError, match="activation is 'mystery': it must be one of"):
        architecture(TINY | {"activation_function": "mystery"}, name="tiny")


def test_family_that_can_be_planned_but_not_run() -> None:
    config = AutoConfig.for_model("granite").to_dict()
    told = r"here: models of type 'granite' can be planned for, but not yet run \(these can: "
    with pytest.raises(InputError, match=told):
        architecture(config, name="granite", where="here")
