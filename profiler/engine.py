"""Timing the engine itself: what it takes of a layer and batch in decode when there is next to nothing to compute.

A model of a few narrow layers is run as any other is. On a CPU a product over as many weights as a layer of the real
model has comes between two of them: where it fills the caches, code and small tensors are read from memory again, which
doubles the time.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from costmodel.policy import Policy, Split
from profiler.compute import compute_dtype, dtype_name, random_weights
from profiler.effort import Effort
from profiler.engine_run import ON_DISK, decode, one_batch, small_image
from profiler.layers import FUSED_BLOCK
from profiler.timing import Reading, Results, Timer
from runtime import layers, quantization
from runtime.image import Image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights

STAYS, CARRIED, COMPRESSED, PARTS, COMPRESSED_PARTS = "stays", "carried", "4-bit", "in parts", "4-bit in parts"
"""The caches that the engine is timed with."""

PLAIN_WEIGHTS, COMPRESSED_WEIGHTS = "16-bit", "4-bit"
"""The weights that a product between two layers takes."""

PROMPTS = 2
"""As few as can be parted between two tiers."""

HALVES = Split(gpu=0.5, cpu=0.0, disk=0.5)

NUM_LAYERS = 8
PROMPT_LEN = 8
MOST_STEPS = 32

WIDTH = 64
"""Of layers so narrow that their products take microseconds."""


class EngineLayers:
    """Seconds from one layer to the next: schedule, placement, launches, threads that start."""

    title = "the engine's own time"

    def __init__(self, device: torch.device, effort: Effort, directory: Path, weight: float) -> None:
        self.device, self.effort, self.directory, self.weight = device, effort, directory, weight
        self.dtype = compute_dtype(device)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Seconds of a layer and batch, by what becomes of its cache."""
        began = timer.now()
        at = (("device", self.device.type), ("dtype", dtype_name(self.dtype)))
        timed: dict[str, dict[str, dict[str, Any]]] = {
            PLAIN_WEIGHTS: {
                STAYS: {},
                CARRIED: {"cache": ON_DISK},
                COMPRESSED: {"compress_cache": True},
                PARTS: {"cache": HALVES},
                COMPRESSED_PARTS: {"cache": HALVES, "compress_cache": True},
            }
        }
        if self.device.type == "cpu":  # elsewhere nothing comes between two layers
            timed[COMPRESSED_WEIGHTS] = {STAYS: {}}
        readings, left = [], sum(map(len, timed.values()))
        widths = {"hidden_size": WIDTH, "num_heads": 1, "ffn_size": 4 * WIDTH}
        with small_image(self.directory, self.dtype, num_layers=NUM_LAYERS, **widths) as image:
            for weights, caches in timed.items():
                between = self._between(compressed=weights == COMPRESSED_WEIGHTS)
                between()  # a first product takes longer
                least_s = timer.once(between)
                for cache, changes in caches.items():
                    share_s = (budget_s - (timer.now() - began)) / left
                    left -= 1
                    # A pass of the layers takes about as long again as what comes between them.
                    steps = min(MOST_STEPS, max(3, int(share_s / (2 * NUM_LAYERS * max(least_s, 1e-4)))))
                    samples = timer.steadiness.steadily(
                        partial(self._decode, image, one_batch(PROMPTS, **changes), steps, between, timer)
                    )
                    place = (*at, ("cache", cache), ("weights", weights))
                    readings.append(Reading(name="engine_layer", at=place, unit="s", work=None, samples=samples))
                del between  # its weights go before the next ones come
        return readings

    def _between(self, *, compressed: bool) -> Callable[[], None]:
        """What comes between two layers: one as wide as the model's, of as many as no cache holds, in turn.

        By 4-bit weights a full block of the kernel's rows is multiplied: of more rows, launches are no matter. Nothing
        on a GPU, which leaves the caches of the launching CPU alone.
        """
        if self.device.type != "cpu":
            return lambda: None
        hidden, ffn = self.effort.hidden_size, self.effort.ffn_size
        rows = 4 * hidden + 2 * ffn  # of a layer, each as wide as the hidden states

        def weight() -> torch.Tensor | quantization.Quantized4bitLinear:
            plain = random_weights(rows, hidden, self.dtype, self.device)
            return quantization.quantize_linear(plain) if compressed else plain

        first = weight()
        others = [weight() for _ in range(math.ceil(self.effort.working_set_bytes / first.nbytes) - 1)]
        turns = itertools.cycle([layers.Linear(weight=one) for one in (first, *others)])
        states = random_weights(FUSED_BLOCK if compressed else 1, hidden, self.dtype, self.device)

        def product() -> None:
            layers.linear(states, next(turns))

        return product

    def _decode(
        self, image: Image, policy: Policy, steps: int, between: Callable[[], None], timer: Timer
    ) -> tuple[float, ...]:
        """Seconds of every layer of ``steps`` decode steps but the first of each, which the head comes before."""
        movers = _Watched(self.device, between=between, timer=timer)
        with movers:
            weights = Weights(image, policy.weights, movers)
            weights.fill()
            decode(weights, policy, movers, prompt_len=PROMPT_LEN, steps=steps, directory=self.directory)
        return tuple(movers.seconds[NUM_LAYERS - 1 :])  # prefill comes first


class _Watched(Movers):
    """Movers that do something ``between`` two layers, and note how long it is from there to the end of the next."""

    def __init__(self, device: torch.device, *, between: Callable[[], None], timer: Timer) -> None:
        super().__init__(device, timeline=Timeline())
        self._between, self._timer = between, timer
        self._began: float | None = None
        self.seconds: list[float] = []

    @contextmanager
    def computing(self, name: str) -> Iterator[None]:
        """A layer ends with what comes between it and the next: what it moves is begun right after products."""
        with super().computing(name):
            yield
        began, self._began = self._began, None
        if not name.startswith("layer"):
            return
        if began is not None:
            self.seconds.append(self._timer.now() - began)
        self._between()
        self._began = self._timer.now()
