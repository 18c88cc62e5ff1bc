"""Answer a file of requests in the OpenAI batch format; a job that was killed is resumed."""

import argparse
import dataclasses
import json
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import costmodel
from costmodel import records, units, words
from costmodel.commands import outcome, parsing, signals, terminal
from costmodel.errors import InfeasibleError, InputError
from costmodel.policy import Policy
from runtime import engine_flags, progress_bar
from runtime.job_source import Source

if TYPE_CHECKING:
    from costmodel.workload import Workload
    from runtime.engine import Engine, Load
    from runtime.job_log import JobLog
    from runtime.jobs import Progress

EPILOG = """\
Every line of the input is one request, and gets one line of output, in the order they are done:
  {"custom_id": "q1", "method": "POST", "url": "/v1/completions",
   "body": {"prompt": "Paris is", "max_tokens": 16, "temperature": 0}}
  {"custom_id": "q2", "method": "POST", "url": "/v1/chat/completions",
   "body": {"messages": [{"role": "user", "content": "Where is Paris?"}]}}
A body may have max_tokens, temperature, top_p, top_k, seed, stop and ignore_eos; the flags apply to
requests without them. A line that cannot be answered, or has the custom_id of an earlier one, gets an error
record, and the job goes on.

Results are on the disk after every block of prompts. OUT.manifest.json says what they were made with.

examples:
  %(prog)s --model facebook/opt-6.7b -i questions.jsonl -o answers.jsonl --cpu-memory 12GiB
  %(prog)s --model facebook/opt-6.7b -i questions.jsonl -o answers.jsonl --cpu-memory 12GiB --resume
      go on where a job ended, however it ended

exit codes: 0 done (there may be error records), 2 bad input, 3 nothing fits, 5 the disk failed,
130 interrupted
"""


_MOST_BLOCK_S = 1800.0


def main(
    argv: Sequence[str] | None = None,
    *,
    prog: str = "tierwise batch",
    load: "Load" = engine_flags.load_engine,
) -> int:
    """Run the command; its exit code. ``load`` makes the engine from the flags."""
    return outcome.ended(lambda: _run(_parser(prog).read(argv), load))


def _parser(prog: str) -> parsing.Parser:
    parser = parsing.Parser(
        prog=prog,
        usage="%(prog)s --model MODEL -i IN.jsonl -o OUT.jsonl [--resume] [flags]",
        description="Answer a file of requests in the OpenAI batch format, block by block; survives being killed.",
        epilog=EPILOG.replace("%", "%%").replace("%%(prog)s", "%(prog)s"),
    )
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input", metavar="IN", required=True, help="the requests, one JSON object per line")
    files.add_argument(
        "-o", "--output", metavar="OUT", required=True, type=parsing.output_file, help="where the answers are appended"
    )
    files.add_argument("--resume", action="store_true", help="keep the answers that OUT has, and do the rest")
    files.add_argument(
        "--json", metavar="FILE|-", type=parsing.json_file, help="write a summary as JSON; - is standard output"
    )
    files.add_argument(
        "--max-latency",
        metavar="TIME",
        type=parsing.seconds,
        help="the longest that a block should take, where the policy is searched: answers are saved block by block, so "
        "this is what a kill may cost (default: 30min, longer if no policy is as quick)",
    )
    engine_flags.add_engine(parser)
    engine_flags.add_sampling(
        parser, max_new_tokens=256, temperature=1.0, about="For requests that do not say; temperature 0 is greedy."
    )
    return parser


