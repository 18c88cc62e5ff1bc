"""A conversation with a model: its turns, the prompt they make, and what is left out when it grows too long."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from costmodel import records, words
from costmodel.errors import InputError
from runtime.chat_template import end_of_turn, has_chat_template, rendered

PLAIN_STOP = "\nUser:"
"""Where the answer of a base model ends: it would go on with the user's part."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What one side said; ``role`` is ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is given to the model; ``dropped`` turns were left out for it to fit, ``room`` new tokens fit."""

    tokens: tuple[int, ...]
    dropped: int
    room: int


@dataclass(kw_only=True)
class Conversation:
    """Turns of user and assistant, after an optional system message.

    With a chat template the prompt is what the model was trained on; without one (``plain``) it is a transcript
    that a base model continues.
    """

    tokenizer: Any
    max_positions: int | None
    system: str | None = None
    turns: list[Turn] = field(default_factory=list)
    first: int = 0  # turns before it no longer fit

    @property
    def plain(self) -> bool:
        """Whether the model is a base model, without a chat template."""
        return not has_chat_template(self.tokenizer)

    @property
    def end_of_turn(self) -> tuple[int, ...]:
        """Tokens that end an answer besides the model's own end of sequence."""
        return end_of_turn(self.tokenizer)

    def check_system(self) -> None:
        """Raise :class:`InputError` for a system message that the chat template refuses or leaves out."""
        if self.system is not None and not self.plain:
            rendered(self.tokenizer, [*self.messages(len(self.turns)), {"role": "user", "content": "?"}])

    def ask(self, text: str, *, max_new_tokens: int) -> Prompt:
        """Add what the user says; the prompt for the answer.

        The oldest turns are left out for good as soon as there is no room for ``max_new_tokens`` (or half the
        positions) beside them.
        A message that does not fit on its own is an :class:`InputError`, and not added.
        """
        self.turns.append(Turn(role="user", content=text))
        before = self.first
        # A limit on answers that is near the model's own must not leave all of the conversation out.
        wanted = max_new_tokens if self.max_positions is None else min(max_new_tokens, self.max_positions // 2)
        try:
            tokens = self._tokens()
            while self._too_long(tokens, wanted) and self.first + 2 < len(self.turns):
                self.first += 2
                tokens = self._tokens()
            if self._too_long(tokens, 1):
                raise InputError(
                    f"this message makes a prompt of {words.counted(len(tokens), 'token')}: the model has "
                    f"{self.max_positions:,} positions, and an answer needs some of them (say it in fewer words)"
                )
        except InputError:
            self.turns.pop()
            self.first = before
            raise
        free = max_new_tokens if self.max_positions is None else self.max_positions - len(tokens)
        return Prompt(tokens=tokens, dropped=self.first - before, room=min(free, max_new_tokens))

    def answer(self, text: str) -> None:
        """Add what the model said, also where it was stopped."""
        self.turns.append(Turn(role="assistant", content=text.strip()))

    def take_back(self) -> None:
        """Forget the last question, which got no answer."""
        self.turns.pop()

    def clear(self) -> None:
        """Begin anew, after the same system message."""
        self.turns.clear()
        self.first = 0

    def save(self, path: Path) -> None:
        """Write all turns: as messages where the name ends in ``.json``, else as text."""
        if path.suffix.lower() == ".json":
            records.write_text(json.dumps(self.messages(0), indent=2, ensure_ascii=True) + "\n", path)
            return
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in self.messages(0)]
        records.write_bytes("\n".join(lines).encode("utf-8", "replace"), path)

    def messages(self, first: int) -> list[dict[str, str]]:
        """The system message and the turns from ``first`` on."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, *({"role": turn.role, "content": turn.content} for turn in self.turns[first:])]

    def _too_long(self, tokens: tuple[int, ...], new_tokens: int) -> bool:
        return self.max_positions is not None and len(tokens) + new_tokens > self.max_positions

    def _tokens(self) -> tuple[int, ...]:
        try:
            text = self._transcript() if self.plain else rendered(self.tokenizer, self.messages(self.first))
            return tuple(self.tokenizer(text, add_special_tokens=self.plain, verbose=False)["input_ids"])
        except (TypeError, UnicodeError) as error:
            raise InputError(f"this message is no valid text: {error}") from None

    def _transcript(self) -> str:
        system = "" if self.system is None else f"{self.system}\n\n"
        lines = [f"{turn.role.capitalize()}: {turn.content}\n" for turn in self.turns[self.first :]]
        return f"{system}{''.join(lines)}Assistant:"
