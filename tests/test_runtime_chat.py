"""Chat: the prompts a conversation makes, its commands, what is left out when it grows, and Ctrl-C."""

import contextlib
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import FakeEngine, byte_level

from costmodel.errors import InputError
from runtime import chat, run_report
from runtime.conversation import Conversation
from runtime.sequences import Completion

Talk = Callable[..., tuple[int, str, str]]


class Scripted(FakeEngine):
    """Answers with given texts, one character a piece; ``\\x03`` stands for a Ctrl-C there."""

    def __init__(self, *answers: str, chat: bool = True, **options: Any) -> None:
        super().__init__(tokenizer=byte_level(chat=chat), **{"max_positions": None, **options})
        self.answers = list(answers)
        self.keys: list[int] = []

    def generate(self, prompts: Any, params: Any = None, **options: Any) -> list[Completion]:
        self.calls.append([tuple(prompt) for prompt in prompts])
        self.params.append(params)
        self.keys += options["keys"]
        text = self.answers.pop(0)
        for number, piece in enumerate(text, start=1):
            if piece == "\x03":
                signal.raise_signal(signal.SIGINT)
            else:
                options["on_text"](0, piece)
            options["on_progress"](number, params.max_new_tokens)
        return [Completion(token_ids=(5,) * len(text), text=text, finish_reason="stop", prompt_tokens=1)]

    def said(self) -> list[str]:
        """The prompts as text."""
        return [self.tokenizer.decode(list(call[0]), clean_up_tokenization_spaces=False) for call in self.calls]


