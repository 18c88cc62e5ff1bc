"""Prompts from flags and files."""

import json
from pathlib import Path
from typing import Any

from costmodel.errors import InputError

Prompt = str | tuple[int, ...]

_FIELDS = ("prompt", "text")


def read_file(path: str) -> list[Prompt]:
    """The prompts of a text file, one a line, or of JSON lines (``.jsonl``).

    A JSON line is a text, a list of token numbers, or an object with one of them in ``prompt`` (or ``text``).
    Empty lines are left out.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise InputError(f"{path}: cannot be read: it is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    numbered = [(number, line.strip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise InputError(f"{path} holds no prompts: one a line is expected")
    if Path(path).suffix.lower() not in (".jsonl", ".ndjson"):
        return [line for _, line in numbered]
    return [_of_json(line, where=f"{path}, line {number}") for number, line in numbered]


def _of_json(line: str, *, where: str) -> Prompt:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON: {error}") from None
    if isinstance(data, dict):
        data = next((data[name] for name in _FIELDS if name in data), None)
    prompt = as_prompt(data)
    if prompt is None:
        raise InputError(f'{where}: a text or {{"prompt": text}} is expected')
    return prompt


def as_prompt(data: Any) -> Prompt | None:
    """A text or a list of token numbers; ``None`` for anything else."""
    if isinstance(data, str):
        return data
    if isinstance(data, list) and data and all(type(token) is int for token in data):
        return tuple(data)
    return None


def read_ids(text: str) -> tuple[int, ...]:
    """``"1,2,3"`` as token numbers."""
    try:
        tokens = tuple(int(part) for part in text.replace(",", " ").split())
    except ValueError:
        tokens = ()
    if not tokens or min(tokens) < 0:
        raise InputError(f"--prompt-ids is {text[:40]!r}: token numbers are expected, such as 1,2,3")
    return tokens
