"""Any policy yields the logits and tokens that transformers yields."""

import copy
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from costmodel.policy import Policy, Split
from runtime import execute, quantization
from runtime.cache_format import CacheFormat
from runtime.cache_shape import CacheShape, shares
from runtime.execute import BlockRun
from runtime.movers import Movers
from runtime.pending import Pending
from tests.checkpoints import randomised, saved
from tests.runs import VOCABULARY, ours, policies, prompt_lists, relative_rmse, splits, theirs

LAYOUTS = {
    "pre-norm": {},
    "opt-350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "head dim 20": {"hidden_size": 80, "num_attention_heads": 4},
    "gelu, no final norm": {"activation_function": "gelu", "_remove_final_layer_norm": True},
    "untied, no biases": {"tie_word_embeddings": False, "enable_bias": False},
    "one layer": {"num_hidden_layers": 1},
    "norms without parameters": {"layer_norm_elementwise_affine": False},
}


@cache
def reference(layout: str) -> OPTForCausalLM:
    torch.manual_seed(3)
    shape = {"hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 112, "num_hidden_layers": 3, **LAYOUTS[layout]}
    config = OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=48, **{"word_embed_proj_dim": shape["hidden_size"], **shape}
    )
    return randomised(OPTForCausalLM(config), std=0.25)


def kept(layout: str, models: Path) -> str:
    """The checkpoint of a model, saved once."""
    return saved(reference(layout), models, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists, gen_len=st.integers(1, 5))
def test_any_policy_gives_the_logits_of_transformers(
    layout: str, models: Path, policy: Policy, prompts: list[list[int]], gen_len: int
) -> None:
    expected_logits, expected_tokens = theirs(reference(layout), prompts, gen_len)
    logits, tokens, _ = ours(kept(layout, models), policy, models, prompts, gen_len)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


@pytest.mark.parametrize("layout", ["pre-norm", "opt-350m"])
@pytest.mark.parametrize("at_once", [1, 2])
def test_prompts_of_a_batch_that_are_computed_in_pieces_stay_in_order(
    layout: str, at_once: int, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill of three padded prompts, one or two at a time; nothing but their ends waits for the last layer."""
    prompts, gen_len = [[5, 9, 11, 40, 77, 3, 8], [9, 17, 2], [4, 8, 15, 16, 23]], 3
    monkeypatch.setitem(execute.PREFILL_ROWS, "cpu", at_once * len(prompts[0]))
    joined: list[list[torch.Tensor]] = []
    cat = torch.cat
    monkeypatch.setattr(
        execute.torch, "cat", lambda some, *rest, **how: (joined.append(some), cat(some, *rest, **how))[1]
    )
    here = Split(gpu=1.0, cpu=0.0, disk=0.0)
    policy = Policy(weights=here, cache=here, activations=here, gpu_batch_size=3, num_gpu_batches=1)
    logits, tokens, _ = ours(kept(layout, models), policy, models, prompts, gen_len)
    ends = [some for some in joined if all(one.dim() == 4 and one.shape[2] == 1 for one in some)]
    assert -(-3 // at_once) in map(len, ends)
    assert all(one.untyped_storage().nbytes() == one.nbytes for some in ends for one in some)
    expected_logits, expected_tokens = theirs(reference(layout), prompts, gen_len)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


@pytest.mark.parametrize("batches", [1, 2, 3])
def test_hidden_states_that_are_awaited_come_before_weights_and_weights_last(
    models: Path, monkeypatch: pytest.MonkeyPatch, batches: int
) -> None:
    """With one or two batches they cannot be loaded ahead: no weights are begun until they are there."""
    begun: list[tuple[str, bool]] = []
    load, settle = Movers.load, Movers.settle

    def noted(movers: Movers, *where: Any, name: str, **how: Any) -> Pending:
        begun.append((name.split()[0], False))
        return load(movers, *where, name=name, **how)

    def settled(movers: Movers, *, awaited: bool) -> None:
        if awaited and begun:
            begun[-1] = (begun[-1][0], True)
        settle(movers, awaited=awaited)

    move, compute, moved = BlockRun._move, BlockRun._compute, list[str]()
    monkeypatch.setattr(BlockRun, "_move", lambda run, step: (moved.append(step.kind), move(run, step)))
    monkeypatch.setattr(BlockRun, "_compute", lambda run, *what: (moved.append("compute"), compute(run, *what)))
    monkeypatch.setattr(Movers, "load", noted)
    monkeypatch.setattr(Movers, "settle", settled)
    on_disk, here = Split(gpu=0.0, cpu=0.0, disk=1.0), Split(gpu=1.0, cpu=0.0, disk=0.0)
    policy = Policy(
        weights=on_disk, cache=here, activations=on_disk, gpu_batch_size=1, num_gpu_batches=batches, overlap=True
    )
    ours(kept("pre-norm", models), policy, models, [[5, 6, 7]] * batches, 3)
    hidden = [awaited for name, awaited in begun if name == "hidden"]
    weights = [awaited for name, awaited in begun if name == "weights"]
    assert len(hidden) > 3 * batches
    assert len(weights) > 3
    assert all(hidden) if batches <= 2 else not any(hidden[1:])  # before the first computation all is awaited
    assert not any(weights)
    after = {one for before, one in pairwise(moved[moved.index("compute") :]) if before == "load_weights"}
    assert after == {"compute"}


# ------------------------------------------------------------------ narrower types, against what they promise


def dequantised(layout: str) -> OPTForCausalLM:
    """transformers' model with the weights of its layers as 4 bits leave them."""
    model = copy.deepcopy(reference(layout))
    for layer in model.model.decoder.layers:
        attention = layer.self_attn
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.fc1, layer.fc2):
            packed = quantization.quantize_linear(linear.weight.data)
            linear.weight.data = quantization.dequantize_linear(packed, dtype=torch.float32).contiguous()
    return model


