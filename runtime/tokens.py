"""Texts and tokens: a checkpoint's tokenizer, its special tokens, and prompts as checked token ids."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from costmodel import records, words
from costmodel.errors import InputError

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


class Reader(Protocol):
    """What decides whether a model can take a prompt.

    ``max_positions`` is the most tokens of prompt and completion together, if there is such a limit.
    """

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_positions(self) -> int | None: ...


def token_ids(
    prompts: Sequence[str | Sequence[int]],
    gen_lens: Sequence[int],
    reader: Reader,
    *,
    named: Callable[[int], str] = "prompts[{}]".format,
) -> list[list[int]]:
    """Every prompt as token ids; :class:`InputError` names the first that cannot be run, and why.

    ``named`` is what a prompt is called, by its index.
    """
    found = []
    for number, (prompt, gen_len) in enumerate(zip(prompts, gen_lens, strict=True)):
        ids = _read(prompt, reader, named(number))
        _check(ids, gen_len, reader, named(number))
        found.append(ids)
    return found


def check_text(text: str, what: str) -> None:
    """Raise :class:`InputError` for what no tokenizer reads: halves of surrogate pairs.

    They stand for bytes that are not UTF-8 in flags and on standard input, and can be written in JSON.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what} is not UTF-8 text") from None


def check_ids(ids: Sequence[object], vocab_size: int, what: str) -> None:
    """Raise :class:`InputError` for what is no token id of a vocabulary of this size."""
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise InputError(f"{what} holds {token!r}: token ids are whole numbers")
        if not 0 <= token < vocab_size:
            raise InputError(f"{what} holds token {token}: ids lie in [0, {vocab_size - 1}]")


def _read(prompt: str | Sequence[int], reader: Reader, name: str) -> list[int]:
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    if reader.tokenizer is None:
        raise InputError(f"{name} is text, but model {reader.name!r} has no tokenizer: give token ids")
    check_text(prompt, name)
    return [int(token) for token in reader.tokenizer(prompt, verbose=False)["input_ids"]]


def _check(ids: list[int], gen_len: int, reader: Reader, name: str) -> None:
    if not ids:
        raise InputError(f"{name} is empty: a prompt has at least one token")
    check_ids(ids, reader.vocab_size, name)
    if reader.max_positions is not None and len(ids) + gen_len > reader.max_positions:
        raise InputError(
            f"{name} has {words.counted(len(ids), 'token')} and max_new_tokens is {gen_len:,}, together "
            f"{len(ids) + gen_len:,}: model {reader.name!r} has {reader.max_positions:,} positions"
        )
