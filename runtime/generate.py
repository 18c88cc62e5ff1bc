"""Continue prompts given by flags, a text file or JSON lines."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.text import Text

from costmodel import records, words
from costmodel.commands import outcome, parsing, terminal
from costmodel.errors import InputError
from costmodel.workload import Workload
from runtime import engine_flags, progress_bar, prompts, run_report
from runtime.tokens import token_ids

if TYPE_CHECKING:
    from runtime.engine import Engine, Load
    from runtime.sampling import SamplingParams
    from runtime.sequences import Completion

EPILOG = """\
examples:
  %(prog)s --model facebook/opt-1.3b --prompt "Paris is the capital of"
  %(prog)s --model facebook/opt-30b --cpu-memory 100GiB --offload-dir /mnt/nvme --prompts-file prompts.txt
      one prompt a line (in a .jsonl file: a text, or an object with "prompt"), more than memory holds
  %(prog)s --model ./my-model --policy policy.json --temperature 0.8 --top-p 0.95 --seed 1 --prompt "Once"
      under a policy that tierwise search wrote; draws that can be repeated
  %(prog)s --model dummy:opt-6.7b --prompt-ids 2,100,200 --json - | jq .completions
      random weights, which have no tokenizer: token numbers in and out

exit codes: 0 done, 2 bad input, 3 nothing fits, 5 the disk failed, 130 interrupted
"""

_PROMPT_WIDTH = 60


@dataclass(frozen=True, kw_only=True)
class _Done:
    """What one call generated."""

    prompts: list[prompts.Prompt]
    completions: list["Completion"]
    seconds: float
    streamed: bool

    @property
    def new_tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.completions)


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "tierwise generate",
    load: "Load" = engine_flags.load_engine,
) -> int:
    """Run the command; its exit code. ``load`` makes the engine from the flags."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv), load))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage="%(prog)s --model MODEL (--prompt TEXT | --prompts-file FILE | --prompt-ids IDS) [flags]",
        description="Continue prompts with a model that need not fit the GPU, or the memory.",
        epilog=EPILOG,
    )
    group = parser.add_argument_group("prompts", "One kind of them.")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--prompt", metavar="TEXT", action="append", help="a prompt; may be given several times")
    which.add_argument("--prompts-file", metavar="FILE", help="prompts, one a line; .jsonl: one JSON value a line")
    which.add_argument(
        "--prompt-ids", metavar="IDS", action="append", help="a prompt as token numbers, such as 1,2,3; also repeatedly"
    )
    engine_flags.add_engine(parser)
    engine_flags.add_sampling(parser, max_new_tokens=32, temperature=0.0)
    parser.add_argument_group("output").add_argument(
        "--json", metavar="FILE|-", type=parsing.json_file, help="write everything as JSON; - is standard output"
    )
    return parser


def _run(args: argparse.Namespace, load: "Load") -> int:
    parsing.check_distinct(
        {"--json": args.json, "--trace": args.trace},
        {"--prompts-file": args.prompts_file, **engine_flags.files_read(args)},
    )
    engine_flags.check_engine(args)
    engine_flags.check_sampling(args)
    given = _prompts(args)
    params = engine_flags.sampling(args)
    with load(args) as engine:
        _tell(args, engine, _generate(args, engine, given, params))
    return 0


def _prompts(args: argparse.Namespace) -> list[prompts.Prompt]:
    if args.prompts_file is not None:
        return prompts.read_file(args.prompts_file)
    if args.prompt_ids is not None:
        return [prompts.read_ids(text) for text in args.prompt_ids]
    if "" in args.prompt:
        raise InputError("--prompt is empty: a text to continue is expected")
    return list(args.prompt)


def _generate(
    args: argparse.Namespace, engine: "Engine", given: list[prompts.Prompt], params: "SamplingParams"
) -> _Done:
    tokens = _tokens(given, engine, params.max_new_tokens)
    longest = max(len(prompt) for prompt in tokens)
    engine_flags.prepare(engine, Workload(prompt_len=longest, gen_len=params.max_new_tokens, num_prompts=len(given)))
    stream = len(given) == 1 and engine.tokenizer is not None and args.json is None and sys.stdout.isatty()
    start = time.monotonic()
    if stream:
        outcome.say(str(given[0]))
        completions = engine.generate(
            tokens, params, on_text=lambda index, piece: outcome.say(run_report.printable(piece))
        )
        outcome.say("\n")
    else:
        with progress_bar.tokens("generating") as report:
            completions = engine.generate(tokens, params, on_progress=report)
    return _Done(prompts=given, completions=completions, seconds=time.monotonic() - start, streamed=stream)


def _tokens(given: list[prompts.Prompt], engine: "Engine", max_new_tokens: int) -> list[list[int]]:
    """The prompts as token ids; what cannot be run is told in the words of the flags."""
    try:
        return token_ids(given, [max_new_tokens] * len(given), engine, named=lambda index: f"prompt {index + 1}")
    except InputError as error:
        text = str(error).replace("max_new_tokens", "--max-new-tokens")
        raise InputError(text.replace("give token ids", "give token numbers, --prompt-ids 1,2,3")) from None


def _tell(args: argparse.Namespace, engine: "Engine", done: _Done) -> None:
    """The completions, for people or for machines."""
    data = {
        "engine": engine.describe(),
        "completions": [
            {
                "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
                "prompt_tokens": one.prompt_tokens,
                "text": one.text,
                "token_ids": list(one.token_ids),
                "finish_reason": one.finish_reason,
            }
            for prompt, one in zip(done.prompts, done.completions, strict=True)
        ],
        "seconds": done.seconds,
        "new_tokens": done.new_tokens,
        "measurement": None if engine.measurement is None else engine.measurement.to_dict(),
    }
    if args.json == parsing.STANDARD_OUTPUT:
        outcome.say(json.dumps(data, indent=2) + "\n")
        return
    if args.json is not None:
        records.write_json(data, args.json)
    told = run_report.pace_line(done.new_tokens, done.seconds, engine.measurement)
    last = Text(f"\n{told}", terminal.FAINT)
    if done.streamed:
        terminal.show(last)
        return
    for prompt, one in zip(done.prompts, done.completions, strict=True):
        _show(prompt, one)
    written = [terminal.facts(("written", str(args.json)))] if args.json is not None else []
    terminal.show(last, *written)


def _show(prompt: prompts.Prompt, done: "Completion") -> None:
    """One prompt, shortened, and what it was continued with."""
    length = words.counted(len(done.token_ids), "token")
    ended = f"{length}, ended by itself" if done.finish_reason == "stop" else f"{length}, cut there"
    terminal.show(terminal.heading(_shortened(prompt)), Text(ended, terminal.FAINT))
    # A text as it is: wrapping it would put line breaks into what people copy.
    outcome.say((" ".join(map(str, done.token_ids)) if done.text is None else run_report.printable(done.text)) + "\n")


def _shortened(prompt: prompts.Prompt) -> str:
    text = prompt if isinstance(prompt, str) else " ".join(map(str, prompt))
    text = " ".join(text.split())
    if len(text) <= _PROMPT_WIDTH:
        return text
    half = _PROMPT_WIDTH // 2
    return f"{text[: half - 2]} … {text[-half + 1 :]}"


if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.generate"))
