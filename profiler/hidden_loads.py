"""How much of loading weights shows when the engine hides it behind computation, or computation behind it.

A model of a few layers decodes in three ways: its weights stay in memory, are only loaded, or are loaded while it
computes. It has as many prompts as make the first two take about as long.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from costmodel.model import ModelSpec
from costmodel.policy import Split
from profiler.compute import compute_dtype, dtype_name
from profiler.effort import Effort, MiB
from profiler.engine_run import HERE, IN_HOST_MEMORY, ON_DISK, decode, one_batch, small_image, small_opt
from profiler.offload import FREE_SHARE, free_bytes
from profiler.timing import Reading, Results, Timer
from runtime.image import Image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights

COMPUTE, LOAD, BOTH = "compute", "load", "both"
"""What a step of decode does."""

NUM_LAYERS = 4
MOST_STEPS = 4
MOST_PROMPTS: Mapping[str, int] = {"cpu": 512, "cuda": 8192}
MOST_BYTES = 512 * MiB
LEAST_WIDTH = 256

IMAGE_SHARE = 1 / 8
"""The share of the time in which the image can be read once: it is written, and then read in most of the steps."""


class HiddenLoads:
    """Seconds of a step of decode that computes, that loads, and that does both."""

    title = "loads hidden behind computation"

    def __init__(
        self,
        device: torch.device,
        effort: Effort,
        directory: Path,
        disk_settings: Callable[[], Mapping[str, int]],
        weight: float,
    ) -> None:
        self.device, self.effort, self.directory, self.weight = device, effort, directory, weight
        self._disk_settings, self.dtype = disk_settings, compute_dtype(device)
        self._shape: tuple[int, int, int] | None = None

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Steps of each kind for weights on disk, and on CUDA for weights in host memory, in turns."""
        began = timer.now()
        sources = {"disk": ON_DISK} | ({"cpu": IN_HOST_MEMORY} if self.device.type == "cuda" else {})
        if self._shape is None:  # one for all rounds
            read_bytes_per_s = max(figure.median for figure in previous.select("disk_read"))
            widths = self._widths(IMAGE_SHARE * budget_s * read_bytes_per_s)
            self._shape = (*widths, self._prompts(previous, read_bytes_per_s))
        hidden, ffn, prompts = self._shape
        heads = max(1, hidden // self.effort.head_dim)
        readings = []
        with small_image(
            self.directory, self.dtype, hidden_size=hidden, num_heads=heads, ffn_size=ffn, num_layers=NUM_LAYERS
        ) as image:
            for number, (source, split) in enumerate(sources.items()):
                share_s = (budget_s - (timer.now() - began)) / (len(sources) - number)
                at = (("device", self.device.type), ("weights", source), ("hidden", hidden), ("prompts", prompts))
                for what, samples in self._steps(image, split, prompts, share_s, timer).items():
                    place = (*at, ("does", what))
                    readings.append(Reading(name="decode_step", at=place, unit="s", work=None, samples=tuple(samples)))
        return readings

    def _widths(self, most_bytes: float) -> tuple[int, int]:
        """The effort's hidden and MLP sizes, halved until there is time and room on the disk for their image."""
        room = min(MOST_BYTES, most_bytes, FREE_SHARE * free_bytes(self.directory))
        hidden, ffn = self.effort.hidden_size, self.effort.ffn_size

        def too_large() -> bool:
            config = small_opt(hidden_size=hidden, num_heads=1, ffn_size=ffn, num_layers=NUM_LAYERS)
            model = ModelSpec.from_config(config, name="profile")
            return NUM_LAYERS * model.layer_weight_bytes(compressed=False) > room

        while hidden > LEAST_WIDTH and too_large():
            hidden, ffn = hidden // 2, ffn // 2
        return hidden, ffn

    def _prompts(self, previous: Results, read_bytes_per_s: float) -> int:
        """As many rows as are multiplied while the weights are read, 2 FLOP a row for every weight's bytes."""
        most = MOST_PROMPTS[self.device.type]
        curve = previous.select("matmul", device=self.device.type, dtype=dtype_name(self.dtype))
        imbalance = {
            rows: abs(math.log(2 * rows * read_bytes_per_s / (self.dtype.itemsize * figure.median)))
            for figure in curve
            if (rows := figure.number("rows")) <= most
        }
        return min(imbalance, key=lambda rows: imbalance[rows])

    def _steps(self, image: Image, split: Split, prompts: int, budget_s: float, timer: Timer) -> dict[str, list[float]]:
        """Seconds of a step of each kind, taken in turns until the time is used up, once at least."""
        end = timer.now() + budget_s
        samples: dict[str, list[float]] = {COMPUTE: [], LOAD: [], BOTH: []}
        with (
            Movers(self.device, timeline=Timeline(), overlap=True, **self._disk_settings()) as movers,
            Movers(self.device, timeline=Timeline()) as idle,
        ):
            loaded, resident = Weights(image, split, movers), Weights(image, HERE, idle)
            loaded.fill()
            resident.fill()
            once_s = timer.once(lambda: _load(loaded, NUM_LAYERS))
            # Of the three kinds the last takes up to twice as long, and each is begun by a step that does not count.
            steps = min(MOST_STEPS, max(2, int((end - timer.now()) / (6 * max(once_s, 1e-4)))))
            while True:
                began = timer.now()
                for kind, step_s in (
                    (LOAD, partial(self._load_s, loaded, steps, timer)),
                    (BOTH, partial(self._decode_s, loaded, movers, prompts, steps)),
                    (COMPUTE, partial(self._decode_s, resident, idle, prompts, steps)),
                ):
                    samples[kind].append(timer.steadiness.steadily(step_s))
                if 2 * timer.now() - began > end:
                    return samples

    def _load_s(self, weights: Weights, steps: int, timer: Timer) -> float:
        """Seconds in which all layers are loaded once."""
        return timer.once(lambda: _load(weights, steps * NUM_LAYERS)) / steps

    def _decode_s(self, weights: Weights, movers: Movers, prompts: int, steps: int) -> float:
        """Seconds of a step of decode."""
        policy = one_batch(prompts, weights=weights.split)
        times = decode(weights, policy, movers, prompt_len=1, steps=steps, directory=self.directory)
        return times.decode_s / steps


def _load(weights: Weights, count: int) -> None:
    """Load so many layers as the schedule does: one is begun before the one ahead of it is waited for."""
    layers = weights.num_loads - 1
    for turn in range(count + 1):
        if turn < count:
            weights.start(turn % layers, turn)
        if turn > 0:
            weights.finish(turn - 1)
