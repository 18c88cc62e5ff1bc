"""Generation: the prompts of one call, what each is to become, and what has become of it block by block."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from costmodel import words
from costmodel.errors import InputError
from costmodel.policy import Policy
from costmodel.workload import Workload
from runtime import blocks, tokens
from runtime.engine import Prompt
from runtime.execute import BlockRun, BlockTimes
from runtime.loaded import Loaded, Resident
from runtime.sampling import Sampler, SamplingParams
from runtime.sequences import Completion, Sequences


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a model's vocabulary means: the ids that end a sequence and that fill a row, and the tokenizer if any."""

    eos_token_ids: frozenset[int]
    pad_token_id: int
    tokenizer: Any | None


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """Who is told how it goes: the arguments of :meth:`runtime.llm.LLM.generate` of these names."""

    on_block: Callable[[Sequence[int], Sequence[Completion]], None] | None = None
    on_text: Callable[[int, str], None] | None = None
    on_token: Callable[[int, int], None] | None = None
    on_progress: Callable[[int, int], None] | None = None


@dataclass(kw_only=True)
class Generation:
    """The prompts (token ids) of one call, with the parameters and the random number's key of each.

    Every block ends after ``most_steps`` new tokens a prompt, with room for all that the parameters ask for: to try a
    job in the memory and the shapes that it will have.
    """

    prompts: list[list[int]]
    params: list[SamplingParams]
    keys: list[int]
    texts: Texts
    tell: Callbacks
    most_steps: int = sys.maxsize
    completions: dict[int, Completion] = field(default_factory=dict, init=False)
    _tokens: int = field(default=0, init=False)

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        keys: Sequence[int] | None,
        *,
        reader: tokens.Reader,
        texts: Texts,
        tell: Callbacks,
        most_steps: int = sys.maxsize,
    ) -> "Generation":
        """The arguments of a call, checked; :class:`InputError` names the first that cannot be run, and why."""
        if isinstance(prompts, str):
            raise InputError("prompts is one text: a list of prompts is expected")
        count = len(prompts)
        each = [params] * count if isinstance(params, SamplingParams) else list(params)
        if len(each) != count:
            entries = words.counted(len(each), "entry", "entries")
            raise InputError(f"params has {entries} for {words.counted(count, 'prompt')}: give one, or one for each")
        if keys is not None and len(keys) != count:
            entries = words.counted(len(keys), "entry", "entries")
            raise InputError(f"keys has {entries} for {words.counted(count, 'prompt')}")
        return cls(
            prompts=tokens.token_ids(prompts, [one.max_new_tokens for one in each], reader),
            params=each,
            keys=list(range(count)) if keys is None else list(keys),
            texts=texts,
            tell=tell,
            most_steps=most_steps,
        )

    @property
    def workload(self) -> Workload:
        """The longest prompt and the longest generation, for all prompts; there must be one."""
        return self._workload(range(len(self.prompts)))

    def _workload(self, indices: Sequence[int]) -> Workload:
        return Workload(
            prompt_len=max(len(self.prompts[i]) for i in indices),
            gen_len=max(self.params[i].max_new_tokens for i in indices),
            num_prompts=len(indices),
        )

    @property
    def results(self) -> list[Completion]:
        """The completions in the order of the prompts, when all blocks have been run."""
        return [self.completions[index] for index in range(len(self.prompts))]

    @cached_property
    def most_tokens(self) -> int:
        """New tokens of all prompts if none ends by itself."""
        return sum(min(one.max_new_tokens, self.most_steps) for one in self.params)

    @property
    def num_generated(self) -> int:
        """New tokens of all completions so far."""
        return sum(len(done.token_ids) for done in self.completions.values())

    def shared_out(self, block_size: int, fitted: Callable[[Workload], Policy]) -> Iterator[blocks.Block]:
        """Share out the prompts; where some are longer than planned, their blocks hold fewer: what ``fitted`` says."""
        left = blocks.in_order([len(prompt) for prompt in self.prompts], [one.max_new_tokens for one in self.params])
        while left:
            shape = fitted(self._workload(left[:block_size]))
            yield blocks.block_of(left[: shape.block_size], shape.gpu_batch_size)
            left = left[shape.block_size :]

    def run(self, block: blocks.Block, loaded: Loaded, policy: Policy, directory: Path) -> tuple[BlockTimes, Resident]:
        """Complete the prompts of one block; its seconds, and the bytes that lay on every tier meanwhile."""
        pad = self.texts.pad_token_id
        batches = [blocks.padded([self.prompts[i] for i in batch], pad_token_id=pad) for batch in block.batches]
        groups = [self._sequences(batch) for batch in block.batches]
        samplers = [Sampler([self.params[i] for i in batch], [self.keys[i] for i in batch]) for batch in block.batches]

        def choose(batch: int, logits: Tensor, step: int) -> Tensor:
            chosen = samplers[batch].choose(logits, step)
            self._add(block.batches[batch], groups[batch], chosen.tolist())
            return chosen

        with BlockRun(
            batches,
            gen_len=max(self.params[i].max_new_tokens for i in block.indices),
            weights=loaded.weights,
            policy=policy,
            movers=loaded.movers,
            directory=directory,
        ) as run:
            resident = loaded.resident(run)
            times = run.run(choose, ended=lambda steps: steps >= self.most_steps or all(one.finished for one in groups))
        for batch, group in zip(block.batches, groups, strict=True):
            self.completions.update(zip(batch, group.completions(), strict=True))
        if self.tell.on_block is not None:
            self.tell.on_block(block.indices, [self.completions[index] for index in block.indices])
        return times, resident

    def _sequences(self, batch: Sequence[int]) -> Sequences:
        """The state of the prompts of one batch."""
        return Sequences(
            [self.prompts[i] for i in batch],
            [self.params[i] for i in batch],
            eos_token_ids=self.texts.eos_token_ids,
            tokenizer=self.texts.tokenizer,
            stream=self.tell.on_text is not None,
        )

    def _add(self, batch: Sequence[int], group: Sequences, new: Sequence[int]) -> None:
        """One more token of every prompt of a batch."""
        if self.tell.on_token is not None:
            for index, token, done in zip(batch, new, group.done, strict=True):
                if not done:
                    self.tell.on_token(index, token)
        pieces = group.add(new)
        self._tokens = min(self.most_tokens, self._tokens + len(batch))
        if self.tell.on_text is not None:
            for index, piece in zip(batch, pieces, strict=True):
                if piece:
                    self.tell.on_text(index, piece)
        if self.tell.on_progress is not None:
            self.tell.on_progress(self._tokens, self.most_tokens)
