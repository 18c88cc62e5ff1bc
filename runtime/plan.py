"""Plans: the policy that a model is run under, and what the cost model predicts for it in the run's type of values."""

import bisect
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from costmodel import words
from costmodel.errors import InfeasibleError
from costmodel.estimate import Estimate, estimate
from costmodel.hardware import Hardware, quantities
from costmodel.model import BYTES_PER_VALUE, ModelSpec
from costmodel.overrides import GIVEN
from costmodel.policy import Policy
from costmodel.search import search
from costmodel.workload import Workload

LOSSLESS = {"compress_weights": False, "compress_cache": False}
"""What policy "auto" does unless it is told otherwise: no answer should be worse than the model."""


_DECIDED = {"splits", "gpu_batch_size", "num_gpu_batches"}
"""Arguments of the search which together leave it nothing to decide but switches that are not given."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The policy that is run, for which prompts it was chosen, and what it is predicted to cost."""

    policy: Policy
    workload: Workload
    predicted: Estimate


class Planner:
    """Plans for one model on one machine, whose values have ``itemsize`` bytes in memory.

    The cost model counts 16 bits a value. For wider values it is shown a machine with as much less memory and
    bandwidth, and the bytes of its answers are scaled back.
    """

    def __init__(self, hardware: Hardware, model: ModelSpec, *, itemsize: int, usable_fraction: float) -> None:
        self._hardware, self._model, self._usable_fraction = for_values_of(hardware, itemsize), model, usable_fraction
        self._wider = itemsize / BYTES_PER_VALUE

    def best(self, workload: Workload, fixed: Mapping[str, Any], say: Callable[[str], None]) -> Policy:
        """The policy with the highest throughput; ``fixed`` are arguments of the search, which compresses nothing
        unless they say so."""
        searched = _DECIDED - fixed.keys()
        say(
            f"{'searching the best' if searched else 'checking the given'} policy for {self._model.name} "
            f"on {self._hardware.name}"
        )
        # The number of prompts is known only for now: the policy serves whatever comes.
        found = search(
            hardware=self._hardware,
            model=self._model,
            workload=workload,
            usable_fraction=self._usable_fraction,
            with_prices=False,
            **{**fixed, "switches": {**LOSSLESS, **fixed.get("switches", {})}},
        )
        return found.policy

    def plan(self, policy: Policy, workload: Workload) -> Plan:
        """The plan of a policy; :class:`InfeasibleError` where it does not fit."""
        predicted = self.estimate(policy, workload)
        if predicted.violations:
            raise InfeasibleError(
                f"this policy does not fit: {'; '.join(words.excess(predicted))} (raise gpu_memory or cpu_memory, "
                "shrink the batch, or let the search choose with policy 'auto')"
            )
        return Plan(policy=policy, workload=workload, predicted=predicted)

    def estimate(self, policy: Policy, workload: Workload) -> Estimate:
        """What the cost model predicts, in bytes of the type that is computed in."""
        found = estimate(
            policy,
            hardware=self._hardware,
            model=self._model,
            workload=workload,
            usable_fraction=self._usable_fraction,
        )
        peaks, limits, moved = (
            {key: value * self._wider for key, value in one.items()}
            for one in (found.peak_bytes, found.limit_bytes, found.bytes_moved)
        )
        return dataclasses.replace(found, peak_bytes=peaks, limit_bytes=limits, bytes_moved=moved)

    def fitted(self, policy: Policy, workload: Workload) -> Policy:
        """The policy with its batch shape made to fit these prompts: fewer than planned, or longer ones.

        Fewer batches are tried first, then a smaller one. Every peak is a sum of terms that are constant or grow with
        the batch or with the number of batches, so that along this row all shapes up to one fit and none after it.
        """
        count = workload.num_prompts or policy.block_size
        size = min(policy.gpu_batch_size, count)
        shapes = [(fewer, 1) for fewer in range(1, size)]
        shapes += [(size, batches) for batches in range(1, min(policy.num_gpu_batches, -(-count // size)) + 1)]

        def exceeds(shape: tuple[int, int]) -> bool:
            return bool(self.estimate(_shaped(policy, shape), workload).violations)

        if not exceeds(shapes[-1]):
            return _shaped(policy, shapes[-1])
        fitting = bisect.bisect_left(shapes, True, hi=len(shapes) - 1, key=exceeds)
        if fitting == 0:
            told = "; ".join(words.excess(self.estimate(_shaped(policy, (1, 1)), workload)))
            tokens = f"{words.counted(workload.prompt_len, 'token')} with {workload.gen_len:,} to generate"
            raise InfeasibleError(f"one prompt of {tokens} does not fit beside the weights of this policy: {told}")
        return _shaped(policy, shapes[fitting - 1])


def _shaped(policy: Policy, shape: tuple[int, int]) -> Policy:
    """The policy with another (GPU batch size, number of GPU batches)."""
    return policy.replace(gpu_batch_size=shape[0], num_gpu_batches=shape[1])


_BYTES = (
    "gpu.memory_bytes",
    "cpu.memory_bytes",
    "disk.memory_bytes",
    "gpu.memory_bytes_per_s",
    "links.cpu_to_gpu.bytes_per_s",
    "links.gpu_to_cpu.bytes_per_s",
    "links.disk_read.bytes_per_s",
    "links.disk_write.bytes_per_s",
)


def for_values_of(hardware: Hardware, itemsize: int) -> Hardware:
    """The machine in the eyes of a plan that counts 16 bits a value, where values really have ``itemsize`` bytes.

    Half as much memory holds as many values of twice the size, and half the bandwidth moves as many.
    """
    if itemsize == BYTES_PER_VALUE:
        return hardware
    values = {path: quantity.effective for path, quantity in quantities(hardware)}
    for path in _BYTES:
        hardware = hardware.replace(path, values[path] * BYTES_PER_VALUE / itemsize, source=GIVEN)
    return hardware
