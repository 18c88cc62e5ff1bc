"""Layouts: tensors side by side without overlap, units at whole pages, cuts only where a matrix can be cut."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.model import catalog_config, catalog_names
from costmodel.policy import Split
from runtime.families import architecture
from runtime.layout import ImageLayout, UnitLayout, image_layout, is_compressible, parameter_dtype
from runtime.tiers import ALIGNMENT

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def config(
    heads: int = 2, head_dim: int = 8, ffn: int = 24, vocab: int = 50, layers: int = 2, **more: object
) -> dict[str, Any]:
    return {
        "model_type": "opt",
        "vocab_size": vocab,
        "hidden_size": heads * head_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn,
        "max_position_embeddings": 10,
        "word_embed_proj_dim": heads * head_dim,
        **more,
    }


@st.composite
def layouts(draw: st.DrawFn) -> ImageLayout:
    found = architecture(
        config(
            heads=draw(st.integers(1, 5)),
            head_dim=draw(st.sampled_from((1, 3, 8, 40, 80))),
            ffn=draw(st.integers(1, 300)),
            vocab=draw(st.integers(1, 200)),
            layers=draw(st.integers(1, 3)),
            tie_word_embeddings=draw(st.booleans()),
            enable_bias=draw(st.booleans()),
            do_layer_norm_before=draw(st.booleans()),
        ),
        name="drawn",
    )
    return image_layout(found, dtype=draw(st.sampled_from(DTYPES)), compressed=draw(st.booleans()))


def allowed_cuts(unit: UnitLayout) -> list[int]:
    """Every offset between two tensors (written as the start of the second), and between two pieces of one."""

    def offsets() -> Iterator[int]:
        for field in unit.fields:
            yield from range(field.offset, field.stop, field.piece_bytes)
        yield unit.nbytes

    return sorted(set(offsets()))


@given(layout=layouts())
def test_units_and_tensors_are_aligned_and_never_overlap(layout: ImageLayout) -> None:
    places = [(layout.offsets[name], unit) for name, unit in layout.units]
    assert all(offset % ALIGNMENT == 0 for offset, _ in places)
    assert places[0][0] == 0
    for (offset, unit), (behind, _) in pairwise(places):
        assert 0 <= behind - (offset + unit.nbytes) < ALIGNMENT
    assert 0 <= layout.nbytes - (places[-1][0] + places[-1][1].nbytes) < ALIGNMENT
    for _, unit in places:
        assert all(field.offset % 64 == 0 for field in unit.fields)
        for field, behind_field in pairwise(unit.fields):
            assert 0 <= behind_field.offset - field.stop < 64
        if unit.fields:
            assert unit.fields[0].offset == 0
            assert unit.nbytes == unit.fields[-1].stop
        assert all(field.nbytes % field.piece_bytes == 0 for field in unit.fields)


def longest_uncut(unit: UnitLayout) -> int:
    """Bytes between two neighbouring places where a unit may be cut."""
    return max((b - a for a, b in pairwise(sorted(allowed_cuts(unit)))), default=0)


@given(layout=layouts(), share=st.floats(0, 1))
def test_a_cut_is_the_nearest_allowed_one(layout: ImageLayout, share: float) -> None:
    for unit in (layout.table, layout.layer, layout.head, layout.embedding):
        target = share * unit.nbytes
        cut = unit.cut(target)
        allowed = allowed_cuts(unit)
        assert cut in allowed
        assert abs(cut - target) == min(abs(offset - target) for offset in allowed)


@given(layout=layouts(), gpu=st.floats(0, 1), cpu=st.floats(0, 1))
def test_cuts_are_in_order_and_whole_shares_are_exact(layout: ImageLayout, gpu: float, cpu: float) -> None:
    cpu = min(cpu, 1 - gpu)
    split = Split(gpu=gpu, cpu=cpu, disk=max(0.0, 1 - gpu - cpu))
    on, biggest = [0, 0], 0
    for (_, unit), (first, second) in zip(layout.units, layout.cuts(split), strict=True):
        on, biggest = [on[0] + first, on[1] + second - first], max(biggest, longest_uncut(unit))
        assert 0 <= first <= second <= unit.nbytes
        if split.gpu == 1:
            assert first == unit.nbytes
        if split.gpu == 0:
            assert first == 0
        if split.disk == 0:
            assert second == unit.nbytes
        if split.disk == 1:
            assert (first, second) == (0, 0)
    whole = sum(unit.nbytes for _, unit in layout.units)
    assert abs(on[0] - gpu * whole) <= biggest
    assert abs(on[1] - cpu * whole) <= 2 * biggest


@given(layout=layouts())
def test_a_cut_never_separates_rows_of_a_block_or_values_of_a_vector(layout: ImageLayout) -> None:
    for field in (field for _, unit in layout.units for field in unit.fields):
        pieces = field.nbytes // field.piece_bytes
        if field.name.endswith(":scales") or len(field.shape) == 1:
            assert pieces == 1
        elif field.name.endswith(":packed"):
            assert pieces == -(-field.rows // 64)
        else:
            assert pieces == field.rows == field.shape[0]


@pytest.mark.parametrize("name", catalog_names())
def test_bytes_are_those_that_the_planner_counts(name: str) -> None:
    found = architecture(catalog_config(name), name=name)
    spec = found.spec
    layout = image_layout(found, dtype=torch.bfloat16, compressed=False)
    # All widths of OPT are multiples of 32 values: no gap lies between tensors.
    assert layout.layer.nbytes == spec.layer_weight_bytes(compressed=False)
    assert layout.table.nbytes + layout.positions.nbytes + layout.embedding.nbytes == spec.embedding_bytes
    assert layout.head.nbytes == spec.head_bytes
    assert 0 <= layout.nbytes - 2 * spec.total_params < ALIGNMENT * len(layout.units)


@pytest.mark.parametrize("name", catalog_names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_bytes_are_those_that_the_planner_counts(name: str, dtype: torch.dtype) -> None:
    found = architecture(catalog_config(name), name=name)
    layout = image_layout(found, dtype=dtype, compressed=True)
    vectors = found.spec.layer_vector_params
    # The planner counts vectors in 16 bits; the scales are 16-bit whatever the type is.
    expected = found.spec.layer_weight_bytes(compressed=True) + (dtype.itemsize - 2) * vectors
    assert layout.layer.nbytes == expected
    plain = image_layout(found, dtype=dtype, compressed=False)
    assert (layout.table, layout.head) == (plain.table, plain.head)


def test_a_layer_in_the_order_of_use() -> None:
    layout = image_layout(architecture(config(), name="tiny"), dtype=torch.float32, compressed=True)
    names = [field.name for field in layout.layer.fields]
    assert names[:7] == [
        "attention_norms.before.weight",
        "attention_norms.before.bias",
        "mlp_norms.before.weight",
        "mlp_norms.before.bias",
        "query.bias",
        "query.weight:scales",
        "query.weight:packed",
    ]
    scales, packed = (layout.layer.field(f"up.weight:{part}") for part in ("scales", "packed"))
    assert (scales.shape, scales.dtype, scales.rows) == ((1, 64, 2), torch.bfloat16, 24)
    assert (packed.shape, packed.dtype, packed.rows) == ((1, 16, 32), torch.uint8, 24)
    assert [name for name, _ in layout.units] == ["table", "positions", "embedding", "layers.0", "layers.1", "head"]
    assert layout.embedding.nbytes == 0
    assert layout.embedding.cut(0.5) == 0


def test_cut_by_hand() -> None:
    layout = image_layout(architecture(config(vocab=100), name="tiny"), dtype=torch.float32, compressed=False)
    assert layout.table.nbytes == 100 * 64
    assert [layout.table.cut(target) for target in (0, 25, 38, 1280, 1306, 6400)] == [0, 0, 64, 1280, 1280, 6400]
    assert layout.cuts(Split(gpu=0.2, cpu=0.3, disk=0.5))[0] == (1280, 3200)
    assert layout.cuts(Split(gpu=0.2, cpu=0.8, disk=0))[0] == (1280, 6400)
    # 0.205 of 100 rows is 20.5: what the table is given too little of (or too much) the positions make up for.
    first, second = (cut for cut, _ in layout.cuts(Split(gpu=0.205, cpu=0.795, disk=0))[:2])
    assert first in (1280, 1344)
    assert first + second == layout.positions.cut(0.205 * (6400 + layout.positions.nbytes) - first) + first


def test_types() -> None:
    found = architecture(config(), name="tiny")
    with pytest.raises(InputError, match="dtype is torch.int8: it must be float32, bfloat16 or float16"):
        image_layout(found, dtype=torch.int8, compressed=False)
    assert [parameter_dtype(dtype) for dtype in DTYPES] == [torch.bfloat16, torch.bfloat16, torch.float16]
    matrices = [tensor.name for tensor in found.layer if is_compressible(tensor)]
    assert matrices == [f"{name}.weight" for name in ("query", "key", "value", "out", "up", "down")]
    assert not is_compressible(found.table)
