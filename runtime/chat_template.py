"""The chat template of a tokenizer: the prompt that messages make, and the token that ends an answer.

A template is a small program that came with the model. Its text is all that a prompt holds: special tokens,
the one that begins a text among them, are the template's to write, so the tokenizer adds none.
"""

from collections.abc import Sequence
from typing import Any

from costmodel.errors import InputError

Message = dict[str, str]

_QUESTION: Message = {"role": "user", "content": "A question?"}
_ANSWER: Message = {"role": "assistant", "content": "The answer."}


def has_chat_template(tokenizer: Any) -> bool:
    """Whether messages can be turned into a prompt as the model was trained on; an empty template is none."""
    return bool(getattr(tokenizer, "chat_template", None))


def rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    """The prompt for an answer to the messages, to be tokenised without further special tokens.

    Raises :class:`InputError` for messages that the template refuses, and for a system message that it leaves out.
    """
    text = _applied(tokenizer, messages, add_generation_prompt=True)
    for message in messages:
        if message["role"] == "system" and message["content"].strip() not in text:
            raise InputError("the model's chat template leaves the system message out")
    return text


def end_of_turn(tokenizer: Any) -> tuple[int, ...]:
    """The token that the template writes behind an answer, where it is one: a model that was trained on it ends so.

    It may be neither the end of sequence of ``config.json`` nor among those of ``generation_config.json``.
    """
    if not has_chat_template(tokenizer):
        return ()
    try:
        text = _applied(tokenizer, [_QUESTION, _ANSWER, _QUESTION], add_generation_prompt=False)
    except InputError:  # told when a conversation gets there
        return ()
    _, answer, behind = text.rpartition(_ANSWER["content"])
    added = tokenizer.get_added_vocab()
    found = [token for token in added if answer and behind.lstrip().startswith(token)]
    return (int(added[max(found, key=len)]),) if found else ()


def _applied(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program, which says in its own ways what it does not take
        raise InputError(f"the model's chat template refuses: {' '.join(str(error).split())}") from None
    return text
