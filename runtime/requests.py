"""The batch format of the OpenAI API: one line of input to a request, one answer to a line of output.

What cannot be answered becomes a :class:`Refusal`, which is an answer too: one bad line ends no job.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from costmodel import words
from costmodel.errors import InputError
from runtime.chat_template import end_of_turn, has_chat_template, rendered
from runtime.job_source import Line
from runtime.sampling import SamplingParams
from runtime.sequences import Completion
from runtime.tokens import check_text

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Values of fields that ask for nothing beyond what is done anyway; any other value is refused, so that no field of a
# request is ignored that would change its answer.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "stream": (None, False),
    "stream_options": (None,),
    "echo": (None, False),
    "suffix": (None, ""),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}
_ABOUT_THE_CALLER = {"model", "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_SAMPLING = {"temperature", "top_p", "top_k", "seed", "stop", "ignore_eos", "max_tokens"}
_OWN = {COMPLETIONS: {"prompt"}, CHAT: {"messages", "max_completion_tokens"}}
_ROLES = ("system", "developer", "user", "assistant")


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a line gets no completion."""

    line: Line
    custom_id: str | None
    code: str
    message: str

    def record(self) -> dict[str, Any]:
        """The line of output."""
        error = {"code": self.code, "message": self.message}
        return {"id": self.line.answer_id, "custom_id": self.custom_id, "response": None, "error": error}


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that can be generated."""

    line: Line
    custom_id: str
    url: str
    prompt: tuple[int, ...]
    params: SamplingParams
    key: int

    def record(self, done: Completion, *, model: str, created: int) -> dict[str, Any]:
        """The line of output."""
        chat = self.url == CHAT
        answer = {"message": {"role": "assistant", "content": done.text}} if chat else {"text": done.text}
        tokens = {"token_ids": list(done.token_ids)} if done.text is None else {}
        choice = {"index": 0, **answer, **tokens, "finish_reason": done.finish_reason, "logprobs": None}
        usage = {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": len(done.token_ids),
            "total_tokens": done.prompt_tokens + len(done.token_ids),
        }
        body = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.line.digest}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [choice],
            "usage": usage,
        }
        response = {"status_code": 200, "request_id": f"req_{self.line.digest}", "body": body}
        return {"id": self.line.answer_id, "custom_id": self.custom_id, "response": response, "error": None}


class _RequestError(Exception):
    """Ends the reading of one line."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Turns lines into requests for one model.

    ``defaults`` apply where a request says nothing; a request with its own seed answers the same wherever it
    stands in the input, the others share the seed of ``defaults`` and differ by their number.
    """

    tokenizer: Any | None
    max_positions: int | None
    vocab_size: int
    defaults: SamplingParams
    seen: dict[bytes, int] = field(default_factory=dict)
    """The number of the line that has an id first, by the id's digest: a job may have very many requests."""

    def read(self, line: Line) -> Request | Refusal:
        """The request of a line; lines must come in the order of the input, to tell the first of equal ids."""
        custom_id = None
        try:
            data = _object(line.content)
            custom_id = _custom_id(data)
            self._claim(custom_id, line)
            return self._request(line, custom_id, data)
        except _RequestError as problem:
            return Refusal(line=line, custom_id=custom_id, code=problem.code, message=str(problem))

    def note(self, line: Line) -> None:
        """Remember the id of a line that is answered already."""
        with contextlib.suppress(_RequestError):
            self._claim(_custom_id(_object(line.content)), line)

    @cached_property
    def _end_of_turn(self) -> tuple[int, ...]:
        return end_of_turn(self.tokenizer)

    def _claim(self, custom_id: str, line: Line) -> None:
        """Remember whose the id is; that of an earlier line is refused."""
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        first = self.seen.setdefault(digest, line.number)
        if first != line.number:
            raise _RequestError(
                "duplicate_custom_id",
                f"custom_id {_shown(custom_id)} of line {line.number + 1:,} is that of line {first + 1:,} already: "
                "give every request its own",
            )

    def _request(self, line: Line, custom_id: str, data: Mapping[str, Any]) -> Request:
        if data.get("method", "POST") != "POST":
            raise _RequestError("invalid_method", f"method is {_shown(data['method'])}: POST is expected")
        url, body = data.get("url"), data.get("body")
        if not isinstance(url, str) or url not in _OWN:
            raise _RequestError("invalid_url", f"url is {_shown(url)}: {COMPLETIONS} or {CHAT} is expected")
        if not isinstance(body, dict):
            raise _RequestError("invalid_body", f"body is {_shown(body)}: a JSON object is expected")
        _check_fields(body, url)
        prompt = self._prompt(body) if url == COMPLETIONS else self._chat(body)
        params = self._params(body, len(prompt))
        if url == CHAT:
            params = dataclasses.replace(params, stop_token_ids=self._end_of_turn)
        key = line.number if body.get("seed") is None else 0
        return Request(line=line, custom_id=custom_id, url=url, prompt=prompt, params=params, key=key)

    def _prompt(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        prompt = body.get("prompt")
        if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], (str, list)):
            prompt = prompt[0]
        if isinstance(prompt, str):
            return self._tokens(prompt, special=True)
        if not isinstance(prompt, list) or not all(type(token) is int for token in prompt):
            raise _RequestError("invalid_prompt", "body.prompt must be one text or one list of token numbers")
        for token in prompt:
            if not 0 <= token < self.vocab_size:
                raise _RequestError(
                    "invalid_prompt", f"body.prompt holds {token}: a token number from 0 to {self.vocab_size - 1:,}"
                )
        return tuple(prompt)

    def _chat(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise _RequestError("invalid_messages", "body.messages must be a list of messages that is not empty")
        turns = [_turn(number, message) for number, message in enumerate(messages)]
        if self.tokenizer is None:
            raise _RequestError("no_tokenizer", "the model has no tokenizer: give a prompt as token numbers")
        if not has_chat_template(self.tokenizer):
            raise _RequestError(
                "no_chat_template",
                f"the model is a base model, its tokenizer has no chat template: use {COMPLETIONS} with a prompt",
            )
        try:
            text = rendered(self.tokenizer, turns)
        except InputError as error:
            raise _RequestError("invalid_messages", str(error)) from None
        return self._tokens(text, special=False)

    def _tokens(self, text: str, *, special: bool) -> tuple[int, ...]:
        if self.tokenizer is None:
            raise _RequestError("no_tokenizer", "the model has no tokenizer: give body.prompt as token numbers")
        try:
            check_text(text, "the prompt")
        except InputError as error:
            raise _RequestError("invalid_prompt", str(error)) from None
        return tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _params(self, body: Mapping[str, Any], prompt_tokens: int) -> SamplingParams:
        if prompt_tokens == 0:
            raise _RequestError("invalid_prompt", "the prompt has no tokens: at least one is expected")
        asked = body.get("max_completion_tokens")
        asked = body.get("max_tokens") if asked is None else asked
        room = None if self.max_positions is None else self.max_positions - prompt_tokens
        limit = self.defaults.max_new_tokens if asked is None else asked
        if room is not None and asked is None:
            limit = max(1, min(limit, room))  # not asked for: as much as there is room for
        settings = {name: body[name] for name in _SAMPLING - {"max_tokens"} if body.get(name) is not None}
        changed = {"max_new_tokens": limit, **settings}
        try:
            params = SamplingParams(**{**_fields(self.defaults), **changed})
        except InputError as error:
            text = str(error).replace("max_new_tokens", "max_tokens")
            raise _RequestError("invalid_value", f"body.{text}") from None
        if params.stop and self.tokenizer is None:
            raise _RequestError("no_tokenizer", "the model has no tokenizer: body.stop cannot be found in its answers")
        if room is not None and params.max_new_tokens > room:
            raise _RequestError(
                "context_length_exceeded",
                f"the prompt has {words.counted(prompt_tokens, 'token')} and max_tokens is {params.max_new_tokens:,}, "
                f"together {prompt_tokens + params.max_new_tokens:,}: the model has {self.max_positions:,} positions",
            )
        return params


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as one line of output."""
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, in a custom_id
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def _object(content: bytes) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise _RequestError("invalid_json", f"the line is not valid JSON: {error}") from None
    if not isinstance(data, dict):
        raise _RequestError("invalid_json", f"the line is {_shown(data)}: a JSON object is expected")
    return data


def _custom_id(data: Mapping[str, Any]) -> str:
    custom_id = data.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _RequestError("missing_custom_id", "custom_id is missing: a text that is its own is expected")
    return custom_id


def _check_fields(body: Mapping[str, Any], url: str) -> None:
    for name, value in body.items():
        if name in _SAMPLING | _ABOUT_THE_CALLER | _OWN[url]:
            continue
        if name not in _NEUTRAL:
            raise _RequestError("unsupported_field", f"body.{name} is not supported for {url}")
        if not any(value == neutral and type(value) is type(neutral) for neutral in _allowed(_NEUTRAL[name])):
            raise _RequestError("unsupported_field", f"body.{name} is {_shown(value)}: this is not supported")


def _allowed(neutral: Sequence[object]) -> list[object]:
    """A neutral number may be written with a point."""
    return [*neutral, *(float(value) for value in neutral if type(value) is int)]


def _turn(number: int, message: object) -> dict[str, str]:
    where = f"body.messages[{number}]"
    if not isinstance(message, dict):
        raise _RequestError("invalid_messages", f"{where} is {_shown(message)}: a JSON object is expected")
    role, content = message.get("role"), message.get("content")
    if role not in _ROLES:
        raise _RequestError("invalid_messages", f"{where}.role is {_shown(role)}: it is none of {', '.join(_ROLES)}")
    if isinstance(content, list):
        content = _joined(content)
    if not isinstance(content, str):
        raise _RequestError("invalid_messages", f"{where}.content must be text")
    return {"role": "system" if role == "developer" else role, "content": content}


def _joined(parts: list[object]) -> str | None:
    """The text of a content in parts, if all of them are text."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def _fields(params: SamplingParams) -> dict[str, Any]:
    return {name: getattr(params, name) for name in params.__dataclass_fields__}


def _shown(value: object) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