def _run(args: argparse.Namespace, load: "Load") -> int:
    manifest = args.output.with_name(f"{args.output.name}.manifest.json")
    parsing.check_distinct(
        {"--output": args.output, "the manifest": manifest, "--json": args.json, "--trace": args.trace},
        {"--input": args.input, **engine_flags.files_read(args)},
    )
    engine_flags.check_engine(args)
    if args.policy != engine_flags.AUTO and args.max_latency is not None:
        raise InputError(f"--policy is {args.policy}: nothing is searched, so --max-latency cannot take effect")
    source = Source.of(Path(args.input), default_new_tokens=args.max_new_tokens)
    engine_flags.sampling(args)  # wrong values are told before anything is opened
    from runtime.job_log import open_log

    with open_log(args.output, resume=args.resume) as log:
        try:
            done = _answer(args, source, log, load)
        except KeyboardInterrupt:
            outcome.say_error(
                f"interrupted: {len(log.answered)} of {source.requests} requests are done; "
                "the same command with --resume goes on"
            )
            return signals.INTERRUPTED
    _tell(args, done)
    return 0


def _answer(args: argparse.Namespace, source: Source, log: "JobLog", load: "Load") -> "Progress":
    """Check or write the manifest, then run the job."""
    from runtime.jobs import run_batch

    before = log.manifest() or {}
    if log.resumed and log.answered:
        engine_flags.say(f"{len(log.answered)} of {source.requests} requests are done already")
    if args.seed is None:  # one of the job's own, so that resuming it goes on as if it had not ended
        args.seed = before.get("sampling", {}).get("seed", secrets.randbits(32))
    policy = None
    if args.policy == engine_flags.AUTO and "policy" in before.get("engine", {}):
        # A search on new measurements may find another one, and numbers that differ in their last bit.
        policy = records.from_dict(Policy, before["engine"]["policy"], where=f"{args.output}.manifest.json: policy")
    defaults = engine_flags.sampling(args)
    job = {"input": source.identity(), "sampling": dataclasses.asdict(defaults)}
    log.check(job)
    with load(args, policy=policy) as engine:
        if policy is None and args.policy == engine_flags.AUTO:
            _choose(engine, source.workload, args.max_latency or _MOST_BLOCK_S)  # the manifest records it
        origin = {
            "version": costmodel.__version__,
            "input": str(source.path),
            "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        log.begin({"engine": engine.describe(), **job, "origin": origin})
        known = policy is not None or args.policy != engine_flags.AUTO
        if known and len(log.answered) < source.requests:
            engine_flags.prepare(engine, source.workload)
        with progress_bar.bar("answering") as show:
            report = None if show is None else _reporter(show)
            return run_batch(engine, source, log, defaults=defaults, report=report)


def _choose(engine: "Engine", workload: "Workload", max_latency_s: float) -> None:
    """Search the policy among those whose blocks are quick enough, or among all where none is."""
    try:
        engine_flags.prepare(engine, dataclasses.replace(workload, max_latency_s=max_latency_s))
    except InfeasibleError:
        engine_flags.prepare(engine, workload)


def _reporter(show: Callable[[float, str], None]) -> Callable[["Progress"], None]:
    def report(now: "Progress") -> None:
        pace = progress_bar.pace(now.tokens_per_s, now.left_s)
        show(now.share, f"{now.done:,} of {now.requests:,}, {pace}")

    return report


def _tell(args: argparse.Namespace, done: "Progress") -> None:
    """The summary, for people and for machines."""
    if args.json == parsing.STANDARD_OUTPUT:
        outcome.say(json.dumps({"output": str(args.output), **done.to_dict()}, indent=2) + "\n")
        return
    if args.json is not None:
        records.write_json({"output": str(args.output), **done.to_dict()}, args.json)
    requests = f"{done.answered:,} answered, {words.counted(done.errors, 'error')}"
    if done.before:
        requests += f" ({done.before:,} of the {done.requests:,} were done before)"
    rows: list[terminal.Row] = [("requests", requests)]
    if done.errors:
        rows.append(("errors", "what was wrong is in the field error of their records"))
    if done.done > done.before:
        rows += [
            ("tokens", f"{done.prompt_tokens:,} of prompts, {done.new_tokens:,} new"),
            ("time", f"{units.format_seconds(done.seconds)}, {progress_bar.pace(done.tokens_per_s, None)}"),
        ]
    terminal.show(terminal.facts(*rows, ("written", str(args.output))))


if __name__ == "__main__":
    sys.exit(main(prog="python -m runtime.batch"))
