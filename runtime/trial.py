"""A trial: random prompts of one length through an engine, timed when what happens only once has happened."""

import torch

from costmodel.measurement import Measurement
from costmodel.workload import Workload
from runtime import progress_bar
from runtime.llm import LLM
from runtime.sampling import SamplingParams

SHORT_S = 5.0
"""Blocks predicted to take less are warmed up: kernels compiled for their shapes and memory touched for the first time
take 0.1 to 0.2 s, by which a block of half a second was a third slower the first time."""

_SEED = 1
_WARM_UP_TOKENS = 2


def measure(llm: LLM, workload: Workload, *, title: str, warm_up: bool = False) -> Measurement:
    """Run the workload's prompts (default: one block) under the engine's policy, with a bar.

    A short block is run before up to the second new token, and that is not counted; so is any with ``warm_up``.
    """
    plan = llm.prepare(workload)
    block = plan.policy.block_size
    count = block if workload.num_prompts is None else workload.num_prompts
    generator = torch.Generator().manual_seed(_SEED)
    prompts = torch.randint(llm.vocab_size, (count, workload.prompt_len), generator=generator).tolist()
    if warm_up or is_short(plan.predicted.latency_s):
        first = SamplingParams(max_new_tokens=min(workload.gen_len, _WARM_UP_TOKENS), ignore_eos=True)
        with progress_bar.tokens("warming up") as report:
            llm.generate(prompts[:block], first, on_progress=report)
        llm.movers.timeline.clear()
    with progress_bar.tokens(title) as report:
        llm.generate(prompts, SamplingParams(max_new_tokens=workload.gen_len, ignore_eos=True), on_progress=report)
    assert llm.measurement is not None
    return llm.measurement


def is_short(block_s: float) -> bool:
    """Whether a block predicted to take so long is run twice."""
    return block_s < SHORT_S
