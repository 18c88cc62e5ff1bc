"""Any policy yields the logits and tokens that transformers yields."""

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


def theirs(layout: str, prompts: list[list[int]], gen_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, one prompt at a time and without a cache."""
    model = reference(layout)
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
