"""``generate`` as transformers has it: a padded tensor of token ids in, the same tensor continued out."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from costmodel.errors import InputError
from runtime import tokens
from runtime.generation import Callbacks, Generation, Texts
from runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from runtime.llm import LLM

_TEMPERATURE, _TOP_K, _TOP_P = 1.0, 50, 1.0
_DTYPES = (torch.int64, torch.int32)


def generate(
    llm: "LLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    streamer: Any | None = None,
) -> Tensor:
    """``input_ids`` (prompts, tokens) continued by up to ``max_new_tokens``, as (prompts, tokens + new ones).

    ``attention_mask`` is 0 at padding, which must be on the left; without it every token is real. A sequence ends
    at ``eos_token_id`` (one or several; by default the model's), keeps it, and is filled with ``pad_token_id``
    to the length of the longest. ``streamer`` gets ``put`` and ``end`` as transformers calls them: one prompt only.
    With ``do_sample`` temperature is 1, ``top_k`` 50 and ``top_p`` 1 unless given, as in transformers; given without
    it they (and ``seed``) are an :class:`InputError`, as is a token id that the model does not have.
    """
    params = _params(max_new_tokens, do_sample=do_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    prompts = _prompts(input_ids, attention_mask, llm.vocab_size)
    if streamer is not None and len(prompts) != 1:
        raise InputError(f"streamer takes one prompt: input_ids has {len(prompts)}")
    texts = _texts(llm, eos_token_id, pad_token_id)
    rows: list[list[int]] = [[] for _ in prompts]

    def on_token(prompt: int, token: int) -> None:
        rows[prompt].append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))

    job = Generation.of(prompts, params, None, reader=llm, texts=texts, tell=Callbacks(on_token=on_token))
    if streamer is not None:
        streamer.put(input_ids.cpu())
    llm.complete(job)
    if streamer is not None:
        streamer.end()
    longest = max(len(row) for row in rows)
    new = torch.tensor([row + [texts.pad_token_id] * (longest - len(row)) for row in rows], dtype=input_ids.dtype)
    return torch.cat((input_ids, new.to(input_ids.device)), dim=1)


def _params(
    max_new_tokens: int,
    *,
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> SamplingParams:
    """The parameters of every prompt; what is given and cannot take effect is an error."""
    if not do_sample:
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    f"{name} is {value!r}, which cannot take effect without do_sample=True: give both, or neither"
                )
        return SamplingParams(max_new_tokens=max_new_tokens)
    if temperature == 0:
        raise InputError("temperature is 0, so do_sample=True cannot take effect: leave out both, or give more than 0")
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=_TEMPERATURE if temperature is None else temperature,
        top_k=_TOP_K if top_k is None else top_k,
        top_p=_TOP_P if top_p is None else top_p,
        seed=seed,
    )


def _texts(llm: "LLM", eos_token_id: int | Sequence[int] | None, pad_token_id: int | None) -> Texts:
    """What ends a sequence and fills its row: what is given, else the model's own."""
    texts = llm.texts
    if eos_token_id is not None:
        ends = eos_token_id if isinstance(eos_token_id, Sequence) else (eos_token_id,)
        tokens.check_ids(ends, llm.vocab_size, "eos_token_id")
        texts = replace(texts, eos_token_ids=frozenset(ends))
    if pad_token_id is not None:
        tokens.check_ids((pad_token_id,), llm.vocab_size, "pad_token_id")
        texts = replace(texts, pad_token_id=pad_token_id)
    return texts


def _prompts(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> list[list[int]]:
    """The real tokens of every prompt, all of them the model's."""
    shape = tuple(input_ids.shape)
    if input_ids.dtype not in _DTYPES:
        raise InputError(f"input_ids is of {input_ids.dtype}: token ids are of torch.int64 or torch.int32")
    if len(shape) == 1:
        raise InputError(f"input_ids has shape {shape}: it must be (prompts, tokens), so one prompt is input_ids[None]")
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"input_ids has shape {shape}: it must be (prompts, tokens), with at least one of each")
    if attention_mask is None:
        prompts: list[list[int]] = input_ids.tolist()
    else:
        prompts = _without_padding(input_ids, attention_mask)
    for number, prompt in enumerate(prompts):
        tokens.check_ids(prompt, vocab_size, f"input_ids[{number}]")
    return prompts


def _without_padding(input_ids: Tensor, attention_mask: Tensor) -> list[list[int]]:
    """The tokens of every prompt that the mask says are real: at least one."""
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("attention_mask has padding after real tokens: pad on the left (padding_side='left')")
    if not bool(mask[:, -1].all()):
        empty = mask[:, -1].tolist().index(False)
        raise InputError(f"attention_mask[{empty}] is 0 everywhere: a prompt has at least one real token")
    return [row[real].tolist() for row, real in zip(input_ids, mask, strict=True)]
