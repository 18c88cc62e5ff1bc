"""The batch shape that fits, against every shape tried one by one; plans for values of more than 16 bits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel import words
from costmodel.errors import InfeasibleError
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import Policy, Split
from costmodel.units import GiB
from costmodel.workload import Workload
from runtime.plan import Planner

MODEL = ModelSpec.from_catalog("opt-125m")


def planner(gpu_bytes: float, *, name: str = "cpu-laptop", itemsize: int = 2) -> Planner:
    hardware = Hardware.from_catalog(name).replace("gpu.memory_bytes", gpu_bytes, source="this test")
    return Planner(hardware, MODEL, itemsize=itemsize, usable_fraction=1.0)


def policy(size: int, batches: int, on_gpu: float = 1.0) -> Policy:
    split = Split(gpu=on_gpu, cpu=0.0, disk=1.0 - on_gpu)
    return Policy(weights=split, cache=split, activations=split, gpu_batch_size=size, num_gpu_batches=batches)


@settings(max_examples=40)
@given(
    size=st.integers(1, 17),
    batches=st.integers(1, 6),
    num_prompts=st.integers(1, 80) | st.none(),
    prompt_len=st.sampled_from([16, 128, 200, 300, 1500]),
    mib=st.sampled_from([300, 400, 600, 1200]),
    on_gpu=st.sampled_from([1.0, 0.6, 0.0]),
)
def test_the_largest_shape_that_fits_is_found(
    size: int, batches: int, num_prompts: int | None, prompt_len: int, mib: int, on_gpu: float
) -> None:
    """Fewer batches first, then smaller ones, each tried with a whole estimate."""
    plans, start = planner(mib * 2**20), policy(size, batches, on_gpu)
    workload = Workload(prompt_len=prompt_len, gen_len=20, num_prompts=num_prompts)
    prompts = num_prompts or size * batches
    size = min(size, prompts)
    tried = [(size, fewer) for fewer in range(min(batches, -(-prompts // size)), 0, -1)]
    tried += [(smaller, 1) for smaller in range(size - 1, 0, -1)]
    fits = [
        shape
        for shape in tried
        if plans.estimate(start.replace(gpu_batch_size=shape[0], num_gpu_batches=shape[1]), workload).feasible
    ]
    if fits:
        found = plans.fitted(start, workload)
        assert (found.gpu_batch_size, found.num_gpu_batches) == fits[0]
        assert fits == tried[len(tried) - len(fits) :]  # every smaller shape fits as well
    else:
        message = f"one prompt of {words.counted(prompt_len, 'token')} with 20 to generate does not fit"
        with pytest.raises(InfeasibleError, match=message):
            plans.fitted(start, workload)


def test_wider_values_fill_a_tier_with_half_as_many() -> None:
    """opt-125m's 16-bit weights fit 300 MiB, its 32-bit ones do not; the bytes told are those of the type."""
    workload = Workload(prompt_len=16, gen_len=4, num_prompts=1)
    narrow, wide = (planner(0.35 * GiB, itemsize=itemsize).estimate(policy(1, 1), workload) for itemsize in (2, 4))
    assert (narrow.violations, wide.violations) == ((), ("gpu",))
    assert wide.peak_bytes["gpu"] == pytest.approx(2 * narrow.peak_bytes["gpu"])
    assert wide.limit_bytes["gpu"] == pytest.approx(0.35 * GiB)
