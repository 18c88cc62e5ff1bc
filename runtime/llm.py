"""LLM: a model under a policy, ready to continue prompts.

>>> from runtime import LLM, SamplingParams
>>> with LLM("facebook/opt-6.7b", gpu_memory="14GiB", cpu_memory="100GiB", offload_dir="/mnt/nvme") as llm:
...     llm.generate(["Paris is the capital of"], SamplingParams(max_new_tokens=32))
"""

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

from torch import Tensor

from costmodel.errors import InputError
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.model import ModelSpec
from costmodel.policy import Policy
from costmodel.workload import Workload
from runtime import environment, run_report, settings, tiers, tokens
from runtime.engine import Prompt
from runtime.generation import Callbacks, Generation, Texts
from runtime.image import Image, open_image
from runtime.loaded import Loaded, Resident
from runtime.machine import USABLE_FRACTION, machine
from runtime.measure import Meter
from runtime.movers import Movers
from runtime.plan import Plan, Planner
from runtime.sampling import SamplingParams
from runtime.sequences import Completion
from runtime.settings import AUTO, GivenPolicy
from runtime.timeline import Timeline

LOGGER = logging.getLogger("tierwise")

Say = Callable[[str], None]


class LLM:
    """A model whose weights, KV cache and activations lie where a policy says.

    ``model`` is a checkpoint's folder, a name on the Hugging Face hub, or ``dummy:opt-6.7b`` for random
    weights. ``policy`` is a :class:`Policy`, the file of one or its content, or ``"auto"``: the best for the first
    prompts (or for ``workload``, if that is given) is searched on ``hardware``, which is a file that the
    profiler wrote, or else a quick profile of this machine. ``gpu_memory`` and ``cpu_memory`` are budgets
    such as ``"14GiB"`` (by default what is free); without a GPU the first one is host memory.
    ``offload_dir`` is on the disk that is the third tier; converted models are kept there as well.
    ``fixed`` holds arguments of :func:`costmodel.search.search` that restrict policy ``"auto"``
    (``gpu_batch_size``, ``num_gpu_batches``, ``splits``, ``switches``); lossy 4-bit storage is not
    searched unless its switches say so. ``usable_fraction`` of each budget is planned with.

    ``say`` is told what goes on, one sentence at a time, the policy and its prediction before they are run
    (by default the logger ``tierwise`` is told); ``progress(what, done, total)`` counts the bytes
    of a conversion. Use as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        policy: GivenPolicy = AUTO,
        hardware: Hardware | str | os.PathLike[str] | None = None,
        gpu_memory: str | float | None = None,
        cpu_memory: str | float | None = None,
        offload_dir: str | os.PathLike[str] | None = None,
        device: str = "auto",
        dtype: str | None = None,
        workload: Workload | None = None,
        fixed: Mapping[str, Any] | None = None,
        usable_fraction: float = USABLE_FRACTION,
        trace: str | os.PathLike[str] | None = None,
        say: Say | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self._say: Say = say or LOGGER.info
        self._progress, self._trace = progress, trace
        self._given, self._fixed = settings.read_policy(policy), dict(fixed or {})
        if self._given is not None and self._fixed:
            raise InputError(f"{', '.join(self._fixed)} cannot take effect: the policy is given")
        self.device = tiers.select_device(device)
        self.dtype = settings.read_dtype(dtype, self.device)
        self._directory = settings.offload_directory(offload_dir)
        self._model = os.fspath(model)
        self.name, config, folder = settings.describe_model(self._model)
        self.spec = ModelSpec.from_config(config, name=self.name)
        self.tokenizer: Any | None = tokens.tokenizer(folder)
        self.hardware = machine(
            hardware,
            device=self.device,
            offload_dir=self._directory,
            config=config,
            gpu_memory=settings.read_budget("gpu_memory", gpu_memory),
            cpu_memory=settings.read_budget("cpu_memory", cpu_memory),
            say=self._say,
        )
        self._planner = Planner(self.hardware, self.spec, itemsize=self.dtype.itemsize, usable_fraction=usable_fraction)
        eos, pad = tokens.special_tokens(config, folder)
        self.texts = Texts(eos_token_ids=eos, pad_token_id=pad, tokenizer=self.tokenizer)
        self._timeline = Timeline(trace=trace is not None)
        self._closed = False
        self._loaded: Loaded | None = None
        self.plan: Plan | None = None
        self.measurement: Measurement | None = None
        if workload is not None:
            self.prepare(workload)

    # -------------------------------------------------------------- describing

    @property
    def policy(self) -> Policy:
        """The policy that is run; :class:`InputError` before there is one (see :meth:`prepare`)."""
        if self.plan is not None:
            return self.plan.policy
        if self._given is not None:
            return self._given
        raise InputError("policy 'auto' is chosen when the first prompts are known: give a workload to choose it now")

    @cached_property
    def image(self) -> Image:
        """The converted model on disk."""
        return open_image(
            self._model,
            directory=self._directory,
            dtype=self.dtype,
            compressed=self.policy.compress_weights,
            progress=self._progress,
        )

    @property
    def movers(self) -> Movers:
        """What carries the bytes; :class:`InputError` before :meth:`prepare`."""
        if self._loaded is None:
            raise InputError("nothing is loaded yet: call prepare or generate first")
        return self._loaded.movers

    @property
    def max_positions(self) -> int | None:
        """The most tokens of prompt and completion together, if the model has a limit."""
        return self.spec.max_positions

    @property
    def vocab_size(self) -> int:
        """Token ids lie below this."""
        return self.spec.vocab_size

    def describe(self) -> dict[str, Any]:
        """Whatever decides the answers: the model's content, the type and the policy."""
        return {
            "model": self._model,
            "image": self.image.path.parent.name,
            "dtype": settings.dtype_name(self.dtype),
            "device": self.device.type,
            "policy": self.policy.to_dict(),
        }

    # --------------------------------------------------------------- preparing

    def prepare(self, workload: Workload) -> Plan:
        """Choose the policy for such prompts (unless it was given), refuse what does not fit, load the weights.

        Nothing is allocated before it is known to fit. Called by :meth:`generate` with its own prompts;
        a second call changes nothing.
        """
        if self._closed:
            raise InputError("this LLM is closed: make another one")
        if self.plan is not None:
            return self.plan
        policy = self._given or self._planner.best(workload, self._fixed, self._say)
        plan = self._planner.plan(policy, workload)
        for line in run_report.plan_lines(plan):
            self._say(line)
        self.plan = plan
        try:
            self._loaded = Loaded.load(
                self.image,
                plan.policy,
                device=self.device,
                hardware=self.hardware,
                timeline=self._timeline,
                say=self._say,
            )
        except BaseException:
            self.plan = None
            raise
        return plan

    # -------------------------------------------------------------- generating

    @overload
    def generate(self, prompts: Tensor, **options: Any) -> Tensor: ...

    @overload
    def generate(self, *, input_ids: Tensor, **options: Any) -> Tensor: ...

    @overload
    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] = ...,
        *,
        keys: Sequence[int] | None = ...,
        on_block: Callable[[Sequence[int], Sequence[Completion]], None] | None = ...,
        on_text: Callable[[int, str], None] | None = ...,
        on_token: Callable[[int, int], None] | None = ...,
        on_progress: Callable[[int, int], None] | None = ...,
    ) -> list[Completion]: ...

    def generate(self, prompts: Any = None, params: Any = None, **options: Any) -> Any:
        """Continue every prompt (a text, or token ids); results in the order of the prompts.

        ``params`` are the same for all, or one for each. ``keys`` number the prompts for their random
        numbers (by default their place). ``on_block(indices, completions)`` is called after every block,
        ``on_text(index, piece)`` as text comes, ``on_token(index, token)`` with every token, the last
        end-of-sequence token included, ``on_progress(new tokens, most)`` after every step.

        With a tensor of token ids (also as ``input_ids=``) it behaves as transformers' ``generate`` does: see
        :func:`runtime.huggingface_style.generate`.
        """
        if prompts is not None and "input_ids" in options:
            raise InputError("generate takes prompts or input_ids, not both")
        given = options.pop("input_ids", prompts)
        if given is None:
            raise InputError("generate needs prompts, or input_ids")
        if isinstance(given, Tensor):
            from runtime import huggingface_style

            if params is not None:
                raise InputError("params cannot take effect with a tensor: give max_new_tokens, do_sample and so on")
            _check_options(options, huggingface_style.generate)
            return huggingface_style.generate(self, given, **options)
        _check_options(options, self._generate)
        return self._generate(given, SamplingParams() if params is None else params, **options)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams],
        *,
        keys: Sequence[int] | None = None,
        on_block: Callable[[Sequence[int], Sequence[Completion]], None] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        tell = Callbacks(on_block=on_block, on_text=on_text, on_token=on_token, on_progress=on_progress)
        return self.complete(Generation.of(prompts, params, keys, reader=self, texts=self.texts, tell=tell))

    def complete(self, job: Generation) -> list[Completion]:
        """Run a job whose prompts have been checked; results in the order of its prompts."""
        if not job.prompts:
            return []
        self.prepare(job.workload)
        self.measurement = self._run(job)
        return job.results

    def _run(self, job: Generation) -> Measurement:
        """Run one block after another; what that took, beside what is predicted for it."""
        assert self._loaded is not None
        meter, resident, workload = Meter(self._timeline), Resident(), job.workload
        for block in job.shared_out(self.policy.block_size, lambda some: self._planner.fitted(self.policy, some)):
            times, resident = job.run(block, self._loaded, self.policy, self._directory)
            meter.add(times)
        shape = self._planner.fitted(self.policy, workload)
        predicted = self._planner.estimate(shape, workload)
        peaks, limits = self._loaded.peak_bytes(resident), predicted.limit_bytes
        return Measurement(
            model=self.spec,
            dtype=settings.dtype_name(self.dtype),
            workload=workload,
            policy=shape,
            hardware=self.hardware.name,
            predicted=predicted,
            measured=meter.estimate(job.num_generated, peaks, limits, prompts=len(job.prompts)),
            block_s=tuple((block.prefill_s, block.decode_s) for block in meter.blocks),
            resident_bytes=resident,
            origin=self._origin,
        )

    @cached_property
    def _origin(self) -> dict[str, Any]:
        """What measurements are taken on; programs are run to find out, so once."""
        return environment.describe(self.device, self._directory)

    # ----------------------------------------------------------------- closing

    def close(self) -> None:
        """End every thread, give all memory and files back, and write the trace if one was asked for."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded, self._closed = None, True
        if self._trace is not None:
            self._timeline.save(self._trace)
            self._trace = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_options(options: Mapping[str, Any], function: Callable[..., object]) -> None:
    """Raise :class:`InputError` for an argument that ``generate`` does not have."""
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            likely = ", ".join(other for other in known if other not in ("llm", "input_ids", "prompts"))
            raise InputError(f"generate has no argument {name!r}: it takes {likely}")
