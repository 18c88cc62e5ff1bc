"""The sequences of one block while they are generated: their new tokens, their text and when each ends."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from costmodel.errors import InputError
from runtime.detokenizer import Detokenizer, StopStrings
from runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What one prompt was continued with.

    ``token_ids`` are the new tokens without a final end-of-sequence token. ``text`` is cut before a stop string
    (its tokens are still there), and ``None`` where the model has no tokenizer.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int


class Sequences:
    """Collects one new token per sequence and step.

    ``stream`` decodes as the tokens come. Without it, sequences without stop strings are decoded when they end:
    their pieces are empty but for the last one.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        *,
        eos_token_ids: frozenset[int],
        tokenizer: Any | None,
        stream: bool = True,
    ) -> None:
        if len(prompts) != len(params):
            raise ValueError(f"{len(prompts)} prompts for {len(params)} params: one of each per sequence is expected")
        self._rows = [
            _Sequence(prompt, one, eos_token_ids, tokenizer, stream)
            for prompt, one in zip(prompts, params, strict=True)
        ]
        self._running = len(self._rows)

    def add(self, tokens: Sequence[int]) -> list[str | None]:
        """Append one new token per sequence (ended ones ignore theirs); the text that became final in each."""
        if len(tokens) != len(self._rows):
            raise ValueError(f"{len(tokens)} tokens for {len(self._rows)} sequences")
        pieces = []
        for row, token in zip(self._rows, tokens, strict=True):
            was_done = row.done
            pieces.append(row.add(token))
            self._running -= row.done and not was_done
        return pieces

    @property
    def finished(self) -> bool:
        """True when every sequence has ended."""
        return self._running == 0

    @property
    def done(self) -> list[bool]:
        """Which sequences have ended."""
        return [row.done for row in self._rows]

    def completions(self) -> list[Completion]:
        """What there is of every sequence; one that has not ended yet ends here, cut by its length."""
        self._running = 0
        return [row.completion() for row in self._rows]


class _Sequence:
    """One of them."""

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        eos_token_ids: frozenset[int],
        tokenizer: Any | None,
        stream: bool,
    ) -> None:
        if params.stop and tokenizer is None:
            raise InputError(f"stop is {list(params.stop)}: stop strings need a tokenizer, which this model lacks")
        self._params = params
        self._end_token_ids = frozenset[int]() if params.ignore_eos else eos_token_ids.union(params.stop_token_ids)
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._stops = StopStrings(params.stop)
        self._decode_now = stream or bool(params.stop)
        self._prompt_tokens = len(prompt)
        self._tokens: list[int] = []
        self._decoded = 0  # tokens given to the detokenizer
        self._text: list[str] = []
        self._reason: FinishReason = "length"
        self.done = False

    def add(self, token: int) -> str | None:
        if self.done:
            return None if self._detokenizer is None else ""
        if token in self._end_token_ids:
            self.done, self._reason = True, "stop"
        else:
            self._tokens.append(token)
            self.done = len(self._tokens) >= self._params.max_new_tokens
        return self._decode()

    def _decode(self) -> str | None:
        """The text that the tokens since the last call make final."""
        if self._detokenizer is None:
            return None
        if not (self._decode_now or self.done):
            return ""
        piece, stopped = self._stops.add(self._detokenizer.add(self._tokens[self._decoded :]))
        self._decoded = len(self._tokens)
        if self.done and not stopped:
            rest, stopped = self._stops.add(self._detokenizer.finish())
            piece += rest if stopped else rest + self._stops.finish()
        if stopped:
            self.done, self._reason = True, "stop"
        if piece:
            self._text.append(piece)
        return piece

    def completion(self) -> Completion:
        if not self.done:
            self.done = True
            self._decode()
        return Completion(
            token_ids=tuple(self._tokens),
            text=None if self._detokenizer is None else "".join(self._text),
            finish_reason=self._reason,
            prompt_tokens=self._prompt_tokens,
        )
