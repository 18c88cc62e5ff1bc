"""Running the policies of a validation one after another, in one process, one engine a policy."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from costmodel import words
from costmodel.measurement import Measurement
from costmodel.policy import Policy
from costmodel.validation import Drawn, Validation
from costmodel.workload import Workload
from runtime import progress_bar
from runtime.llm import LLM
from runtime.memory_release import release
from runtime.sampling import SamplingParams

Engines = Callable[[Policy], AbstractContextManager[LLM]]
Say = Callable[[str], None]

_SEED = 1
_WARM_UP_TOKENS = 2


def run_all(
    validation: Validation, engines: Engines, workload: Workload, *, say: Say, keep: Callable[[Validation], None]
) -> Validation:
    """Run what is left; ``keep`` is told the validation after every run, ``say`` a line of it."""
    count, done = len(validation.drawn), len(validation.measurements)
    if validation.left:
        # What a process does once (threads, kernels chosen at their first call) belongs to no policy.
        _run(validation.left[0].policy.replace(gpu_batch_size=1, num_gpu_batches=1), engines, workload, warm_up=True)
    for number, drawn in enumerate(validation.left, start=done + 1):
        found = _run(drawn.policy, engines, workload)
        validation = validation.with_run(found)
        keep(validation)
        say(run_line(number, count, drawn, found))
    return validation


def run_line(number: int, count: int, drawn: Drawn, found: Measurement) -> str:
    """``" 3/24  predicted 120 token/s, measured 113 (+6 %)  neighbour: half the GPU batch"``."""
    width = len(str(count))
    predicted, measured = (words.number(cost.throughput_tok_per_s) for cost in (found.predicted, found.measured))
    about = f"{drawn.origin}: {drawn.about}" if drawn.about else drawn.origin
    pace = f"predicted {predicted:>6} token/s, measured {measured:>6} ({found.throughput_error * 100:+.0f} %)"
    return f"{number:>{width}}/{count}  {pace}  {about}"


def _run(policy: Policy, engines: Engines, workload: Workload, *, warm_up: bool = False) -> Measurement:
    """One block of random prompts; memory that it held is given back before and after."""
    with _released(), engines(policy) as engine:
        generator = torch.Generator().manual_seed(_SEED)
        size = (policy.block_size, workload.prompt_len)
        prompts = torch.randint(engine.vocab_size, size, generator=generator).tolist()
        most = min(workload.gen_len, _WARM_UP_TOKENS) if warm_up else workload.gen_len
        with progress_bar.tokens("warming up" if warm_up else "running") as report:
            engine.generate(prompts, SamplingParams(max_new_tokens=most, ignore_eos=True), on_progress=report)
        assert engine.measurement is not None
        return engine.measurement


@contextmanager
def _released() -> Iterator[None]:
    release()
    try:
        yield
    finally:
        release()
