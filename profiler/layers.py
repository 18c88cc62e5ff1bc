"""Timing attention, 4-bit values and a whole decoder layer with the functions that the runtime executes."""

from collections.abc import Callable, Iterator

import torch

from profiler.compute import call, compute_dtype, dtype_name, products, random_weights
from profiler.effort import Effort
from profiler.timing import Place, Reading, Results, Task, Timer, time_tasks
from runtime import attention, cache_attention, layers, quantization
from runtime.cache_format import CacheFormat
from runtime.quantization import INT4_KERNEL_ROWS

FUSED_BLOCK = 4
"""Rows that the kernel for few of them takes at a time on a CPU: beyond the first four, 5 to 8 cost what 8 do."""

COMPRESSED_ROWS = (1, 2, 4, 16, INT4_KERNEL_ROWS, INT4_KERNEL_ROWS + 1, 128, 256, 1024)
"""Rows of the products with 4-bit weights: full blocks of that kernel and less than one, the most that it is given, and
through dequantised weights."""


CARRIED_TOKENS = 32
"""Tokens of a carried cache that come one by one, of twice as many in all."""


def heads_of(
    batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """(batch, heads, tokens, head_dim) of random values."""
    return random_weights(batch * heads * tokens, head_dim, dtype, device).view(batch, heads, tokens, head_dim)


class PrefillAttention:
    """Attention among a prompt's tokens."""

    def __init__(self, device: torch.device, effort: Effort, weight: float) -> None:
        self.device, self.effort, self.weight = device, effort, weight
        self.dtype = compute_dtype(device)
        self.title = f"prefill attention on the {_processor(device)}"

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """FLOP/s of the whole score matrix, over tokens."""
        return time_tasks(self._tasks(), len(self.effort.prompts), timer=timer, budget_s=budget_s, previous=previous)

    def _tasks(self) -> Iterator[Task]:
        heads, head_dim = self.effort.num_heads, self.effort.head_dim
        for tokens in self.effort.prompts:
            q, k, v = (heads_of(1, heads, tokens, head_dim, self.dtype, self.device) for _ in range(3))
            yield Task(
                name="prefill_attention",
                at={"device": self.device.type, "dtype": dtype_name(self.dtype), "heads": heads, "tokens": tokens},
                unit="FLOP/s",
                work=4.0 * heads * head_dim * tokens**2,
                body=call(attention.prefill, q, k, v, scale=head_dim**-0.5),
            )


class DecodeAttention:
    """Attention of one new token over a cache that no processor's cache holds."""

    def __init__(
        self, device: torch.device, effort: Effort, weight: float, *, dtype: torch.dtype | None = None
    ) -> None:
        self.device, self.effort, self.weight = device, effort, weight
        self.dtype = compute_dtype(device) if dtype is None else dtype
        self.title = f"decode attention on the {_processor(device)}"

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Bytes/s of K and V over context, and seconds of a call over next to nothing."""
        count = len(self.effort.contexts)
        readings = time_tasks(self._tasks(), count, timer=timer, budget_s=budget_s * 0.95, previous=previous)
        head_dim = self.effort.head_dim
        q, k, v = (heads_of(1, self.effort.num_heads, 1, head_dim, self.dtype, self.device) for _ in range(3))
        samples = timer.samples(call(attention.decode, q, k, v, scale=head_dim**-0.5), budget_s=budget_s * 0.05)
        at = (("device", self.device.type), ("dtype", dtype_name(self.dtype)))
        return [*readings, Reading(name="attention_call", at=at, unit="s", work=None, samples=samples)]

    def _tasks(self) -> Iterator[Task]:
        heads, head_dim, dtype = self.effort.num_heads, self.effort.head_dim, self.dtype
        for context in self.effort.contexts:
            batch = max(1, self.effort.working_set_bytes // (2 * heads * context * head_dim * dtype.itemsize))
            q = heads_of(batch, heads, 1, head_dim, dtype, self.device)
            k, v = (heads_of(batch, heads, context, head_dim, dtype, self.device) for _ in range(2))
            at: Place = {"device": self.device.type, "dtype": dtype_name(dtype), "heads": heads, "context": context}
            yield Task(
                name="decode_attention",
                at={**at, "batch": batch},
                unit="bytes/s",
                work=k.nbytes + v.nbytes,
                body=call(attention.decode, q, k, v, scale=head_dim**-0.5),
            )


def _processor(device: torch.device) -> str:
    return "GPU" if device.type == "cuda" else "CPU"


class Quantization:
    """To 4 bits and back, and products with 4-bit weights."""

    title = "4-bit values"

    def __init__(
        self, device: torch.device, effort: Effort, weight: float, *, dtype: torch.dtype | None = None
    ) -> None:
        self.device, self.effort, self.weight = device, effort, weight
        self.dtype = compute_dtype(device) if dtype is None else dtype

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Values/s of a cache each way; FLOP/s of products that take 4-bit weights."""
        return time_tasks(self._tasks(), 3 + len(COMPRESSED_ROWS), timer=timer, budget_s=budget_s, previous=previous)

    def _tasks(self) -> Iterator[Task]:
        heads, head_dim, hidden = self.effort.num_heads, self.effort.head_dim, self.effort.hidden_size
        at: Place = {"device": self.device.type, "dtype": dtype_name(self.dtype)}
        tokens = max(1, self.effort.working_set_bytes // (32 * heads * head_dim * self.dtype.itemsize))
        plain = heads_of(1, heads, tokens, head_dim, self.dtype, self.device)
        group_size = quantization.cache_group_size(head_dim)
        packed = quantization.quantize(plain, group_size=group_size)
        values: Place = {**at, "values": plain.numel()}
        yield Task(
            name="dequantize",
            at=values,
            unit="values/s",
            work=plain.numel(),
            body=call(quantization.dequantize, packed, dtype=self.dtype, out=plain),
        )
        yield Task(
            name="quantize",
            at=values,
            unit="values/s",
            work=plain.numel(),
            body=call(quantization.quantize_into, plain, packed),
        )
        del plain, packed
        yield self._attention(at)
        ffn = self.effort.ffn_size
        weights = [
            layers.Linear(weight=quantization.quantize_linear(random_weights(*shape, self.dtype, self.device)))
            for shape in ((hidden, hidden), (ffn, hidden), (hidden, ffn))
        ]
        narrow, wide = (random_weights(max(COMPRESSED_ROWS), size, self.dtype, self.device) for size in (hidden, ffn))
        for rows in COMPRESSED_ROWS:
            yield Task(
                name="linear_4bit",
                at={**at, "hidden": hidden, "rows": rows},
                unit="FLOP/s",
                work=2.0 * hidden * (hidden + 2 * ffn) * rows,
                body=products([weights], narrow[:rows], wide[:rows]),
            )

    def _attention(self, at: Place) -> Task:
        """Attention of one new token over a 4-bit cache, which is expanded on the way."""
        heads, head_dim = self.effort.num_heads, self.effort.head_dim
        context = self.effort.contexts[len(self.effort.contexts) // 2]
        rows = heads * max(1, self.effort.working_set_bytes // (8 * heads * context * head_dim))
        cache = CacheFormat(head_dim=head_dim, dtype=self.dtype, compressed=True)
        memory = torch.zeros(2 * rows * context * cache.vector_bytes, dtype=torch.uint8, device=self.device)
        room = cache.values(memory, 2, rows, context)
        q, key, value = (heads_of(rows, 1, 1, head_dim, self.dtype, self.device) for _ in range(3))
        options = {"tokens": context, "scale": head_dim**-0.5, "mask": None, "bias": None}

        def body() -> None:
            newest = cache.kept(key[:, 0, 0], value[:, 0, 0])
            cache_attention.append_and_attend(room, q, newest, **options)

        return Task(
            name="compressed_attention",
            at={**at, "heads": heads, "context": context},
            unit="values/s",
            work=2.0 * rows * context * head_dim,
            body=body,
        )


class CarriedAttention:
    """Attention of one new token over a cache that was loaded: a prompt in one piece, then token by token."""

    title = "carried attention"

    def __init__(self, device: torch.device, effort: Effort, weight: float) -> None:
        self.device, self.effort, self.weight = device, effort, weight
        self.dtype = compute_dtype(device)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Bytes/s of K and V with many and with one of the tokens by themselves."""
        return time_tasks(self._tasks(), 2, timer=timer, budget_s=budget_s, previous=previous)

    def _tasks(self) -> Iterator[Task]:
        head_dim, vector_bytes = self.effort.head_dim, self.effort.head_dim * self.dtype.itemsize
        rows = max(1, self.effort.working_set_bytes // (4 * CARRIED_TOKENS * vector_bytes))
        q = heads_of(rows, 1, 1, head_dim, self.dtype, self.device)
        options = {"most_tokens": 2 * CARRIED_TOKENS, "scale": head_dim**-0.5, "mask": None, "bias": None}
        for singles in (1, CARRIED_TOKENS):
            prompt = random_weights(2 * rows * (2 * CARRIED_TOKENS - singles), head_dim, self.dtype, self.device)
            single = random_weights(2 * rows * singles, head_dim, self.dtype, self.device)
            pieces = [(prompt.view(2, rows, -1, head_dim), 0, 1), (single.view(singles, 2, rows, head_dim), 1, 2)]
            yield Task(
                name="carried_attention",
                at={"device": self.device.type, "dtype": dtype_name(self.dtype), "rows": rows, "singles": singles},
                unit="bytes/s",
                work=4.0 * CARRIED_TOKENS * rows * vector_bytes,
                body=call(cache_attention.attend_pieces, pieces, q, **options),
            )


class WholeLayer:
    """A decoder layer of OPT's kind in decode, which the parts above should add up to."""

    title = "a decoder layer"

    def __init__(self, device: torch.device, effort: Effort, weight: float) -> None:
        self.device, self.effort, self.weight = device, effort, weight
        self.dtype = compute_dtype(device)

    def run(self, timer: Timer, budget_s: float, previous: Results) -> list[Reading]:
        """Seconds of a layer at full width."""
        began = timer.now()
        hidden, heads, context = self.effort.hidden_size, self.effort.num_heads, self.effort.contexts[0]
        wide = _decode_body(
            hidden, heads, self.effort.head_dim, batch=8, context=context, dtype=self.dtype, device=self.device
        )
        at = (("device", self.device.type), ("dtype", dtype_name(self.dtype)))
        place = (*at, ("hidden", hidden), ("batch", 8), ("context", context))
        samples = timer.samples(wide, budget_s=max(0.0, budget_s - (timer.now() - began)))
        return [Reading(name="layer_decode", at=place, unit="s", work=None, samples=samples)]


def _decode_body(
    hidden: int, heads: int, head_dim: int, *, batch: int, context: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], None]:
    """One layer over one new token of each prompt, its context full."""

    def matrix(out: int, into: int) -> layers.Linear:
        return layers.Linear(
            weight=random_weights(out, into, dtype, device), bias=torch.zeros(out, dtype=dtype, device=device)
        )

    def norms() -> layers.Norms:
        ones = torch.ones(hidden, dtype=dtype, device=device)
        return layers.Norms(before=layers.Norm(kind="layer", weight=ones, bias=torch.zeros_like(ones)))

    width = heads * head_dim
    query, key, value = (matrix(width, hidden) for _ in range(3))
    weights = layers.LayerWeights(
        query=query,
        key=key,
        value=value,
        out=matrix(hidden, width),
        up=matrix(4 * hidden, hidden),
        down=matrix(hidden, 4 * hidden),
        attention_norms=norms(),
        mlp_norms=norms(),
    )
    shape = layers.LayerShape(num_heads=heads, num_kv_heads=heads, head_dim=head_dim)
    cache = CacheFormat(head_dim=head_dim, dtype=dtype, compressed=False)
    room = torch.zeros((2, batch * heads, context, head_dim), dtype=dtype, device=device)
    states = random_weights(batch, hidden, dtype, device).view(batch, 1, hidden)

    def body() -> None:
        query, key, value = (
            part.reshape(batch * heads, head_dim) for part in layers.project_qkv(states, weights, shape)
        )
        options = {"scale": shape.attention_scale, "mask": None, "bias": None}
        attended = cache_attention.append_and_attend(
            room, query[:, None, None], cache.kept(key, value), tokens=context, **options
        )
        layers.finish_layer(states, attended.view(batch, heads, 1, head_dim), weights, shape)

    return body
