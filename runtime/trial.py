"""A trial: random prompts of one length through an engine, timed when what happens only once has happened."""

import torch

from costmodel.measurement import Measurement
from costmodel.policy import Policy
from costmodel.workload import Workload
from runtime import progress_bar
from runtime.generation import Callbacks, Generation
from runtime.llm import LLM
from runtime.sampling import SamplingParams

SHORT_S, LONG_S = 5.0, 60.0
"""Blocks predicted to take less than the first are run twice, of others under the second a batch is run before. Kernels
compiled for their shapes and memory touched for the first time take 0.1 to 0.2 s, by which a block of half a second was
a third slower the first time; of a minute they are nothing."""

_SEED = 1
_WARM_UP_STEPS = 2


def measure(llm: LLM, workload: Workload, *, title: str) -> Measurement:
    """Run the workload's prompts (default: one block) under the engine's policy, with a bar.

    What warms up is run before, two steps with room for every token, and is not counted.
    """
    plan = llm.prepare(workload)
    block = plan.policy.block_size
    count = block if workload.num_prompts is None else workload.num_prompts
    generator = torch.Generator().manual_seed(_SEED)
    prompts = torch.randint(llm.vocab_size, (count, workload.prompt_len), generator=generator).tolist()
    first = prompts[: warm_up_prompts(plan.policy, plan.predicted.latency_s)]
    if first:
        _run(llm, first, workload.gen_len, title="warming up", most_steps=_WARM_UP_STEPS)
        llm.movers.timeline.clear()
    _run(llm, prompts, workload.gen_len, title=title, most_steps=workload.gen_len)
    assert llm.measurement is not None
    return llm.measurement


def _run(llm: LLM, prompts: list[list[int]], gen_len: int, *, title: str, most_steps: int) -> None:
    params = SamplingParams(max_new_tokens=gen_len, ignore_eos=True)
    with progress_bar.tokens(title) as report:
        tell = Callbacks(on_progress=report)
        llm.complete(
            Generation.of(prompts, params, None, reader=llm, texts=llm.texts, tell=tell, most_steps=most_steps)
        )


def warm_up_prompts(policy: Policy, block_s: float) -> int:
    """How many prompts are run before a block that is predicted to take so long."""
    if block_s < SHORT_S:
        return policy.block_size
    return policy.gpu_batch_size if block_s < LONG_S else 0
