"""Tokens to text as they come, at bounded cost a token: no character half, no stop string begun.

``tokenizer.decode`` is a function of all tokens: the bytes of one character may come from several of them, and a
leading space may depend on what stands before. So a short window of past tokens is decoded with the new ones, and what
it adds to the past ones' text is new. A text that ends in the replacement character may be a character of which some
bytes are missing; it waits.
"""

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

_CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first new ones are decoded after."""

_SETTLE_TOKENS = 8
"""Tokens that wait for the rest of a character before the oldest of them are taken to be no text; one has 4 bytes."""

_MOST_WAITING = 32


class Detokenizer:
    """The text of one sequence of tokens that follow ``prompt``."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []
        self._context: list[int] = []
        self._context_text = ""
        self._follow(prompt)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that is final now; what may still change waits."""
        self._waiting.extend(tokens)
        text = self._new_text()
        if not text.endswith(_REPLACEMENT):
            self._advance(len(self._waiting))
            return text
        settled = self._settled()
        if not settled:
            return ""
        text = self._decode(self._context + self._waiting[:settled])[len(self._context_text) :]
        self._advance(settled)
        return text

    def finish(self) -> str:
        """The rest of the text: bytes that are no whole character become replacement characters."""
        text = self._new_text()
        self._advance(len(self._waiting))
        return text

    def _new_text(self) -> str:
        return self._decode(self._context + self._waiting)[len(self._context_text) :] if self._waiting else ""

    def _settled(self) -> int:
        """How many of the waiting tokens no later one can change: cutting there does not change the text.

        Without this, bytes that never make a character would be decoded again with every token.
        """
        count = len(self._waiting)
        if count < _SETTLE_TOKENS:
            return 0
        whole = self._new_text()
        for cut in range(count - _SETTLE_TOKENS // 2, 0, -1):
            before = self._decode(self._context + self._waiting[:cut])[len(self._context_text) :]
            if before + self._decode(self._waiting[cut:]) == whole:
                return cut
        return count if count >= _MOST_WAITING else 0

    def _advance(self, count: int) -> None:
        """Let the first ``count`` waiting tokens be the context of the next ones."""
        if not count:
            return
        past, self._waiting = self._waiting[:count], self._waiting[count:]
        self._follow(past)

    def _follow(self, past: Sequence[int]) -> None:
        """Take the end of ``past`` as context: as much of it as is whole characters."""
        self._context = list(past[-_CONTEXT_TOKENS:])
        self._context_text = self._decode(self._context)
        while _REPLACEMENT in self._context_text:
            self._context = self._context[1:]
            self._context_text = self._decode(self._context)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """Finds the first of some strings in a text that comes in pieces, and holds back what may become one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def add(self, piece: str) -> tuple[str, bool]:
        """The text before a stop string, as far as it is certain, and whether one has come."""
        text = self._held + piece
        found = [at for at in (text.find(string) for string in self._strings) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, string) for string in self._strings), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back: no more text will come."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, string: str) -> int:
    """The length of the longest end of ``text`` that ``string`` begins with, and is longer than."""
    for length in range(min(len(text), len(string) - 1), 0, -1):
        if text.endswith(string[:length]):
            return length
    return 0
