"""Placed weights: a matrix that is cut between tiers is the matrix, and takes no memory beside its own."""

from pathlib import Path

import pytest
import torch

from costmodel.policy import Policy, Split
from runtime.layers import LayerWeights, RowParts, Weight
from runtime.quantization import Quantized4bitLinear, dequantize_linear
from runtime.weights import Weights
from tests.checkpoints import random_model, save
from tests.runs import engine

WHOLE = Split(gpu=1, cpu=0, disk=0)
SHAPE = {"hidden_size": 192, "word_embed_proj_dim": 192, "num_attention_heads": 6, "ffn_dim": 336}
MATRICES = ("query", "key", "value", "out", "up", "down")


def policy(weights: Split) -> Policy:
    return Policy(
        weights=weights,
        cache=WHOLE,
        activations=WHOLE,
        gpu_batch_size=1,
        num_gpu_batches=1,
        cpu_attention=False,
        compress_weights=True,
    )


def loaded(weights: Weights, layer: int) -> LayerWeights:
    weights.start(layer, 0)
    weights.finish(0)
    return weights.layer(layer, 0)


def values(weight: Weight) -> torch.Tensor:
    parts = weight.parts if isinstance(weight, RowParts) else (weight,)
    four_bit = [part for part in parts if isinstance(part, Quantized4bitLinear)]
    assert len(four_bit) == len(parts)
    return torch.cat([dequantize_linear(part, dtype=torch.float32) for part in four_bit])


@pytest.mark.parametrize("share", [share / 20 for share in range(1, 20)])
def test_scales_of_a_cut_matrix_are_parted_where_they_lie(share: float, tmp_path: Path) -> None:
    """In either layer each share cuts another matrix; what a copy held was 1/8 of it in every layer."""
    folder = str(save(random_model(**SHAPE), tmp_path / "model"))
    split = Split(gpu=share, cpu=0, disk=1 - share)
    with (
        engine(folder, policy(WHOLE), tmp_path) as (whole, _),
        engine(folder, policy(split), tmp_path) as (cut, _),
    ):
        own = {memory.untyped_storage().data_ptr() for memory in (cut._resident, *cut._staging)}
        for number in range(2):
            here, there = loaded(cut, number), loaded(whole, number)
            for name in MATRICES:
                weight = getattr(here, name).weight
                assert torch.equal(values(weight), values(getattr(there, name).weight))
                for part in weight.parts if isinstance(weight, RowParts) else (weight,):
                    assert part.scales_and_zeros.is_contiguous()
                    assert part.scales_and_zeros.untyped_storage().data_ptr() in own


def test_some_share_cuts_every_matrix(tmp_path: Path) -> None:
    folder = str(save(random_model(**SHAPE), tmp_path / "model"))
    seen = set()
    for percent in range(1, 100):
        split = Split(gpu=percent / 100, cpu=0, disk=1 - percent / 100)
        with engine(folder, policy(split), tmp_path) as (cut, _):
            layer = loaded(cut, 1)
            seen |= {name for name in MATRICES if isinstance(getattr(layer, name).weight, RowParts)}
    assert seen == set(MATRICES)
