"""Running the policies of a validation one after another, each in a process of its own."""

import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from costmodel import units, words
from costmodel.estimate import estimate
from costmodel.measurement import Measurement
from costmodel.model import BYTES_PER_VALUE
from costmodel.policy import Policy
from costmodel.shared_cache import ORIGIN_KEY
from costmodel.validation import Drawn, Validation
from costmodel.workload import Workload
from runtime import own_process, trial
from runtime.llm import LLM
from runtime.shared_cache import Watch

Engines = Callable[[Policy], AbstractContextManager[LLM]]
"""An engine for a policy; made in another process, so that it must be possible to pickle this."""

Say = Callable[[str], None]

FIRST_PACE = 1.5
"""By how much runs may take longer than expected, until the first of a process has shown it."""


START_S = 1.0
"""What a process takes to start, the first one longer; on CUDA most of it is the device's."""


class TimeLimit:
    """Whether the next run still ends within ``seconds`` from now on."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self._end, self._now = now() + seconds, now
        self._slowest: float | None = None

    def allows(self, expected_s: float) -> bool:
        """Whether there is time for a run of so many seconds, at the pace of the slowest one so far."""
        pace = FIRST_PACE if self._slowest is None else max(1.0, self._slowest)
        return self._now() + pace * expected_s <= self._end

    def learn(self, expected_s: float, took_s: float) -> None:
        """What a run took beside what was expected."""
        self._slowest = max(self._slowest or 0.0, took_s / expected_s)


def run_all(
    validation: Validation,
    engines: Engines,
    workload: Workload,
    *,
    say: Say,
    keep: Callable[[Validation], None],
    limit: TimeLimit | None = None,
) -> Validation:
    """Run what is left, up to the limit; ``keep`` is told the validation after every run, ``say`` a line of it.

    Where the cores that compute are the host's, it is recorded whether they share a cache: of some runs that are made
    again.
    """
    expect = None
    with Watch() if validation.hardware.gpu.is_host_memory else nullcontext() as watch:
        while validation.left:
            drawn = validation.left[0]
            if limit is not None and expect is None:
                expect = _expectation(drawn.policy, engines, workload)
            expected_s = 0.0 if expect is None else expect(drawn.policy)
            if limit is not None and not limit.allows(expected_s):
                say(f"no time is left for the next run, which should take {units.format_seconds(expected_s)}")
                break
            began = time.monotonic()
            found, ended = own_process.call(_run, drawn.policy, engines, workload)
            if limit is not None:
                limit.learn(expected_s, time.monotonic() - began)
            if watch is not None:
                rates = watch.between(ended - sum(map(sum, found.block_s)), ended)
                found = dataclasses.replace(found, origin={**found.origin, ORIGIN_KEY: [round(rate) for rate in rates]})
            validation = validation.with_run(found)
            keep(validation)
            say(run_line(len(validation.runs), validation.planned, drawn, found))
    return validation


def _expectation(any_policy: Policy, engines: Engines, workload: Workload) -> Callable[[Policy], float]:
    """Seconds of a policy's run: a process starts, weights that stay in memory are read, then what warms up and the
    block are run."""
    with engines(any_policy) as engine:
        model, hardware = engine.spec, engine.hardware
        wider = engine.dtype.itemsize / BYTES_PER_VALUE

    def expected_s(policy: Policy) -> float:
        cost = estimate(policy, hardware=hardware, model=model, workload=workload)
        layers = model.num_layers * model.layer_weight_bytes(compressed=policy.compress_weights)
        kept = (model.embedding_bytes + model.head_bytes + layers) * (1 - policy.weights.disk) * wider
        loading_s = kept / hardware.links.disk_read.bytes_per_s.effective
        before = trial.warm_up_prompts(policy, cost.latency_s) / policy.block_size
        return START_S + loading_s + (1 + before) * cost.latency_s

    return expected_s


def run_line(number: int, count: int, drawn: Drawn, found: Measurement) -> str:
    """``" 3/24  predicted 120 token/s, measured 113 (+6 %)  neighbour: half the GPU batch"``."""
    width = len(str(count))
    predicted, measured = (words.number(cost.throughput_tok_per_s) for cost in (found.predicted, found.measured))
    about = f"{drawn.origin}: {drawn.about}" if drawn.about else drawn.origin
    error = words.signed_percent(found.throughput_error, 0)
    pace = f"predicted {predicted:>6} token/s, measured {measured:>6} ({error})"
    return f"{number:>{width}}/{count}  {pace}  {about}"


def _run(policy: Policy, engines: Engines, workload: Workload) -> tuple[Measurement, float]:
    """One block of random prompts, and when it ended by the clock that all processes share."""
    with engines(policy) as engine:
        found = trial.measure(engine, workload, title="running")
        return found, time.monotonic()
