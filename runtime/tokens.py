"""Texts and tokens: a checkpoint's tokenizer, its special tokens, and prompts as checked token ids."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from costmodel import records
from costmodel.errors import InputError
from costmodel.model import ModelSpec

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def tokenizer(folder: Path | None) -> Any | None:
    """transformers' tokenizer of a checkpoint; ``None`` where the folder holds none."""
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise InputError("texts need transformers: pip install 'tierwise[runtime]', or give token ids") from None
    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{folder}: the tokenizer cannot be read: {reason}") from None


def special_tokens(config: Mapping[str, Any], folder: Path | None) -> tuple[frozenset[int], int]:
    """Token ids that end a sequence (0 may be one), and the id to pad with, which no result depends on."""
    generation: Mapping[str, Any] = {}
    if folder is not None and (folder / "generation_config.json").is_file():
        found = records.read_json(folder / "generation_config.json")
        generation = found if isinstance(found, dict) else {}
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
    pad = config.get("pad_token_id")
    return frozenset(int(token) for token in ids), int(pad) if isinstance(pad, int) and pad >= 0 else 0


def token_ids(
    prompts: Sequence[str | Sequence[int]], tokenizer: Any | None, spec: ModelSpec, gen_lens: Sequence[int]
) -> list[list[int]]:
    """Every prompt as token ids; :class:`InputError` names the first that cannot be run, and why."""
    found = []
    for number, (prompt, gen_len) in enumerate(zip(prompts, gen_lens, strict=True)):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise InputError(f"prompts[{number}] is text, but model {spec.name!r} has no tokenizer: give token ids")
            ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
        else:
            ids = [int(token) for token in prompt]
        _check(number, ids, spec, gen_len)
        found.append(ids)
    return found


def _check(number: int, ids: list[int], spec: ModelSpec, gen_len: int) -> None:
    if not ids:
        raise InputError(f"prompts[{number}] is empty: a prompt has at least one token")
    wrong = next((token for token in ids if not 0 <= token < spec.vocab_size), None)
    if wrong is not None:
        raise InputError(f"prompts[{number}] holds token {wrong}: ids lie in [0, {spec.vocab_size - 1}]")
    if spec.max_positions is not None and len(ids) + gen_len > spec.max_positions:
        raise InputError(
            f"prompts[{number}] has {len(ids)} tokens, {len(ids) + gen_len} with max_new_tokens {gen_len}: "
            f"model {spec.name!r} has {spec.max_positions} positions"
        )
