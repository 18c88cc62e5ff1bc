"""The flags that generate, chat, batch and bench share: which model runs, where it lives, how tokens are chosen.

Reading flags imports no torch, so that help and complaints come at once.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from costmodel.commands import parsing, signals
from costmodel.errors import InputError
from costmodel.policy import Policy
from costmodel.workload import Workload
from runtime import progress_bar

if TYPE_CHECKING:
    from runtime.engine import Engine
    from runtime.llm import LLM
    from runtime.plan import Plan
    from runtime.sampling import SamplingParams

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Which model, under which policy, on which machine."""
    group = parser.add_argument_group("model and machine")
    add_model(group, default=None)
    group.add_argument(
        "--policy",
        metavar="FILE|auto",
        default=AUTO,
        help="where everything lives and how prompts are batched: a file from tierwise search --save-policy, or auto "
        "to search for the fastest (default: auto)",
    )
    add_machine(group)
    group.add_argument(
        "--trace",
        metavar="FILE",
        type=parsing.output_file,
        help="write a timeline of every load, compute and store, for chrome://tracing or ui.perfetto.dev",
    )


def add_model(group: argparse._ArgumentGroup, *, default: str | None) -> None:
    """Which model; it must be named where there is no ``default``."""
    told = (
        "a local folder, an id of the Hugging Face hub or a name of the catalogue; dummy:opt-6.7b makes random weights"
    )
    text = told if default is None else f"{told} (default: {default})"
    group.add_argument("--model", metavar="MODEL", required=default is None, default=default, help=text)


def add_machine(group: argparse._ArgumentGroup) -> None:
    """The machine, and how much of it may be used."""
    group.add_argument(
        "--hardware",
        metavar="FILE",
        help="what tierwise profile measured of this machine (default: a quick profile, kept for the next time)",
    )
    group.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        type=parsing.quantity("bytes"),
        help="the most that may be used of the first tier, such as 14GiB; without a GPU that is host memory",
    )
    group.add_argument(
        "--cpu-memory",
        metavar="SIZE",
        type=parsing.quantity("bytes", or_zero=True),
        help="the most host memory that may be used beside it, such as 100GiB; 0GiB for none",
    )
    group.add_argument("--offload-dir", metavar="DIR", help="the directory whose disk is the third tier")
    group.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="the first tier (default: cuda where there is one)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what weights and cache are kept in (default: float16 on CUDA, bfloat16 on CPUs that multiply it, else "
        "float32)",
    )


def add_sampling(
    parser: argparse.ArgumentParser,
    *,
    max_new_tokens: int,
    temperature: float,
    about: str = "The likeliest token is chosen at temperature 0; at others one is drawn.",
) -> None:
    """How tokens are chosen and when a text ends."""
    group = parser.add_argument_group("sampling", about)
    group.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=parsing.whole_number(1, parsing.MOST_TOKENS),
        default=max_new_tokens,
        help="tokens at most for each prompt (default: %(default)s)",
    )
    group.add_argument(
        "--temperature", metavar="T", type=_number, default=temperature, help="0 is greedy (default: %(default)s)"
    )
    group.add_argument(
        "--top-k",
        metavar="K",
        type=parsing.whole_number(0),
        default=0,
        help="draw among the K likeliest (default: all)",
    )
    group.add_argument(
        "--top-p",
        metavar="P",
        type=_number,
        default=1.0,
        help="draw among the likeliest of probability P together (default: all)",
    )
    group.add_argument(
        "--seed", metavar="N", type=int, help="make draws repeatable (default: every run draws differently)"
    )
    group.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be given several times"
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on after the model's end-of-sequence token")


def check_engine(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for files that are wrong, before anything takes time."""
    if args.policy != AUTO:
        Policy.from_file(args.policy)
    if args.hardware is not None and not Path(args.hardware).is_file():
        raise InputError(f"--hardware is {args.hardware}: there is no such file (tierwise profile --out makes one)")
    if args.offload_dir is not None and not Path(args.offload_dir).is_dir():
        reason = "that is a file" if Path(args.offload_dir).exists() else "there is no such directory"
        raise InputError(f"--offload-dir is {args.offload_dir}: {reason}")


def files_read(args: argparse.Namespace) -> dict[str, str | None]:
    """The files that the engine reads, by flag; no output may replace them."""
    return {"--hardware": args.hardware, "--policy": None if args.policy == AUTO else args.policy}


def check_sampling(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for a flag that changes nothing because the likeliest token is chosen anyway."""
    given = {"--top-k": args.top_k > 0, "--top-p": args.top_p < 1, "--seed": args.seed is not None}
    for flag, is_given in given.items():
        if is_given and args.temperature == 0:
            raise InputError(f"{flag} has no effect at temperature 0: give --temperature as well, such as 0.7")


def sampling(args: argparse.Namespace) -> "SamplingParams":
    """The parameters that the flags describe."""
    require_torch()
    from runtime.sampling import SamplingParams

    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "ignore_eos")
    settings: dict[str, Any] = {name: getattr(args, name) for name in names}
    try:
        return SamplingParams(**settings, stop=args.stop)
    except InputError as error:
        name, _, rest = str(error).partition(" ")
        raise InputError(f"--{name.replace('_', '-')} {rest}") from None


@contextmanager
def load_engine(args: argparse.Namespace, *, policy: Policy | None = None, **options: Any) -> "Iterator[LLM]":
    """The engine that the flags describe; ``policy`` stands in for ``--policy auto`` where it is known already.

    ``options`` are further arguments of :class:`runtime.llm.LLM`.
    """
    require_torch()
    with signals.at_once():
        from runtime.llm import LLM

    conversions = progress_bar.Conversions()
    try:
        with LLM(
            args.model,
            policy=args.policy if policy is None else policy,
            hardware=args.hardware,
            gpu_memory=args.gpu_memory,
            cpu_memory=args.cpu_memory,
            offload_dir=args.offload_dir,
            device=args.device,
            dtype=args.dtype,
            trace=args.trace,
            say=say,
            progress=conversions,
            **options,
        ) as engine:
            yield engine
    finally:
        conversions.close()


def prepare(engine: "Engine", workload: Workload) -> "Plan | None":
    """Choose and load; a plan for more tokens than the model has positions is cut."""
    most = engine.max_positions
    if most is not None:
        gen_len = min(workload.gen_len, max(1, most - 1))
        prompt_len = min(workload.prompt_len, max(1, most - gen_len))
        workload = dataclasses.replace(workload, prompt_len=prompt_len, gen_len=gen_len)
    return engine.prepare(workload)


def require_torch() -> None:
    """Say how to install what planning does not need, where it is missing."""
    try:
        with signals.at_once():
            import torch  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise InputError("running a model needs torch: pip install 'tierwise[runtime]'") from None


def say(text: str) -> None:
    """One line for the person at the terminal, beside what goes to standard output."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text[:40]}: a number is expected") from None
