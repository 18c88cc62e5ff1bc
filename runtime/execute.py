"""The executor: plays the block schedule of :mod:`costmodel.schedule` over placed weights, cache and hidden states.

There is one loop. With overlap, the moves of a slot are begun before its computation and waited for where
something needs them; without, each step is waited for at once. Nothing else differs.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from costmodel.policy import Policy
from costmodel.schedule import Place, Step, block_schedule
from runtime import attention, layers
from runtime.block_positions import BlockPositions
from runtime.cache_format import CacheFormat
from runtime.cache_shape import CacheShape
from runtime.hidden_states import HiddenStates
from runtime.kv_cache import KvCache
from runtime.layers import LayerWeights
from runtime.memory_release import trim_heap
from runtime.movers import Movers
from runtime.weights import Weights

PREFILL_ROWS = {"cpu": 1024, "cuda": 8192}
"""Tokens of whole prompts that a layer computes at a time in prefill: enough for the full rate of its products,
few enough that its working memory is small beside what it works for."""

TRIM_EVERY = 4
"""Batches through a layer of prefill after which freed memory is given back: taking its pages again costs up to 5 % of
one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Prompts of one GPU batch, padded on the left: ``token_ids`` (prompts, tokens), ``mask`` True for real tokens.

    ``mask`` None: all prompts are equally long.
    """

    token_ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BlockTimes:
    """Seconds of one block; ``steps`` counts the new tokens of each sequence, the first one included."""

    prefill_s: float
    decode_s: float
    steps: int


Choose = Callable[[int, Tensor, int], Tensor]
"""(batch, logits (prompts, vocabulary), step from 0) → the next token of every prompt, (prompts,) on any device."""


class BlockRun:
    """One block of prompts, from their tokens to the last new one.

    Allocates the block's cache and buffers when made; use as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        gen_len: int,
        weights: Weights,
        policy: Policy,
        movers: Movers,
        directory: Path,
    ) -> None:
        self._batches, self._gen_len = list(batches), gen_len
        self._weights, self._movers, self._policy = weights, movers, policy
        self._architecture = weights.architecture
        self._num_layers = weights.num_loads - 1
        spec, dtype = self._architecture.spec, weights.image.layout.dtype
        self._dtype = dtype
        lengths = tuple(batch.token_ids.shape[1] for batch in batches)
        sizes = tuple(batch.token_ids.shape[0] for batch in batches)
        self.cache = KvCache(
            CacheShape(
                num_layers=spec.num_layers,
                num_kv_heads=spec.num_kv_heads,
                format=CacheFormat(head_dim=spec.head_dim, dtype=dtype, compressed=policy.compress_cache),
                batch_sizes=sizes,
                prompt_lens=lengths,
                new_tokens=gen_len,
            ),
            policy.cache,
            cpu_attention=policy.cpu_attention,
            movers=movers,
            directory=directory,
        )
        self.hidden = HiddenStates(
            hidden_size=spec.hidden_size,
            dtype=dtype,
            batches=list(zip(sizes, lengths, strict=True)),
            split=policy.activations,
            movers=movers,
            directory=directory,
        )
        self._embedding = weights.embedding()
        self._table, self._positions = weights.table("table"), weights.table("positions")
        self._positions_of = BlockPositions(
            list(zip(sizes, lengths, strict=True)),
            [batch.mask for batch in batches],
            new_tokens=gen_len,
            architecture=self._architecture,
            dtype=dtype,
            device=movers.device,
        )

    def run(self, choose: Choose, *, ended: Callable[[int], bool] | None = None) -> BlockTimes:
        """Generate until ``gen_len`` tokens, or until ``ended`` says after so many steps that no prompt needs more."""
        timeline = self._movers.timeline
        timeline.enter("prefill")
        began = time.perf_counter()
        prefilled, steps = began, 0
        for number, batch in enumerate(self._batches):
            self._embed_prompt(number, batch)
        schedule = block_schedule(
            num_layers=self._num_layers + 1, num_gpu_batches=len(self._batches), gen_len=self._gen_len
        )
        last = len(self._batches) - 1
        for slot in schedule:
            alone = all(step.kind != "compute" for step in slot)
            for step in sorted(slot, key=_move_order):
                if step.kind != "compute":
                    self._move(step)
                    self._movers.settle(awaited=alone and step.kind in ("load_activations", "load_cache"))
            for step in slot:
                if step.kind != "compute":
                    continue
                place = step.place
                self._compute(place, choose)
                if place.layer == self._num_layers and place.batch == last:
                    steps = place.token + 1
                    if place.token == 0:
                        prefilled = self._now()
                        timeline.enter("decode")
                    if ended is not None and ended(steps):
                        return self._times(began, prefilled, steps)
        return self._times(began, prefilled, steps)

    def close(self) -> None:
        """Wait for what is under way, which may still touch the block's buffers, and give the block's files back."""
        with ExitStack() as ending:  # all of it, last first, whatever fails
            for file in (self.cache.file, self.hidden.file):
                if file is not None:
                    ending.callback(self._movers.discard, file)
            for part in (self.hidden, self.cache, self._weights):
                ending.callback(part.drain)

    def __enter__(self) -> "BlockRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ----------------------------------------------------------------- steps

    def _move(self, step: Step) -> None:
        place = step.place
        match step.kind:
            case "load_weights":
                self._weights.start(place.layer, self._weight_turn(place), part=step.part, parts=step.parts)
            case "load_activations":
                self.hidden.load(place.batch, self._turn(place))
            case "store_activations":
                self.hidden.store(place.batch)
            case "load_cache" if place.layer < self._num_layers:
                self.cache.load((place.layer, place.batch), self._turn(place), place.token - 1)
            case "store_cache" if place.layer < self._num_layers:
                self.cache.store((place.layer, place.batch), self._turn(place), place.token)

    def _compute(self, place: Place, choose: Choose) -> None:
        turn, weight_turn = self._turn(place), self._weight_turn(place)
        self._weights.finish(weight_turn)
        self.hidden.finish(turn)
        if place.layer == self._num_layers:
            with self._movers.computing(f"head {place.batch}"):
                self._head(place, choose)
            self._movers.report()
            return
        self.cache.finish(turn)
        with self._movers.computing(f"layer {place.layer}.{place.batch}"):
            self._layer(place, turn)

    def _layer(self, place: Place, turn: int) -> None:
        weights = self._weights.layer(place.layer, self._weight_turn(place))
        shape = self._architecture.layer_shape
        hidden = self.hidden.take(place.batch, turn)
        if place.token == 0:
            self.hidden.put(place.batch, self._prefill(hidden, weights, place, turn))
            return
        newest = self._positions_of.newest(place.batch, place.layer, place.token)
        q, k, v = layers.project_qkv(hidden, weights, shape, newest.rotation)
        attended = self.cache.attend(
            (place.layer, place.batch),
            turn,
            q,
            k,
            v,
            scale=shape.attention_scale,
            new_tokens=place.token,
            mask=newest.mask,
            bias=newest.bias,
        )
        self.hidden.put(place.batch, layers.finish_layer(hidden, attended, weights, shape))

    def _prefill(self, hidden: Tensor, weights: LayerWeights, place: Place, turn: int) -> Tensor:
        """A layer over the prompts of a batch, a few at a time, in the memory of its input.

        Of the last layer only the prompts' last tokens go on to the head, those of the batch at once.
        """
        shape, window = self._architecture.layer_shape, self._architecture.window(place.layer)
        prompts, tokens, _ = hidden.shape
        is_last = place.layer == self._num_layers - 1
        at_once, ends = max(1, PREFILL_ROWS[hidden.device.type] // tokens), list[Tensor]()
        for first in range(0, prompts, at_once):
            some = hidden[first : first + at_once]
            rotation, mask = self._positions_of.prompts(place.batch, first, first + at_once)
            q, k, v = layers.project_qkv(some, weights, shape, rotation)
            k, v = k.contiguous(), v.contiguous()  # as both the cache and attention want them: copied once
            self.cache.write_prompts((place.layer, place.batch), turn, k, v, first_prompt=first)
            slopes, scale = self._positions_of.slopes, shape.attention_scale
            attended = attention.prefill(q, k, v, scale=scale, key_padding_mask=mask, slopes=slopes, window=window)
            del q, k, v
            if is_last:
                ends.append(attended[:, :, -1:].clone(memory_format=torch.contiguous_format))  # a view keeps all of it
            else:
                some.copy_(layers.finish_layer(some, attended, weights, shape))
            del attended
        passes = place.layer * len(self._batches) + place.batch
        if hidden.device.type == "cpu" and (is_last or passes % TRIM_EVERY == 0):
            trim_heap()  # else what is freed in pieces adds up from layer to layer, and stays through decode
        return layers.finish_layer(hidden[:, -1:].contiguous(), torch.cat(ends), weights, shape) if is_last else hidden

    def _head(self, place: Place, choose: Choose) -> None:
        turn = self._weight_turn(place)
        hidden = self.hidden.take(place.batch, self._turn(place))
        logits = layers.lm_head(hidden, self._weights.head(turn))
        tokens = choose(place.batch, logits, place.token)
        if place.token + 1 < self._gen_len:
            positions = self._positions_of.of_newest(place.batch, place.token + 1)
            streamed = self._weights.streamed_table(turn)
            assert self._table is not None
            rows = self._table.gather(tokens.to(positions.device).unsqueeze(1), streamed=streamed)
            self.hidden.put(place.batch, self._embed(rows, positions))

    # ------------------------------------------------------------- embedding

    def _embed_prompt(self, number: int, batch: Batch) -> None:
        ids = batch.token_ids.to(self._movers.device)
        assert self._table is not None
        rows = self._table.gather(ids)  # all at once: what is on disk of the table is read once a batch
        positions = self._positions_of.of_prompts(number)
        prompts, tokens = ids.shape
        hidden = torch.empty(
            (prompts, tokens, self._architecture.spec.hidden_size), dtype=self._dtype, device=ids.device
        )
        at_once = max(1, PREFILL_ROWS[ids.device.type] // tokens)
        with self._movers.computing(f"embed {number}"):
            for first in range(0, prompts, at_once):
                some = slice(first, first + at_once)
                hidden[some] = self._embed(rows[some], positions[some])
            self.hidden.put(number, hidden)
        self.hidden.store(number)
        self._movers.settle(awaited=False)

    def _embed(self, rows: Tensor, positions: Tensor) -> Tensor:
        """Hidden states (prompts, tokens, hidden) of rows of the token table at positions (prompts, tokens)."""
        position_rows = None
        if self._positions is not None:
            few, where = torch.unique(positions, return_inverse=True)
            position_rows = self._positions.gather((few + self._architecture.position_offset).clamp_(min=0))[where]
        return layers.embed(rows, self._embedding, position_rows=position_rows)

    # ----------------------------------------------------------------- turns

    def _turn(self, place: Place) -> int:
        """The number of a computation in the order of the schedule."""
        return self._weight_turn(place) * len(self._batches) + place.batch

    def _weight_turn(self, place: Place) -> int:
        return place.token * (self._num_layers + 1) + place.layer

    def _now(self) -> float:
        self._movers.mark().synchronize()
        now = time.perf_counter()
        self._movers.report()  # what a CUDA device did last belongs to the phase that ends
        return now

    def _times(self, began: float, prefilled: float, steps: int) -> BlockTimes:
        return BlockTimes(prefill_s=prefilled - began, decode_s=self._now() - prefilled, steps=steps)


def _move_order(step: Step) -> int:
    """Which of a slot's moves is begun first: stores, whose buffers the loads fill; last what is not needed next."""
    return 0 if step.kind.startswith("store") else 2 if step.kind == "load_weights" else 1
