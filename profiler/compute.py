"""Timing the products of a decoder layer and the work that memory bandwidth limits."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch

from profiler.effort import Effort
from profiler.timing import Place, Reading, Results, Task, Timer, time_tasks
from runtime import layers, tiers

HEAD_ROWS = (1, 8, 32)


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def compute_dtype(device: torch.device) -> torch.dtype:
    """What the runtime computes in: fp16 on a GPU, bf16 on a CPU."""
    return torch.float16 if device.type == "cuda" else torch.bfloat16


def random_weights(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A matrix of small random values (a block of them, repeated): zeros would flatter a GPU's power limit."""
    block = torch.empty(2**18, dtype=torch.float32).uniform_(-0.05, 0.05).to(dtype)
    buffer = tiers.device_buffer(rows * columns * dtype.itemsize, device)
    flat = tiers.view(buffer, dtype, rows * columns)
    done = min(block.numel(), flat.numel())
    flat[:done].copy_(block[:done])
    while done < flat.numel():
        step = min(done, flat.numel() - done)
        flat[done : done + step].copy_(flat[:step])
        done += step
    return flat.view(rows, columns)


def rows_up_to(most: int, *, between: bool) -> list[int]:
    """1, 2, 4, … up to ``most``, and ``between`` them 3, 6, 12, …, where a kernel's blocks are partly empty."""
    powers = [1 << exponent for exponent in range(most.bit_length())]
    return sorted(powers + [3 * power for power in powers if between and 3 * power <= most])


def call(function: Callable[..., object], *arguments: object, **named: object) -> Callable[[], None]:
    """A body that calls ``function`` and forgets its result."""

    def body() -> None:
        function(*arguments, **named)

    return body


def products(
    weights: Sequence[Sequence[layers.Linear]], narrow: torch.Tensor, wide: torch.Tensor
) -> Callable[[], None]:
    """A body that multiplies by the matrices of the next layer in turn; ``wide`` enters the last of them."""
    turns = itertools.cycle(weights)

    def body() -> None:
        for matrix, states in zip(next(turns), (narrow, narrow, wide), strict=True):
            layers.linear(states, matrix)

    return body


class Products:
    """Matrix products over the rows and widths of a decoder layer, in one dtype."""

    def __init__(
        self, device: torch.device, effort: Effort, dtype: torch.dtype, rows: list[int], weight: float
    ) -> None:
        self.device, self.effort, self.dtype, self.rows, self.weight = device, effort, dtype, rows, weight
        self.title = f"matrix products in {dtype_name(dtype)}"

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """FLOP/s over rows: one projection of attention and both of the MLP.

        Of as many layers in turn as no cache holds: a layer never finds its own weights there. Timed again and again
        with the same ones, products of few rows by the weights of OPT-125M took half as long.
        """
        hidden, ffn = self.effort.hidden_size, self.effort.ffn_size
        began = timer.now()
        shapes = [(hidden, hidden), (ffn, hidden), (hidden, ffn)]
        layer_bytes = sum(out * into for out, into in shapes) * self.dtype.itemsize
        weights = [
            [layers.Linear(weight=random_weights(*shape, self.dtype, self.device)) for shape in shapes]
            for _ in range(math.ceil(self.effort.working_set_bytes / layer_bytes))
        ]
        narrow = random_weights(max(self.rows), hidden, self.dtype, self.device)
        wide = random_weights(max(self.rows), ffn, self.dtype, self.device)
        tasks = (self._task(rows, weights, narrow[:rows], wide[:rows]) for rows in self.rows)
        left_s = max(0.0, budget_s - (timer.now() - began))
        return time_tasks(tasks, len(self.rows), timer=timer, budget_s=left_s, previous=previous)

    def _task(
        self, rows: int, weights: Sequence[Sequence[layers.Linear]], narrow: torch.Tensor, wide: torch.Tensor
    ) -> Task:
        hidden, ffn = self.effort.hidden_size, self.effort.ffn_size
        at: Place = {"device": self.device.type, "dtype": dtype_name(self.dtype), "hidden": hidden, "rows": rows}
        work = 2.0 * hidden * (hidden + 2 * ffn) * rows
        return Task(name="matmul", at=at, unit="FLOP/s", work=work, body=products(weights, narrow, wide))


class MemoryBound:
    """The LM head, elementwise work and a plain read: what memory bandwidth limits."""

    title = "memory-bound work"
    weight = 6.0

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device, self.effort = device, effort
        self.dtype = compute_dtype(device)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Bytes/s of elementwise work and of reading; FLOP/s of the LM head over rows."""
        began = timer.now()
        head = random_weights(self.effort.vocabulary, self.effort.hidden_size, self.dtype, self.device)
        count = len(HEAD_ROWS) + 2
        left_s = max(0.0, budget_s - (timer.now() - began))
        return time_tasks(self._tasks(head), count, timer=timer, budget_s=left_s, previous=previous)

    def _tasks(self, head: torch.Tensor) -> Iterator[Task]:
        at: Place = {"device": self.device.type, "dtype": dtype_name(self.dtype)}
        states = random_weights(max(HEAD_ROWS), head.shape[1], self.dtype, self.device)
        weights = layers.HeadWeights(matrix=layers.Linear(weight=head))
        for rows in HEAD_ROWS:
            yield Task(
                name="lm_head",
                at={**at, "hidden": head.shape[1], "rows": rows},
                unit="FLOP/s",
                work=2.0 * head.numel() * rows,
                body=call(layers.lm_head, states[:rows, None, :], weights),
            )
        nbytes = min(head.nbytes, self.effort.working_set_bytes)
        one = head.view(-1)[: nbytes // self.dtype.itemsize]
        other = random_weights(1, one.numel(), self.dtype, self.device).view(-1)

        def add() -> None:
            torch.add(one, other, out=other)

        # Two values read, one written.
        yield Task(name="elementwise", at={**at, "bytes": 3 * nbytes}, unit="bytes/s", work=3.0 * nbytes, body=add)
        words = other.view(torch.uint8)[: nbytes // 8 * 8].view(torch.int64)
        yield Task(
            name="read", at={**at, "bytes": words.nbytes}, unit="bytes/s", work=words.nbytes, body=call(words.sum)
        )