@pytest.fixture
def talk(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Talk:
    """Type lines into the command; exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def command(typed: str, engine: FakeEngine, *flags: str, watched: bool = False) -> tuple[int, str, str]:
        @contextlib.contextmanager
        def load(args: Any, **options: Any) -> Iterator[FakeEngine]:
            yield engine

        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        if watched:
            monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
            monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
            lines = iter(typed.split("\n"))

            def typing(prompt: str) -> str:
                line = next(lines)
                if line == "^C":
                    raise KeyboardInterrupt
                if line == "^D":
                    raise EOFError
                return line

            monkeypatch.setattr("builtins.input", typing)
        code = chat.main(["--model", "fake", *flags], load=load)
        return code, *capsys.readouterr()

    return command


# ------------------------------------------------------------------ the conversation


def test_answers_stream_and_the_conversation_is_kept(talk: Talk) -> None:
    engine = Scripted("Hello.", "Fine.")
    code, out, err = talk("Hi\n\n  How are you?  \n", engine, "--system", "Be kind.")
    assert (code, out, err) == (0, "Hello.\nFine.\n", "")
    assert engine.said() == [
        "<system>Be kind.\n<user>Hi\n<assistant>",
        "<system>Be kind.\n<user>Hi\n<assistant>Hello.\n<user>How are you?\n<assistant>",
    ]
    assert engine.keys == [1, 2]


def test_a_base_model_continues_a_transcript_and_is_told_so_once(talk: Talk) -> None:
    engine = Scripted(" Hello.", " Fine.", chat=False)
    _, out, err = talk("Hi\nAnd?\n", engine, "--system", "A talk.")
    assert out == "Hello.\nFine.\n"
    assert err.count("base model without a chat template") == 1
    assert engine.said()[1] == "A talk.\n\nUser: Hi\nAssistant: Hello.\nUser: And?\nAssistant:"
    assert engine.params[0].stop == ("\nUser:",)


def test_real_generation_streams_what_it_completes(talk: Talk) -> None:
    engine = FakeEngine(tokenizer=byte_level(chat=True), max_positions=None)
    flags = ["--seed", "5", "--max-new-tokens", "20"]
    code, out, _ = talk("the fox\n", engine, *flags)
    assert code == 0
    (done,) = engine.generate(engine.calls[0], engine.params[0], keys=[1])
    assert out == run_report.printable(done.text.lstrip()) + "\n"


def test_a_model_without_tokenizer_cannot_chat(talk: Talk) -> None:
    code, _, err = talk("Hi\n", FakeEngine())
    assert code == 2
    assert "has no tokenizer" in err
    assert "--prompt-ids" in err


def test_without_an_answer_the_question_is_forgotten(talk: Talk) -> None:
    engine = Scripted("", "Yes.")
    _, _, err = talk("Hi\nHello?\n", engine)
    assert "the model says nothing" in err
    assert engine.said()[1] == "<user>Hello?\n<assistant>"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the latter is Python's in the locale C
def test_standard_input_that_is_no_text_is_refused(talk: Talk, monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"\xff\xfe\n"), encoding="utf-8", errors=errors)
    real = io.StringIO
    monkeypatch.setattr(io, "StringIO", lambda text: stdin if text == "bytes" else real(text))
    code, _, err = talk("bytes", Scripted())
    assert (code, err) == (2, "error: standard input cannot be read: it is not UTF-8 text\n")


def test_a_system_message_that_is_no_text_is_refused(talk: Talk) -> None:
    code, _, err = talk("Hi\n", Scripted(), "--system", "caf\udce9")
    assert (code, err) == (2, "error: --system is not UTF-8 text\n")


# ------------------------------------------------------------------ commands


def test_help_lists_the_commands(talk: Talk) -> None:
    _, _, err = talk("!help\n", Scripted())
    assert all(name in err for name in (*chat.COMMANDS, "Ctrl-C", "Ctrl-D"))


def test_exit_ends_before_the_rest(talk: Talk) -> None:
    engine = Scripted("Hello.")
    assert talk("Hi\n!exit\nMore\n", engine)[:2] == (0, "Hello.\n")
    assert len(engine.calls) == 1


def test_clear_begins_anew(talk: Talk) -> None:
    engine = Scripted("Hello.", "Yes.")
    talk("Hi\n!clear\nYou?\n", engine, "--system", "Be kind.")
    assert engine.said()[1] == "<system>Be kind.\n<user>You?\n<assistant>"


def test_an_unknown_command_suggests_the_nearest(talk: Talk) -> None:
    _, out, err = talk("!sav x\n!what\n", Scripted())
    assert "unknown command !sav: did you mean !save?" in err
    assert "unknown command !what: !help lists" in err
    assert out == ""


def test_save_writes_text_or_messages(talk: Talk, tmp_path: Path) -> None:
    (tmp_path / "taken.txt").write_text("mine")
    typed = "Hé\n!save a b.txt\n!save talk.json\n!save\n!save taken.txt\n!save none/x.txt\nMore\n!save talk.json\n"
    code, _, err = talk(typed, Scripted("Hello.", "Yes."), "--system", "Kind.")
    assert code == 0
    assert (tmp_path / "a b.txt").read_text(encoding="utf-8") == "System: Kind.\n\nUser: Hé\n\nAssistant: Hello.\n"
    messages = json.loads((tmp_path / "talk.json").read_text())
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (tmp_path / "taken.txt").read_text() == "mine"
    assert "!save needs the name of a file" in err
    assert "taken.txt exists already" in err
    assert "cannot be written" in err


# ------------------------------------------------------------------ a long conversation


def conversation(max_positions: int, **options: Any) -> Conversation:
    return Conversation(tokenizer=byte_level(chat=True), max_positions=max_positions, **options)


def test_the_oldest_turns_are_left_out_and_never_more_than_needed() -> None:
    limit, most = 100, 10
    talked = conversation(limit, system="Be kind.")
    dropped = 0
    for number in range(12):
        prompt = talked.ask(f"question {number}", max_new_tokens=most)
        dropped += prompt.dropped
        assert len(prompt.tokens) + prompt.room <= limit
        assert prompt.room == most
        text = byte_level().decode(list(prompt.tokens), clean_up_tokenization_spaces=False)
        assert text.startswith("<system>Be kind.\n<user>")
        assert text.endswith(f"<user>question {number}\n<assistant>")
        if talked.first:  # one exchange more would not have fitted
            talked.first -= 2
            assert len(talked._tokens()) + most > limit
            talked.first += 2
        talked.answer(f"answer {number}")
    assert dropped == talked.first > 0
    assert len(talked.messages(0)) == 25


def test_dropping_is_said(talk: Talk) -> None:
    engine = Scripted(*["Hello there."] * 6, max_positions=80)
    _, _, err = talk("What is it?\n" * 6, engine, "--max-new-tokens", "20")
    assert "turns no longer fit the model's 80 positions" in err
    assert all(len(call[0]) + one.max_new_tokens <= 80 for call, one in zip(engine.calls, engine.params, strict=True))


def test_a_message_that_does_not_fit_is_refused_and_forgotten(talk: Talk) -> None:
    engine = Scripted("Hello.", max_positions=40)
    code, _, err = talk("x y z " * 40 + "\nHi\n", engine)
    assert code == 0
    assert "positions" in err
    assert engine.said() == ["<user>Hi\n<assistant>"]


def test_the_room_for_an_answer_shrinks_before_the_question_is_refused() -> None:
    talked = conversation(30)
    prompt = talked.ask("x", max_new_tokens=1000)
    assert prompt.room == 30 - len(prompt.tokens)


def test_what_a_template_refuses_is_told() -> None:
    talked = conversation(100)
    talked.tokenizer = type("Refusing", (), {"chat_template": "x", "apply_chat_template": lambda *a, **b: 1 / 0})()
    with pytest.raises(InputError, match="chat template refuses: division by zero"):
        talked.ask("x", max_new_tokens=1)
    assert talked.turns == []


# ------------------------------------------------------------------ Ctrl-C and Ctrl-D


def test_ctrl_c_stops_the_answer_only(talk: Talk) -> None:
    engine = Scripted("Hel\x03lo.", "Yes.")
    code, out, err = talk("Hi\nGo on\n", engine)
    assert (code, out) == (0, "Hel\nYes.\n")
    assert "(stopped)" in err
    assert engine.said()[1] == "<user>Hi\n<assistant>Hel\n<user>Go on\n<assistant>"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_ends_the_program(talk: Talk) -> None:
    class Stuck(Scripted):
        def generate(self, *args: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    code, _, err = talk("Hi\n", Stuck())
    assert (code, err) == (130, "error: interrupted\n")


def test_at_the_prompt_ctrl_c_explains_and_ctrl_d_leaves(talk: Talk) -> None:
    code, out, err = talk("^C\nHi\n^D", Scripted("Hello."), watched=True)
    assert code == 0
    assert "Hello.\n" in out
    assert "(Ctrl-D or !exit leaves)" in err
    assert "token/s" in err


def test_sigterm_ends_the_program_at_the_prompt_too(talk: Talk, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(Scripted):
        def generate(self, *args: Any, **options: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)

    code, _, err = talk("Hi\n", Dying(), watched=True)
    assert code == 130
    assert err.endswith("error: interrupted\n")
