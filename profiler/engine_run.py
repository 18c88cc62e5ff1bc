"""Small models run by the engine as any other, so that what is timed is the engine and not a copy of it."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from costmodel.policy import Policy, Split
from runtime.execute import Batch, BlockRun, BlockTimes
from runtime.image import Image, open_image
from runtime.movers import Movers
from runtime.weights import Weights

HERE, IN_HOST_MEMORY, ON_DISK = (Split(gpu=float(i == 0), cpu=float(i == 1), disk=float(i == 2)) for i in range(3))


def small_opt(*, hidden_size: int, num_heads: int, ffn_size: int, num_layers: int) -> dict[str, Any]:
    """The config of an OPT with next to no vocabulary."""
    return {
        "model_type": "opt",
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "ffn_dim": ffn_size,
        "vocab_size": 64,
        "max_position_embeddings": 64,
        "do_layer_norm_before": True,
        "activation_function": "relu",
    }


@contextmanager
def small_image(
    directory: Path, dtype: torch.dtype, *, hidden_size: int, num_heads: int, ffn_size: int, num_layers: int
) -> Iterator[Image]:
    """The image of :func:`small_opt` with random weights; its files are gone in the end."""
    config = small_opt(hidden_size=hidden_size, num_heads=num_heads, ffn_size=ffn_size, num_layers=num_layers)
    with tempfile.TemporaryDirectory(prefix=".tierwise-profile-", dir=directory) as name:
        path = Path(name) / "config.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        yield open_image(f"dummy:{path}", directory=Path(name), dtype=dtype, compressed=False)


def one_batch(prompts: int, **changes: Any) -> Policy:
    """A policy of one batch with everything on the first tier, but for the ``changes``."""
    placed = {"weights": HERE, "cache": HERE, "activations": HERE} | changes
    return Policy(gpu_batch_size=prompts, num_gpu_batches=1, **placed)


def decode(
    weights: Weights, policy: Policy, movers: Movers, *, prompt_len: int, steps: int, directory: Path
) -> BlockTimes:
    """Run a block of the policy's prompts: prefill, then ``steps`` steps of decode."""
    ids = torch.zeros((policy.gpu_batch_size, prompt_len), dtype=torch.long)
    with BlockRun(
        [Batch(token_ids=ids)], gen_len=1 + steps, weights=weights, policy=policy, movers=movers, directory=directory
    ) as run:
        return run.run(lambda batch, logits, step: torch.zeros(len(logits), dtype=torch.long, device=logits.device))
