"""Any policy yields the logits and tokens that transformers yields."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from costmodel.policy import Policy, Split
from runtime import quantization
from runtime.cache_format import CacheFormat
from runtime.cache_shape import CacheShape, shares
from runtime.execute import Batch, BlockRun
from runtime.image import open_image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights

VOCABULARY = 131

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
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # biases and norms start as 0 and 1, which hides mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.25 + (1.0 if "norm.weight" in name else 0.0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def saved(layout: str, folder: Path) -> str:
    path = folder / layout.replace(" ", "-").replace(",", "")
    if not path.exists():
        reference(layout).save_pretrained(path)
    return str(path)


@contextmanager
def engine(
    model: str, policy: Policy, directory: Path, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[Weights, Movers]]:
    image = open_image(model, directory=directory, dtype=dtype, compressed=policy.compress_weights)
    with Movers(torch.device("cpu"), timeline=Timeline(), overlap=policy.overlap, chunk_bytes=4096) as movers:
        weights = Weights(image, policy.weights, movers)
        weights.fill()
        yield weights, movers


def batches_of(prompts: list[list[int]], size: int) -> list[Batch]:
    made = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        longest = max(map(len, part))
        ids = torch.tensor([[1] * (longest - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part]).bool()
        made.append(Batch(token_ids=ids, mask=None if bool(mask.all()) else mask))
    return made


def ours(
    model: str, policy: Policy, directory: Path, prompts: list[list[int]], gen_len: int, dtype=torch.float32
) -> tuple[torch.Tensor, torch.Tensor, BlockRun]:
    """Logits (prompts, steps, vocabulary) and greedy tokens (prompts, steps)."""
    batches = batches_of(prompts, policy.gpu_batch_size)
    logits: dict[tuple[int, int], torch.Tensor] = {}

    def choose(batch: int, found: torch.Tensor, step: int) -> torch.Tensor:
        logits[batch, step] = found.float()
        return found.argmax(-1)

    with engine(model, policy, directory, dtype) as (weights, movers):
        options = {"weights": weights, "policy": policy, "movers": movers, "directory": directory}
        with BlockRun(batches, gen_len=gen_len, **options) as run:
            times = run.run(choose)
            assert times.steps == gen_len
    rows = [torch.stack([logits[b, step] for step in range(gen_len)], 1) for b in range(len(batches))]
    joined = torch.cat(rows)
    return joined, joined.argmax(-1), run


def theirs(
    layout: str, prompts: list[list[int]], gen_len: int, model: OPTForCausalLM | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, one prompt at a time and without a cache."""
    model = model or reference(layout)
    all_logits, all_tokens = [], []
    for prompt in prompts:
        ids, logits = list(prompt), []
        for _ in range(gen_len):
            with torch.no_grad():
                last = model(input_ids=torch.tensor([ids])).logits[0, -1]
            logits.append(last)
            ids.append(int(last.argmax()))
        all_logits.append(torch.stack(logits))
        all_tokens.append(torch.tensor(ids[len(prompt) :]))
    return torch.stack(all_logits), torch.stack(all_tokens)


@st.composite
def splits(draw: st.DrawFn) -> Split:
    kind = draw(st.sampled_from(("gpu", "cpu", "disk", "mixed", "mixed", "mixed")))
    if kind != "mixed":
        return Split(**{tier: float(tier == kind) for tier in ("gpu", "cpu", "disk")})
    gpu = draw(st.integers(0, 100))
    cpu = draw(st.integers(0, 100 - gpu))
    return Split(gpu=gpu / 100, cpu=cpu / 100, disk=(100 - gpu - cpu) / 100)


policies = st.builds(
    Policy,
    weights=splits(),
    cache=splits(),
    activations=splits(),
    gpu_batch_size=st.integers(1, 4),
    num_gpu_batches=st.just(1),
    cpu_attention=st.booleans(),
    overlap=st.booleans(),
)
prompt_lists = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=9), min_size=1, max_size=6)


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists, gen_len=st.integers(1, 5))
def test_any_policy_gives_the_logits_of_transformers(
    layout: str, folder: Path, policy: Policy, prompts: list[list[int]], gen_len: int
) -> None:
    expected_logits, expected_tokens = theirs(layout, prompts, gen_len)
    logits, tokens, _ = ours(saved(layout, folder), policy, folder, prompts, gen_len)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


# ------------------------------------------------------------------ narrower types, against what they promise


def relative_rmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


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
    layout: str, folder: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    expected, _ = theirs(layout, prompts, 3, model=dequantised(layout))
    logits, _, _ = ours(saved(layout, folder), policy.replace(compress_weights=True), folder, prompts, 3)
    torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=0, atol=1e-4)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists)
def test_a_compressed_cache_gives_the_same_wherever_it_lies(
    folder: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    resident = policy.replace(cache=Split(gpu=1, cpu=0, disk=0), cpu_attention=False, compress_cache=True)
    expected, expected_tokens, _ = ours(saved("pre-norm", folder), resident, folder, prompts, 5)
    logits, tokens, _ = ours(saved("pre-norm", folder), policy.replace(compress_cache=True), folder, prompts, 5)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    assert tokens.tolist() == expected_tokens.tolist()


def test_a_compressed_cache_stays_near_the_plain_one(folder: Path) -> None:
    """The first token needs no cache and is exact; the next one attends to keys and values rounded to 4 bits."""
    prompts = [[5, 9, 11, 40, 77, 3, 8], [9, 9, 17, 2, 100, 51, 60]]
    policy = Policy(
        weights=Split(gpu=1, cpu=0, disk=0),
        cache=Split(gpu=0.5, cpu=0, disk=0.5),
        activations=Split(gpu=1, cpu=0, disk=0),
        gpu_batch_size=2,
        num_gpu_batches=1,
    )
    plain, _, _ = ours(saved("pre-norm", folder), policy, folder, prompts, 2)
    packed, _, _ = ours(saved("pre-norm", folder), policy.replace(compress_cache=True), folder, prompts, 2)
    torch.testing.assert_close(packed[:, 0], plain[:, 0], rtol=0, atol=1e-4)
    assert 0 < relative_rmse(packed[:, 1], plain[:, 1]) < 0.2


@pytest.mark.parametrize("layout", ["pre-norm", "opt-350m"])
def test_bfloat16_stays_near_float32(layout: str, folder: Path) -> None:
    prompts = [[5, 9, 11, 40, 77, 3, 8], [9, 17, 2]]
    policy = Policy(
        weights=Split(gpu=0.3, cpu=0.3, disk=0.4),
        cache=Split(gpu=0.5, cpu=0.2, disk=0.3),
        activations=Split(gpu=1, cpu=0, disk=0),
        gpu_batch_size=2,
        num_gpu_batches=1,
    )
    expected, _ = theirs(layout, prompts, 1)
    logits, _, _ = ours(saved(layout, folder), policy, folder, prompts, 1, dtype=torch.bfloat16)
    assert relative_rmse(logits, expected) < 0.05


# ------------------------------------------------------------------ the shares of the cache


@given(
    split=splits(),
    layers=st.integers(1, 6),
    kv_heads=st.integers(1, 5),
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=4),
)
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
        assert share.gpu + share.cpu + share.disk == kv_heads * sizes[batch]
        assert min(share.gpu, share.cpu, share.disk) >= 0
