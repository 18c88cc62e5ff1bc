"""Timing the engine itself: what it takes of a layer and batch in decode when there is next to nothing to compute.

A model of a few narrow layers is run as any other is. On a CPU a product over more weights than its caches hold comes
between two layers, as it does in a model worth offloading: code and small tensors are then read from memory again,
which doubles the time.
"""

import json
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from costmodel.policy import Policy, Split
from profiler.compute import compute_dtype, dtype_name, random_weights
from profiler.effort import Effort
from profiler.timing import Reading, Results, Timer
from runtime import layers
from runtime.execute import Batch, BlockRun
from runtime.image import Image, open_image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights

STAYS, CARRIED, COMPRESSED = "stays", "carried", "4-bit"
"""The caches that the engine is timed with."""

NUM_LAYERS = 8
PROMPT_LEN = 8
MOST_STEPS = 32

CONFIG = {
    "model_type": "opt",
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 1,
    "ffn_dim": 256,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "do_layer_norm_before": True,
    "activation_function": "relu",
}
"""Layers so narrow that their products take microseconds."""

_HERE, _ON_DISK = Split(gpu=1.0, cpu=0.0, disk=0.0), Split(gpu=0.0, cpu=0.0, disk=1.0)


class EngineLayers:
    """Seconds from one layer to the next: schedule, placement, launches, threads that start."""

    title = "the engine's own time"

    def __init__(self, device: torch.device, effort: Effort, directory: Path, weight: float) -> None:
        self.device, self.effort, self.directory, self.weight = device, effort, directory, weight
        self.dtype = compute_dtype(device)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Seconds of a layer and batch, by what becomes of its cache."""
        began = timer.now()
        between = self._between()
        at = (("device", self.device.type), ("dtype", dtype_name(self.dtype)))
        policies = {STAYS: _policy(), CARRIED: _policy(cache=_ON_DISK), COMPRESSED: _policy(compress_cache=True)}
        readings = []
        with tempfile.TemporaryDirectory(prefix=".tierwise-profile-", dir=self.directory) as name:
            config = Path(name) / "narrow.json"
            config.write_text(json.dumps(CONFIG), encoding="utf-8")
            image = open_image(f"dummy:{config}", directory=Path(name), dtype=self.dtype, compressed=False)
            between()  # a first product takes longer
            least_s = timer.once(between)
            for number, (cache, policy) in enumerate(policies.items()):
                share_s = (budget_s - (timer.now() - began)) / (len(policies) - number)
                # A pass of the layers takes about as long again as what comes between them.
                steps = min(MOST_STEPS, max(3, int(share_s / (2 * NUM_LAYERS * max(least_s, 1e-4)))))
                samples = self._decode(image, policy, steps, between, timer)
                readings.append(
                    Reading(name="engine_layer", at=(*at, ("cache", cache)), unit="s", work=None, samples=samples)
                )
        return readings

    def _between(self) -> Callable[[], None]:
        """What comes between two layers; nothing on a GPU, which leaves the caches of the launching CPU alone."""
        if self.device.type != "cpu":
            return lambda: None
        hidden = self.effort.hidden_size
        rows = max(1, self.effort.working_set_bytes // (2 * hidden * self.dtype.itemsize))
        others = layers.Linear(weight=random_weights(rows, hidden, self.dtype, self.device))
        states = random_weights(1, hidden, self.dtype, self.device)

        def product() -> None:
            layers.linear(states, others)

        return product

    def _decode(
        self, image: Image, policy: Policy, steps: int, between: Callable[[], None], timer: Timer
    ) -> tuple[float, ...]:
        """Seconds of every layer of ``steps`` decode steps but the last of each, which the head follows."""
        ids = torch.zeros((1, PROMPT_LEN), dtype=torch.long)
        movers = _Watched(self.device, between=between, timer=timer)
        with movers:
            weights = Weights(image, policy.weights, movers)
            weights.fill()
            with BlockRun(
                [Batch(token_ids=ids)],
                gen_len=1 + steps,
                weights=weights,
                policy=policy,
                movers=movers,
                directory=self.directory,
            ) as run:
                run.run(lambda batch, logits, step: torch.zeros(len(logits), dtype=torch.long, device=logits.device))
        return tuple(movers.seconds[NUM_LAYERS - 1 :])  # prefill comes first


class _Watched(Movers):
    """Movers that do something ``between`` two layers and note how long the layer before took."""

    def __init__(self, device: torch.device, *, between: Callable[[], None], timer: Timer) -> None:
        super().__init__(device, timeline=Timeline())
        self._between, self._timer = between, timer
        self._began: float | None = None
        self.seconds: list[float] = []

    def computing(self, name: str) -> AbstractContextManager[None]:
        is_layer = name.startswith("layer")
        now = self._timer.now()
        if is_layer and self._began is not None:
            self.seconds.append(now - self._began)
        if is_layer:
            self._between()
        self._began = self._timer.now() if is_layer else None
        return super().computing(name)


def _policy(**changes: Any) -> Policy:
    placed = {"weights": _HERE, "cache": _HERE, "activations": _HERE} | changes
    return Policy(gpu_batch_size=1, num_gpu_batches=1, **placed)
