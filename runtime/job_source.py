"""The input of a batch job: a file of requests, read line by line, and again when the job is resumed."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from costmodel.errors import InputError
from costmodel.workload import Workload

_TYPICAL_SHARE = 0.9
_BYTES_PER_TOKEN = 4  # of English, in the vocabularies of today; a plan needs no more


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the input; ``number`` counts from 0, ``digest`` is that of its bytes."""

    number: int
    digest: str
    content: bytes = field(repr=False)

    @classmethod
    def of(cls, number: int, content: bytes) -> "Line":
        """The line with its digest; blanks around it do not count."""
        text = content.removeprefix(b"\xef\xbb\xbf").strip()
        return cls(number=number, digest=hashlib.blake2b(text, digest_size=16).hexdigest(), content=text)

    @property
    def answer_id(self) -> str:
        """The ``id`` of the record that answers this very line."""
        return f"batch_req_{self.number:08d}_{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Source:
    """The file, and what reading it once tells: its identity, and the work that is typical of it."""

    path: Path
    nbytes: int
    sha256: str
    requests: int
    workload: Workload
    """What to plan for: nine of ten requests are no longer, by a rough count of their tokens."""

    @classmethod
    def of(cls, path: Path, *, default_new_tokens: int) -> "Source":
        """Read the file; one that cannot be read, or holds nothing, is an :class:`InputError`."""
        if path.exists() and not path.is_file():
            raise InputError(f"{path}: cannot be read: requests come from a plain file, which is read more than once")
        whole, nbytes = hashlib.sha256(), 0
        prompt_tokens: list[int] = []
        new_tokens: list[int] = []
        for content in _contents(path):
            whole.update(content)
            nbytes += len(content)
            if content.strip():
                prompt, new = _outline(content)
                prompt_tokens.append(prompt)
                new_tokens.append(default_new_tokens if new is None else new)
        if not prompt_tokens:
            raise InputError(f"{path} holds no requests: one JSON object per line is expected")
        count = len(prompt_tokens)
        workload = Workload(prompt_len=_typical(prompt_tokens), gen_len=_typical(new_tokens), num_prompts=count)
        return cls(path=path, nbytes=nbytes, sha256=whole.hexdigest(), requests=count, workload=workload)

    def lines(self) -> Iterator[Line]:
        """Every line that is not blank, with its number in the file."""
        for number, content in enumerate(_contents(self.path)):
            if content.strip():
                yield Line.of(number, content)

    def identity(self) -> dict[str, Any]:
        """What must not change between a job and its resumption."""
        return {"bytes": self.nbytes, "sha256": self.sha256, "requests": self.requests}


def _contents(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _outline(content: bytes) -> tuple[int, int | None]:
    """About how many tokens the prompt of a line has, and how many new ones it asks for; a bad line has one."""
    try:
        body = json.loads(content)["body"]
        prompt = body["prompt"] if "prompt" in body else [str(turn["content"]) for turn in body["messages"]]
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return 1, None
    return max(1, _tokens(prompt)), asked if type(asked) is int and asked > 0 else None


def _tokens(prompt: object) -> int:
    if isinstance(prompt, str):
        return len(prompt.encode("utf-8", "replace")) // _BYTES_PER_TOKEN
    return sum(1 if isinstance(part, int) else _tokens(part) for part in prompt) if isinstance(prompt, list) else 0


def _typical(counts: list[int]) -> int:
    return sorted(counts)[int(_TYPICAL_SHARE * (len(counts) - 1))]
