"""Talk with a model in the terminal; answers stream as they are generated."""

import argparse
import contextlib
import dataclasses
import difflib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from costmodel import words
from costmodel.commands import outcome, parsing, signals
from costmodel.errors import InputError
from costmodel.workload import Workload
from runtime import engine_flags, run_report
from runtime.interruption import Stopped, stoppable
from runtime.tokens import check_text

if TYPE_CHECKING:
    from runtime.engine import Engine, Load
    from runtime.sampling import SamplingParams

EPILOG = """\
in the conversation:
  !help         list these
  !clear        begin a new conversation
  !save FILE    write the conversation: .json as messages, else as text
  !exit         leave; so does Ctrl-D
  Ctrl-C        stop the answer, not the program

examples:
  %(prog)s --model ./Llama-3.1-8B-Instruct --gpu-memory 7GiB --cpu-memory 24GiB
  %(prog)s --model facebook/opt-1.3b --temperature 0
      a base model: it continues a transcript of User: and Assistant:
  echo "Where is Paris?" | %(prog)s --model ./my-model
      questions from a pipe, one a line; standard output holds the answers

exit codes: 0 done, 2 bad input, 3 nothing fits, 5 the disk failed, 130 interrupted
"""

HELP = EPILOG.partition("\n\n")[0].partition("\n")[2]

COMMANDS = ("!help", "!clear", "!save", "!exit")

_PLANNED_PROMPT_TOKENS = 512


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "tierwise chat",
    load: "Load" = engine_flags.load_engine,
) -> int:
    """Run the command; its exit code. ``load`` makes the engine from the flags."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv), load))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage="%(prog)s --model MODEL [flags]",
        description="Talk with a model that need not fit the GPU, or the memory.",
        epilog=EPILOG,
    )
    parser.add_argument_group("conversation").add_argument(
        "--system", metavar="TEXT", help="what the model is told before the conversation"
    )
    engine_flags.add_engine(parser)
    engine_flags.add_sampling(parser, max_new_tokens=256, temperature=0.7)
    return parser


def _run(args: argparse.Namespace, load: "Load") -> int:
    parsing.check_distinct({"--trace": args.trace}, engine_flags.files_read(args))
    engine_flags.check_engine(args)
    engine_flags.check_sampling(args)
    params = engine_flags.sampling(args)
    if args.system is not None:
        check_text(args.system, "--system")
    with load(args) as engine:
        chat = _Chat(engine, params, args.system)
        workload = Workload(prompt_len=_PLANNED_PROMPT_TOKENS, gen_len=args.max_new_tokens, num_prompts=1)
        engine_flags.prepare(engine, workload)
        chat.run()
    return 0


class _Chat:
    """The loop of questions and answers."""

    def __init__(self, engine: "Engine", params: "SamplingParams", system: str | None) -> None:
        from runtime.conversation import PLAIN_STOP, Conversation

        if engine.tokenizer is None:
            raise InputError(
                f"model {engine.name} has no tokenizer, so there is no text to chat in: tierwise generate --prompt-ids "
                "takes token numbers"
            )
        self._engine = engine
        self._talk: Conversation = Conversation(
            tokenizer=engine.tokenizer, max_positions=engine.max_positions, system=system
        )
        try:
            self._talk.check_system()
        except InputError as error:
            raise InputError(
                f"--system cannot take effect: {error} (leave it out, and say it in the first message)"
            ) from None
        stop = (*params.stop, PLAIN_STOP) if self._talk.plain else params.stop
        self._params = dataclasses.replace(params, stop=stop, stop_token_ids=self._talk.end_of_turn)
        self._answers = 0
        self._saved: set[Path] = set()
        self._watched = sys.stdin.isatty() and sys.stdout.isatty()

    def run(self) -> None:
        if self._talk.plain:
            engine_flags.say(
                f"{self._engine.name} is a base model without a chat template: it continues a plain transcript of "
                "User: and Assistant:"
            )
        if self._watched:
            engine_flags.say("!help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  input() edits lines with it
        while (line := self._read()) is not None:
            text = line.strip()
            if text.startswith("!"):
                if self._command(text):
                    return
            elif text:
                self._reply(text)

    def _read(self) -> str | None:
        """The next line; ``None`` where there are no more."""
        while True:
            try:
                line = input("> ") if self._watched else sys.stdin.readline() or None
                if line is not None:
                    line.encode()  # where the locale lets any bytes pass, they are no text either
                return line
            except EOFError:
                outcome.say("\n")
                return None
            except signals.Terminated:
                raise
            except KeyboardInterrupt:
                if not self._watched:
                    raise
                engine_flags.say("\n(Ctrl-D or !exit leaves)")
            except UnicodeError:
                raise InputError("standard input cannot be read: it is not UTF-8 text") from None

    def _command(self, text: str) -> bool:
        """Carry out a line that begins with ``!``; true where it ends the conversation."""
        name, _, rest = text.partition(" ")
        if name == "!exit":
            return True
        if name == "!help":
            engine_flags.say(HELP)
        elif name == "!clear":
            self._talk.clear()
            engine_flags.say("(a new conversation)")
        elif name == "!save":
            self._save(rest.strip())
        else:
            close = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else "!help lists the commands"
            engine_flags.say(f"unknown command {name}: {hint}")
        return False

    def _save(self, name: str) -> None:
        if not name:
            engine_flags.say("!save needs the name of a file, such as !save talk.txt")
            return
        path = Path(name).expanduser()
        if path.exists() and path not in self._saved:
            engine_flags.say(f"{path} exists already: name another file")
            return
        try:
            self._talk.save(path)
        except InputError as error:  # a mistyped name ends no conversation
            engine_flags.say(str(error))
            return
        self._saved.add(path)
        engine_flags.say(f"(written: {path})")

    def _reply(self, text: str) -> None:
        try:
            prompt = self._talk.ask(text, max_new_tokens=self._params.max_new_tokens)
        except InputError as error:
            engine_flags.say(str(error))
            return
        if prompt.dropped:
            engine_flags.say(
                f"(the oldest {prompt.dropped} turns no longer fit the model's {self._engine.max_positions} positions)"
            )
        pieces: list[str] = []
        start = time.monotonic()
        tokens, ended = self._stream(prompt.tokens, prompt.room, pieces)
        outcome.say("\n")
        said = "".join(pieces)
        if ended and not said.strip():
            engine_flags.say("(the model says nothing)")
        if said.strip():
            self._talk.answer(said)
        else:
            self._talk.take_back()
        if not ended:
            engine_flags.say("(stopped)")
        elif self._watched:
            rate = tokens / max(time.monotonic() - start, 1e-9)
            engine_flags.say(f"({words.counted(tokens, 'token')}, {run_report.rate(rate)})")

    def _stream(self, tokens: tuple[int, ...], room: int, pieces: list[str]) -> tuple[int, bool]:
        """Print the answer as it comes; its tokens, and whether it ended rather than being stopped."""
        made = 0
        with stoppable() as check:

            def show(index: int, piece: str) -> None:
                # The blank that follows "Assistant:" belongs to the transcript.
                shown = piece if "".join(pieces).strip() else piece.lstrip()
                pieces.append(shown)
                outcome.say(run_report.printable(shown))
                check()

            def count(done: int, at_most: int) -> None:
                nonlocal made
                made = done
                check()

            self._answers += 1
            params = dataclasses.replace(self._params, max_new_tokens=room)
            try:
                self._engine.generate([tokens], params, keys=[self._answers], on_text=show, on_progress=count)
            except Stopped:
                return made, False
        return made, True


if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.chat"))