@pytest.mark.parametrize("layout", ["pre-norm", "opt-350m", "head dim 20"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists)
def test_compressed_weights_are_exactly_the_dequantised_ones(
    layout: str, models: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    expected, _ = theirs(dequantised(layout), prompts, 3)
    logits, _, _ = ours(kept(layout, models), policy.replace(compress_weights=True), models, prompts, 3)
    torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=0, atol=1e-4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists)
def test_a_compressed_cache_gives_the_same_wherever_it_lies(
    models: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    resident = policy.replace(cache=Split(gpu=1, cpu=0, disk=0), cpu_attention=False, compress_cache=True)
    expected, expected_tokens, _ = ours(kept("pre-norm", models), resident, models, prompts, 5)
    logits, tokens, _ = ours(kept("pre-norm", models), policy.replace(compress_cache=True), models, prompts, 5)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


def test_a_compressed_cache_stays_near_the_plain_one(models: Path) -> None:
    """The first token needs no cache and is exact; the next one attends to keys and values rounded to 4 bits."""
    prompts = [[5, 9, 11, 40, 77, 3, 8], [9, 9, 17, 2, 100, 51, 60]]
    policy = Policy(
        weights=Split(gpu=1, cpu=0, disk=0),
        cache=Split(gpu=0.5, cpu=0, disk=0.5),
        activations=Split(gpu=1, cpu=0, disk=0),
        gpu_batch_size=2,
        num_gpu_batches=1,
    )
    plain, _, _ = ours(kept("pre-norm", models), policy, models, prompts, 2)
    packed, _, _ = ours(kept("pre-norm", models), policy.replace(compress_cache=True), models, prompts, 2)
    torch.testing.assert_close(packed[:, 0], plain[:, 0], rtol=0, atol=1e-4)
    assert 0 < relative_rmse(packed[:, 1], plain[:, 1]) < 0.2


@pytest.mark.parametrize("layout", ["pre-norm", "opt-350m"])
def test_bfloat16_stays_near_float32(layout: str, models: Path) -> None:
    prompts = [[5, 9, 11, 40, 77, 3, 8], [9, 17, 2]]
    policy = Policy(
        weights=Split(gpu=0.3, cpu=0.3, disk=0.4),
        cache=Split(gpu=0.5, cpu=0.2, disk=0.3),
        activations=Split(gpu=1, cpu=0, disk=0),
        gpu_batch_size=2,
        num_gpu_batches=1,
    )
    expected, _ = theirs(reference(layout), prompts, 1)
    logits, _, _ = ours(kept(layout, models), policy, models, prompts, 1, dtype=torch.bfloat16)
    assert relative_rmse(logits, expected) < 0.05


# ------------------------------------------------------------------ the shares of the cache


@given(
    split=splits(),
    layers=st.integers(1, 6),
    kv_heads=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
@example(split=Split(gpu=0.36, cpu=0.5, disk=0.14), layers=3, kv_heads=1, sizes=[1, 2])  # half of two rows is whole
def test_rows_of_the_cache_miss_the_split_by_less_than_one(
    split: Split, layers: int, kv_heads: int, sizes: list[int]
) -> None:
    shape = CacheShape(
        num_layers=layers,
        num_kv_heads=kv_heads,
        format=CacheFormat(head_dim=8, dtype=torch.float32, compressed=False),
        batch_sizes=tuple(sizes),
        prompt_lens=(3,) * len(sizes),
        new_tokens=2,
    )
    found = shares(shape, split)
    total = layers * kv_heads * sum(sizes)
    for tier in ("gpu", "cpu", "disk"):
        rows = sum(getattr(share, tier) for share in found.values())
        assert abs(rows - getattr(split, tier) * total) <= 1
    for (_, batch), share in found.items():
        rows = kv_heads * sizes[batch]
        assert share.gpu + share.cpu + share.disk == rows
        for tier in ("gpu", "cpu", "disk"):
            assert abs(getattr(share, tier) - getattr(split, tier) * rows) < 1, "one of two numbers for each batch size"
