"""Chat templates in the forms of the families: transformers' own prompts, and answers that end where a turn ends."""

import contextlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from engines import FakeEngine, byte_level
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from runtime import LLM, SamplingParams, chat, tokens
from runtime.chat_template import end_of_turn, rendered
from runtime.conversation import Conversation
from runtime.job_source import Line
from runtime.requests import Reader, Refusal, Request


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a family writes a conversation; ``expected`` is the second question's prompt, typed by hand."""

    template: str
    special: tuple[str, ...]
    eos: str
    turn_ends: str
    expected: str
    bos: str | None = None
    system: str | None = "Be kind."


FORMS = {
    "chatml, as Qwen2.5 has it": Form(
        template=(
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe useful.<|im_end|>\n{% endif %}"
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        eos="<|endoftext|>",
        turn_ends="<|im_end|>",
        system=None,
        expected=(
            "<|im_start|>system\nBe useful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "Hello.<|im_end|>\n<|im_start|>user\nAnd you?<|im_end|>\n<|im_start|>assistant\n"
        ),
    ),
    "headers, as Llama 3 has them": Form(
        template=(
            "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
            "{{ m.content | trim }}<|eot_id|>{% endfor %}"
            "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        turn_ends="<|eot_id|>",
        expected=(
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nAnd you?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    ),
    "instructions, as Llama 2 has them": Form(
        template=(
            "{% set first = '' %}{% if messages[0].role == 'system' %}"
            "{% set first = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
            "{% set messages = messages[1:] %}{% endif %}"
            "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
            "{{ raise_exception('user and assistant take turns') }}{% endif %}"
            "{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first %}{{ first }}{% endif %}{{ m.content }}"
            " [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
        turn_ends="</s>",
        expected="<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello. </s><s>[INST] And you? [/INST]",
    ),
    "without a system role, as Mistral has it": Form(
        template=(
            "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
            "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
            "{% else %}{{ raise_exception('only user and assistant speak here') }}{% endif %}{% endfor %}"
        ),
        special=("<s>", "</s>", "[INST]", "[/INST]"),
        bos="<s>",
        eos="</s>",
        turn_ends="</s>",
        system=None,
        expected="<s>[INST] Hi[/INST] Hello.</s>[INST] And you?[/INST]",
    ),
    "turns that the next one ends, as GLM-4 has them": Form(
        template=(
            "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
        ),
        special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
        eos="<|endoftext|>",
        turn_ends="<|user|>",
        expected="[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello.<|user|>\nAnd you?<|assistant|>\n",
    ),
}
SILENT = "{% for m in messages if m.role != 'system' %}{{ m.content }}\n{% endfor %}"


@cache
def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a form's special tokens; it opens every text with the form's beginning, as Llama's do."""
    form = FORMS[name]
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.add_special_tokens(list(form.special))
    if form.bos is not None:
        opening = [(form.bos, backend.token_to_id(form.bos))]
        backend.post_processor = TemplateProcessing(single=f"{form.bos} $A", special_tokens=opening)
    made = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=form.eos, bos_token=form.bos, additional_special_tokens=list(form.special)
    )
    made.chat_template = form.template
    return made


def every_form() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", FORMS)


def token(name: str, text: str) -> int:
    return int(tokenizer(name).convert_tokens_to_ids(text))


# ------------------------------------------------------------------ prompts


@every_form()
def test_prompts_are_those_of_transformers_and_of_the_model_card(name: str, tmp_path: Path) -> None:
    """The tokenizer is read back from its files, as it is from a checkpoint's folder."""
    tokenizer(name).save_pretrained(tmp_path)
    read, form = tokens.tokenizer(tmp_path), FORMS[name]
    assert read is not None
    talk = Conversation(tokenizer=read, max_positions=None, system=form.system)
    messages = [] if form.system is None else [{"role": "system", "content": form.system}]
    for question, answer in (("Hi", "Hello."), ("And you?", " Fine. "), ("Good.", "Yes.")):
        messages.append({"role": "user", "content": question})
        ours = talk.ask(question, max_new_tokens=8).tokens
        theirs = tokenizer(name).apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        assert list(ours) == theirs["input_ids"]
        if question == "And you?":
            assert read.decode(ours, clean_up_tokenization_spaces=False) == form.expected
        talk.answer(answer)
        messages.append({"role": "assistant", "content": answer.strip()})


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.bos is not None])
def test_a_prompt_begins_once(name: str) -> None:
    begin = tokenizer(name).bos_token_id
    assert tokenizer(name)("Hi")["input_ids"][0] == begin  # the tokenizer by itself would open the text again
    first, second, *_ = Conversation(tokenizer=tokenizer(name), max_positions=None).ask("Hi", max_new_tokens=1).tokens
    assert first == begin != second


def test_oldest_turns_are_left_out_in_pairs_so_that_roles_still_alternate() -> None:
    name = "instructions, as Llama 2 has them"
    talk = Conversation(tokenizer=tokenizer(name), max_positions=120, system="Be kind.")
    for number in range(9):
        prompt = talk.ask(f"question {number}", max_new_tokens=10)
        text = tokenizer(name).decode(prompt.tokens, clean_up_tokenization_spaces=False)
        assert text.startswith("<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nquestion ")
        assert text.endswith(f"question {number} [/INST]")
        talk.answer("It is so.")
    assert talk.first > 0


# ------------------------------------------------------------------ system messages that a template does not take


def test_a_template_without_a_system_role_refuses_one() -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="^the model's chat template refuses: only user and assistant speak here$"):
        rendered(tokenizer("without a system role, as Mistral has it"), messages)


