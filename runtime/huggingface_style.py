"""``generate`` as transformers has it: a padded tensor of token ids in, the same tensor continued out."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from costmodel.errors import InputError
from runtime.sampling import SamplingParams

if TYPE_CHECKING:
    from runtime.llm import LLM


def generate(
    llm: "LLM",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 20,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int | None = None,
    pad_token_id: int | None = None,
    streamer: Any | None = None,
) -> Tensor:
    """``input_ids`` (prompts, tokens) continued by up to ``max_new_tokens``, as (prompts, tokens + new ones).

    ``attention_mask`` is 0 at padding, which must be on the left; without it every token is real. Ended
    sequences keep their end-of-sequence token and are filled with ``pad_token_id``. ``streamer`` gets
    ``put`` and ``end`` as transformers calls them: one prompt only. Sampling parameters count with
    ``do_sample`` only, as in transformers.
    """
    if input_ids.dim() != 2:
        raise InputError(f"input_ids has shape {tuple(input_ids.shape)}: it must be (prompts, tokens)")
    if streamer is not None and len(input_ids) != 1:
        raise InputError(f"streamer takes one prompt: input_ids has {len(input_ids)}")
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature if do_sample else 0.0,
        top_k=top_k if do_sample else 0,
        top_p=top_p if do_sample else 1.0,
        seed=seed,
    )
    prompts = _without_padding(input_ids, attention_mask)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    rows: list[list[int]] = [[] for _ in prompts]

    def on_token(prompt: int, token: int) -> None:
        rows[prompt].append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))

    llm.generate(prompts, params, on_token=on_token)
    if streamer is not None:
        streamer.end()
    pad = llm.pad_token_id if pad_token_id is None else pad_token_id
    longest = max(len(row) for row in rows)
    new = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], dtype=input_ids.dtype)
    return torch.cat((input_ids, new.to(input_ids.device)), dim=1)


def _without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    """The real tokens of every prompt."""
    if attention_mask is None:
        return input_ids.tolist()
    if attention_mask.shape != input_ids.shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: it must be that of input_ids, "
            f"{tuple(input_ids.shape)}"
        )
    mask = attention_mask.bool()
    if bool((mask[:, :-1] & ~mask[:, 1:]).any()):
        raise InputError("attention_mask has padding after real tokens: pad on the left (padding_side='left')")
    return [row[real].tolist() for row, real in zip(input_ids, mask, strict=True)]
