"""A small engine that needs no model, and tokenizers made on the spot: what the commands are tested with."""

import time
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from costmodel.policy import Policy, Split
from costmodel.workload import Workload
from runtime.sampling import Sampler, SamplingParams
from runtime.sequences import Completion, Sequences
from tests.checkpoints import randomised

LINES = ["the quick brown fox jumps over the lazy dog", "Ωmega naïve café – ein Haus", "stop here, stop there. END"]
EOS = 0
GREEDY = SamplingParams()

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

IN_MEMORY = Split(gpu=1.0, cpu=0.0, disk=0.0)
POLICY = Policy(weights=IN_MEMORY, cache=IN_MEMORY, activations=IN_MEMORY, gpu_batch_size=2, num_gpu_batches=2)


@cache
def byte_level(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as OPT and GPT-2 have it: any bytes are tokens; 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES * 4, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    made.chat_template = CHAT_TEMPLATE if chat else None
    return made


class FakeEngine:
    """Logits are a hash of the sequence so far; blocks, sampling, text and callbacks are as in the real one."""

    def __init__(
        self,
        *,
        tokenizer: Any | None = None,
        name: str = "fake",
        policy: Policy = POLICY,
        max_positions: int | None = 128,
        step_s: float = 0.0,
    ) -> None:
        self.name, self.tokenizer, self.policy, self.max_positions = name, tokenizer, policy, max_positions
        self.vocab_size = 320
        self.step_s = step_s
        self.calls: list[list[tuple[int, ...]]] = []
        self.params: list[SamplingParams] = []
        self.workloads: list[Workload] = []
        self.measurement = None
        self.closed = False

    def prepare(self, workload: Workload) -> None:
        self.workloads.append(workload)

    def describe(self) -> dict[str, Any]:
        return {"model": self.name, "policy": self.policy.to_dict()}

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] = GREEDY,
        *,
        keys: Sequence[int] | None = None,
        on_block: Callable[[Sequence[int], Sequence[Completion]], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        tokens = [self._tokens(prompt) for prompt in prompts]
        each = [params] * len(tokens) if isinstance(params, SamplingParams) else list(params)
        keys = range(len(tokens)) if keys is None else keys
        self.calls.append(tokens)
        self.params += each
        order = sorted(range(len(tokens)), key=lambda index: -len(tokens[index]))
        at_most = sum(one.max_new_tokens for one in each)
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.policy.block_size):
            block = order[start : start + self.policy.block_size]
            sequences = Sequences(
                [tokens[index] for index in block],
                [each[index] for index in block],
                eos_token_ids=frozenset({EOS}),
                tokenizer=self.tokenizer,
            )
            sampler = Sampler([each[index] for index in block], [keys[index] for index in block])
            so_far = [list(tokens[index]) for index in block]
            made = sum(len(one.token_ids) for one in done.values())
            step = 0
            while not sequences.finished:
                time.sleep(self.step_s)
                chosen = sampler.choose(torch.stack([_logits(row, self.vocab_size) for row in so_far]), step).tolist()
                for index, row, token, piece in zip(block, so_far, chosen, sequences.add(chosen), strict=True):
                    row.append(token)
                    if on_text is not None and piece:
                        on_text(index, piece)
                step += 1
                if on_progress is not None:
                    on_progress(made + step * len(block), at_most)
            done |= dict(zip(block, sequences.completions(), strict=True))
            if on_block is not None:
                on_block(block, [done[index] for index in block])
        return [done[index] for index in range(len(tokens))]

    def _tokens(self, prompt: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(prompt, str):
            assert self.tokenizer is not None
            return tuple(self.tokenizer(prompt)["input_ids"])
        return tuple(prompt)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> "FakeEngine":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _logits(sequence: Sequence[int], vocabulary: int) -> torch.Tensor:
    """Likely tokens are words and ASCII; the sequence ends now and then."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(tuple(sequence)).encode()))
    logits = torch.randn(vocabulary, generator=generator) * 2
    logits[0] += 1.0
    return logits


def save_model(folder: Path) -> None:
    """A tiny checkpoint with a tokenizer, whose greedy texts vary and sometimes end by themselves."""
    torch.manual_seed(3)
    config = OPTConfig(
        vocab_size=320,
        hidden_size=64,
        num_attention_heads=4,
        ffn_dim=96,
        num_hidden_layers=2,
        word_embed_proj_dim=64,
        max_position_embeddings=96,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=1,
    )
    made = randomised(OPTForCausalLM(config), std=0.3, norms_around=0.0)
    made.save_pretrained(folder)
    byte_level().save_pretrained(folder)