def test_a_system_message_that_a_template_leaves_out_is_refused() -> None:
    silent = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    silent.chat_template = SILENT
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with pytest.raises(InputError, match="^the model's chat template leaves the system message out$"):
        rendered(silent, messages)
    assert rendered(silent, messages[1:]) == "Hi\n"


def test_a_template_that_is_no_template_is_told_in_one_line() -> None:
    broken = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    broken.chat_template = "{% for m in messages %}\n\n{{ m.content }"
    with pytest.raises(InputError, match="chat template refuses: ") as refusal:
        rendered(broken, [{"role": "user", "content": "Hi"}])
    assert "\n" not in str(refusal.value)
    assert end_of_turn(broken) == ()


def test_an_empty_template_is_none() -> None:
    """A conversation with such a model is a transcript, as without a template."""
    empty = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer)
    empty.chat_template = ""
    talk, plain = (Conversation(tokenizer=one, max_positions=None) for one in (empty, byte_level()))
    assert talk.plain
    assert talk.ask("Hi", max_new_tokens=1).tokens == plain.ask("Hi", max_new_tokens=1).tokens
    assert talk.end_of_turn == ()


# ------------------------------------------------------------------ where an answer ends


@every_form()
def test_the_token_that_ends_a_turn(name: str) -> None:
    assert end_of_turn(tokenizer(name)) == (token(name, FORMS[name].turn_ends),)


def test_a_template_of_words_alone_ends_no_turn() -> None:
    assert end_of_turn(byte_level(chat=True)) == ()
    assert end_of_turn(byte_level()) == ()


class Scripted(FakeEngine):
    """Says a form's text, token by token, whatever it is asked."""

    def __init__(self, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(tokenizer=tokenizer(name), max_positions=None)
        self.vocab_size = len(tokenizer(name))
        script = iter(tokenizer(name)(text, add_special_tokens=False)["input_ids"])

        def logits(sequence: Sequence[int], vocabulary: int) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor(next(script)), vocabulary).float()

        monkeypatch.setattr(engines, "_logits", logits)


def talk(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    @contextlib.contextmanager
    def load(args: Any) -> Iterator[FakeEngine]:
        yield engine

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    return chat.main(["--model", "fake", "--temperature", "0", *flags], load=load)


@every_form()
def test_an_answer_ends_with_its_turn_and_shows_no_special_token(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No engine here knows the form's end of turn from a config: 0 is its only end of sequence."""
    form = FORMS[name]
    engine = Scripted(name, f"Hello {form.special[0]}there.{form.turn_ends}and more", monkeypatch)
    if form.turn_ends == form.special[0]:
        engine = Scripted(name, f"Hello there.{form.turn_ends}and more", monkeypatch)
    assert talk(engine, monkeypatch) == 0
    assert capsys.readouterr().out == "Hello there.\n"


def test_ignore_eos_goes_on_behind_the_turn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "chatml, as Qwen2.5 has it"
    engine = Scripted(name, "Hello<|im_end|> and more", monkeypatch)
    count = len(tokenizer(name)("Hello<|im_end|> and more")["input_ids"])
    assert talk(engine, monkeypatch, "--ignore-eos", "--max-new-tokens", str(count)) == 0
    assert capsys.readouterr().out == "Hello and more\n"


def test_system_flag_that_cannot_take_effect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(tokenizer=tokenizer("without a system role, as Mistral has it"))
    assert talk(engine, monkeypatch, "--system", "Be kind.") == 2
    assert capsys.readouterr().err == (
        "error: --system cannot take effect: the model's chat template refuses: only user and assistant speak here "
        "(leave it out, and say it in the first message)\n"
    )
    assert engine.calls == []


@pytest.mark.parametrize("has_system", [False, True])
def test_requests_of_a_batch_end_with_the_turn_too(has_system: bool) -> None:
    name = "without a system role, as Mistral has it"
    reader = Reader(tokenizer=tokenizer(name), max_positions=None, vocab_size=400, defaults=SamplingParams())
    messages = [{"role": "system", "content": "Be kind."}] * has_system + [{"role": "user", "content": "Hi"}]
    request = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": messages}}
    found = reader.read(Line.of(0, json.dumps(request).encode()))
    if has_system:
        assert isinstance(found, Refusal)
        assert found.message == "the model's chat template refuses: only user and assistant speak here"
    else:
        assert isinstance(found, Request)
        assert tokenizer(name).decode(found.prompt) == "<s>[INST] Hi[/INST]"
        assert found.params.stop_token_ids == (token(name, "</s>"),)


# ------------------------------------------------------------------ generation_config.json


@pytest.mark.parametrize("listed", [False, True])
def test_the_ends_of_generation_config_count_and_not_only_those_of_config(listed: bool, tmp_path: Path) -> None:
    """As Llama 3.1 has it: config.json names one end, generation_config.json three."""
    folder = tmp_path / "model"
    engines.save_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = [5, 9, 40, 77]
    free = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 4:].tolist()
    end = next(one for place, one in enumerate(free) if place > 0 and one not in free[:place])
    assert end != model.config.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 319, end] if listed else end}))
    hardware, memory = Hardware.from_catalog("cpu-laptop"), {"gpu_memory": "64MiB", "cpu_memory": "64MiB"}
    with LLM(folder, dtype="float32", device="cpu", hardware=hardware, offload_dir=tmp_path, **memory) as llm:
        (done,) = llm.generate([prompt], SamplingParams(max_new_tokens=8))
    assert list(done.token_ids) == free[: free.index(end)]
    assert done.finish_reason == "stop"
