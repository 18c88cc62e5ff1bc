"""The same prompts through our runtime and through transformers, under any policy that hypothesis draws."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hypothesis import strategies as st
from transformers import PreTrainedModel

from costmodel.policy import Policy, Split
from runtime.execute import Batch, BlockRun
from runtime.image import open_image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights

VOCABULARY = 131


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


def theirs(model: PreTrainedModel, prompts: list[list[int]], gen_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of transformers, one prompt at a time and without a cache."""
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


def relative_rmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
