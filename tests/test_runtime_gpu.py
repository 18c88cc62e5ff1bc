"""The runtime on CUDA: the same answers, in fp16 and bf16, within the stated memory. ``make test-gpu`` runs it."""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from test_runtime_execute import LAYOUTS, kept, reference

from costmodel.policy import Policy, Split
from costmodel.units import GiB
from runtime import LLM, SamplingParams
from runtime.execute import BlockRun
from runtime.image import open_image
from runtime.movers import Movers
from runtime.timeline import Timeline
from runtime.weights import Weights
from tests.runs import VOCABULARY, batches_of, policies, prompt_lists, relative_rmse, theirs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
"""Relative error of logits against transformers in fp32 on a CPU: what 10 and 7 bits leave after a few layers."""


def on_cuda(model: str, policy: Policy, directory: Path, prompts: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Logits of the first token and of the one after it, which is the first in the vocabulary for all."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    batches = batches_of(prompts, policy.gpu_batch_size)

    def choose(batch: int, logits: torch.Tensor, step: int) -> torch.Tensor:
        found[batch, step] = logits.float().cpu()
        return logits.argmax(-1)

    image = open_image(model, directory=directory, dtype=dtype, compressed=policy.compress_weights)
    timeline = Timeline()
    with Movers(torch.device("cuda", 0), timeline=timeline, overlap=policy.overlap, chunk_bytes=4096) as movers:
        weights = Weights(image, policy.weights, movers)
        weights.fill()
        options = {"weights": weights, "policy": policy, "movers": movers, "directory": directory}
        with BlockRun(batches, gen_len=3, **options) as run:
            run.run(choose)
    return torch.cat([found[batch, 0] for batch in range(len(batches))])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists)
def test_any_policy_gives_the_logits_of_transformers(
    layout: str, dtype: torch.dtype, models: Path, policy: Policy, prompts: list[list[int]]
) -> None:
    expected, _ = theirs(reference(layout), prompts, 1)
    logits = on_cuda(kept(layout, models), policy, models, prompts, dtype)
    assert relative_rmse(logits, expected[:, 0]) < TOLERANCE[dtype]


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(policy=policies, prompts=prompt_lists)
def test_4_bit_storage_runs_under_any_policy(models: Path, policy: Policy, prompts: list[list[int]]) -> None:
    packed = policy.replace(compress_weights=True, compress_cache=True)
    logits = on_cuda(kept("pre-norm", models), packed, models, prompts, torch.float16)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_memory_stays_within_the_budget(dtype: str, tmp_path: Path) -> None:
    """By the allocator's count and by the device's own, with a model twice the budget."""
    budget = 1 * GiB
    free_before = torch.cuda.mem_get_info()[0]
    with LLM(
        "dummy:opt-1.3b", gpu_memory=budget, cpu_memory="4GiB", offload_dir=tmp_path, device="cuda", dtype=dtype
    ) as llm:
        prompts = torch.randint(VOCABULARY, (16, 64)).tolist()
        llm.generate(prompts, SamplingParams(max_new_tokens=8, ignore_eos=True))
        found = llm.measurement
        taken = free_before - torch.cuda.mem_get_info()[0]
    assert found is not None
    assert found.measured.peak_bytes["gpu"] <= budget
    assert found.measured.peak_bytes["gpu"] == pytest.approx(found.predicted.peak_bytes["gpu"], rel=0.05)
    assert taken <= budget + 0.6 * GiB  # CUDA's context and libraries


def test_the_measured_resources_are_all_told(tmp_path: Path) -> None:
    policy = Policy(
        weights=Split(gpu=0.2, cpu=0.4, disk=0.4),
        cache=Split(gpu=0.4, cpu=0.3, disk=0.3),
        activations=Split(gpu=1, cpu=0, disk=0),
        gpu_batch_size=4,
        num_gpu_batches=2,
    )
    with LLM("dummy:opt-125m", policy=policy, offload_dir=tmp_path, device="cuda") as llm:
        llm.generate([[5] * 32] * 8, SamplingParams(max_new_tokens=4, ignore_eos=True))
        assert llm.measurement is not None
        busy = llm.measurement.measured.busy_s["decode"]
    assert all(busy[name] > 0 for name in ("gpu_compute", "cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write"))
