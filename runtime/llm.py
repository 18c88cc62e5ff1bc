"""LLM: a model under a policy, ready to continue prompts.

>>> from runtime import LLM, SamplingParams
>>> with LLM("facebook/opt-6.7b", gpu_memory="14GiB", cpu_memory="100GiB", offload_dir="/mnt/nvme") as llm:
...     llm.generate(["Paris is the capital of"], SamplingParams(max_new_tokens=32))
"""

import dataclasses
import inspect
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from costmodel import units, words
from costmodel.errors import InfeasibleError, InputError
from costmodel.estimate import Estimate, check_workload, estimate
from costmodel.formulations import get
from costmodel.hardware import Hardware
from costmodel.measurement import Measurement
from costmodel.model import BYTES_PER_VALUE, ModelSpec
from costmodel.policy import Policy
from costmodel.search import search
from costmodel.workload import Workload
from runtime import dummy, environment, run_report, tiers, tokens
from runtime.blocks import Block, block_of, in_order, padded
from runtime.checkpoint import open_checkpoint
from runtime.execute import BlockRun, BlockTimes
from runtime.image import Image, open_image
from runtime.machine import USABLE_FRACTION, for_values_of, machine
from runtime.measure import Meter
from runtime.memory_watch import MemoryWatch
from runtime.movers import Movers
from runtime.sampling import Sampler, SamplingParams
from runtime.sequences import Completion, Sequences
from runtime.timeline import Timeline
from runtime.weights import Weights

LOGGER = logging.getLogger("tierwise")

AUTO = "auto"

LOSSLESS = {"compress_weights": False, "compress_cache": False}
"""What policy "auto" does unless it is told otherwise: no answer should be worse than the model."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Prompt = str | Sequence[int]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The policy that is run, for which prompts it was chosen, and what it is predicted to cost."""

    policy: Policy
    workload: Workload
    predicted: Estimate


class LLM:
    """A model whose weights, KV cache and activations lie where a policy says.

    ``model`` is a checkpoint's folder, a name on the Hugging Face hub, or ``dummy:opt-6.7b`` for random
    weights. ``policy`` is a :class:`Policy`, the file of one, or ``"auto"``: the best one for the first
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
        policy: Policy | str | os.PathLike[str] = AUTO,
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
        self.device = tiers.select_device(device)
        self.dtype = _dtype(dtype, self.device)
        self._directory = _offload_directory(offload_dir)
        self._model = os.fspath(model)
        self.name, config, folder = _described(self._model)
        self.spec = ModelSpec.from_config(config, name=self.name)
        self.tokenizer: Any | None = tokens.tokenizer(folder)
        self.hardware = machine(  # the machine as it is; plans are made for values of this type
            hardware,
            device=self.device,
            offload_dir=self._directory,
            config=config,
            gpu_memory=_bytes("gpu_memory", gpu_memory),
            cpu_memory=_bytes("cpu_memory", cpu_memory),
            say=self._say,
        )
        self._planned = for_values_of(self.hardware, self.dtype.itemsize)
        self._eos, self.pad_token_id = tokens.special_tokens(config, folder)
        self._given = policy if isinstance(policy, Policy) else None
        if not isinstance(policy, Policy) and os.fspath(policy) != AUTO:
            self._given = Policy.from_file(policy)
        self._fixed, self._usable_fraction = dict(fixed or {}), usable_fraction
        if self._given is not None and self._fixed:
            raise InputError(f"{', '.join(self._fixed)} cannot take effect: the policy is given")
        self._fixed["switches"] = {**LOSSLESS, **self._fixed.get("switches", {})}
        self._closed = False
        self.plan: Plan | None = None
        self._movers: Movers | None = None
        self._weights: Weights | None = None
        self._image: Image | None = None
        self.measurement: Measurement | None = None
        self._timeline = Timeline(trace=trace is not None)
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

    @property
    def image(self) -> Image:
        """The converted model on disk."""
        return self._opened()

    @property
    def movers(self) -> Movers:
        """What carries the bytes; :class:`InputError` before :meth:`prepare`."""
        if self._movers is None:
            raise InputError("nothing is loaded yet: call prepare or generate first")
        return self._movers

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
        image = self._opened()
        return {
            "model": self._model,
            "image": image.path.parent.name,
            "dtype": str(self.dtype).removeprefix("torch."),
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
        check_workload(get("roofline"), self.hardware, self.spec, workload)
        if self._given is None:
            self._say(f"searching the best policy for {self.name} on {self.hardware.name}")
            # The number of prompts is known only for now: the policy serves whatever comes.
            found = search(
                hardware=self._planned,
                model=self.spec,
                workload=workload,
                usable_fraction=self._usable_fraction,
                with_prices=False,
                **self._fixed,
            )
            policy = found.policy
        else:
            policy = self._given
        plan = Plan(policy=policy, workload=workload, predicted=self._estimate(policy, workload))
        if plan.predicted.violations:
            told = "; ".join(words.excess(plan.predicted))
            raise InfeasibleError(
                f"this policy does not fit: {told} (raise gpu_memory or cpu_memory, shrink the batch, or let the "
                "search choose with policy 'auto')"
            )
        for line in run_report.plan_lines(plan):
            self._say(line)
        self.plan = plan
        try:
            self._place(plan)
        except BaseException:
            self.plan = None
            raise
        return plan

    def _estimate(self, policy: Policy, workload: Workload) -> Estimate:
        found = estimate(
            policy,
            hardware=self._planned,
            model=self.spec,
            workload=workload,
            usable_fraction=self._usable_fraction,
        )
        wider = self.dtype.itemsize / BYTES_PER_VALUE
        peaks, limits, moved = (
            {key: value * wider for key, value in one.items()}
            for one in (found.peak_bytes, found.limit_bytes, found.bytes_moved)
        )
        return dataclasses.replace(found, peak_bytes=peaks, limit_bytes=limits, bytes_moved=moved)

    def _opened(self) -> Image:
        if self._image is None:
            compressed = self.policy.compress_weights
            self._image = open_image(
                self._model, directory=self._directory, dtype=self.dtype, compressed=compressed, progress=self._progress
            )
        return self._image

    def _place(self, plan: Plan) -> None:
        image = self._opened()
        self._watch = MemoryWatch(self.device)
        settings = _disk_settings(self.hardware)
        self._movers = Movers(
            self.device,
            timeline=self._timeline,
            overlap=plan.policy.overlap,
            copy_threads=1 if self.device.type == "cuda" else environment.usable_cores(),
            **settings,
        )
        try:
            self._weights = Weights(image, plan.policy.weights, self._movers)
            self._say(f"loading {units.format_bytes(sum(self._weights.bytes_on.values()))} of weights")
            self._weights.fill()
        except BaseException:
            self._movers.close()
            raise

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
        given = options.pop("input_ids", prompts)
        if given is None:
            raise InputError("generate needs prompts, or input_ids")
        if isinstance(given, Tensor):
            from runtime import huggingface_style

            _check_options(options, huggingface_style.generate)
            return huggingface_style.generate(self, given, **options)
        _check_options(options, self._generate)
        return self._generate(prompts, SamplingParams() if params is None else params, **options)

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
        if isinstance(prompts, str):
            raise InputError("prompts is one text: a list of prompts is expected")
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise InputError(f"params has {len(each)} entries for {len(prompts)} prompts: give one, or one for each")
        if not prompts:
            return []
        ids = tokens.token_ids(prompts, self.tokenizer, self.spec, [one.max_new_tokens for one in each])
        prompt_lens, gen_lens = [len(prompt) for prompt in ids], [one.max_new_tokens for one in each]
        workload = Workload(prompt_len=max(prompt_lens), gen_len=max(gen_lens), num_prompts=len(prompts))
        self.prepare(workload)
        job = _Job(ids, each, list(keys) if keys is not None else list(range(len(prompts))))
        job.on_text, job.on_token, job.on_progress = on_text, on_token, on_progress
        meter = Meter(self._timeline)
        for block in self._blocks(prompt_lens, gen_lens):
            meter.add(self._run_block(block, job))
            if on_block is not None:
                on_block(block.indices, [job.completions[index] for index in block.indices])
        generated = sum(len(done.token_ids) for done in job.completions.values())
        self.measurement = self._measured(meter, self._fitting(workload), workload, generated)
        return [job.completions[index] for index in range(len(prompts))]

    def _blocks(self, prompt_lens: Sequence[int], gen_lens: Sequence[int]) -> Iterator[Block]:
        """Share out the prompts; where some are longer than planned, their blocks hold fewer."""
        left = in_order(prompt_lens, gen_lens)
        while left:
            some = left[: self.policy.block_size]
            longest = max(prompt_lens[i] for i in some), max(gen_lens[i] for i in some)
            workload = Workload(prompt_len=longest[0], gen_len=longest[1], num_prompts=len(some))
            shape = self._fitting(workload)
            yield block_of(left[: shape.block_size], shape.gpu_batch_size)
            left = left[shape.block_size :]

    def _fitting(self, workload: Workload) -> Policy:
        """The policy with its batch shape made to fit these prompts: fewer than planned, or longer ones."""
        policy = self.policy
        count = workload.num_prompts or policy.block_size
        size = min(policy.gpu_batch_size, count)
        policy = policy.replace(gpu_batch_size=size, num_gpu_batches=min(policy.num_gpu_batches, -(-count // size)))
        check_workload(get("roofline"), self.hardware, self.spec, workload)
        while True:
            found = self._estimate(policy, workload)
            if not found.violations:
                return policy
            if policy.num_gpu_batches > 1:
                policy = policy.replace(num_gpu_batches=policy.num_gpu_batches - 1)
            elif policy.gpu_batch_size > 1:
                policy = policy.replace(gpu_batch_size=policy.gpu_batch_size - 1)
            else:
                raise InfeasibleError(
                    f"one prompt of {workload.prompt_len} tokens with {workload.gen_len} new ones does not fit beside "
                    f"the weights of this policy: {'; '.join(words.excess(found))}"
                )

    def _run_block(self, block: Block, job: "_Job") -> BlockTimes:
        assert self._weights is not None
        assert self._movers is not None
        batches = [padded([job.prompts[i] for i in batch], pad_token_id=self.pad_token_id) for batch in block.batches]
        groups = [job.sequences(batch, self._eos, self.tokenizer) for batch in block.batches]
        samplers = [Sampler([job.params[i] for i in batch], [job.keys[i] for i in batch]) for batch in block.batches]

        def choose(batch: int, logits: Tensor, step: int) -> Tensor:
            chosen = samplers[batch].choose(logits, step)
            job.add(block.batches[batch], groups[batch], chosen.tolist())
            return chosen

        with BlockRun(
            batches,
            gen_len=max(job.params[i].max_new_tokens for i in block.indices),
            weights=self._weights,
            policy=self.policy,
            movers=self._movers,
            directory=self._directory,
        ) as run:
            self._block_bytes = {"cache": run.cache.bytes_on, "activations": run.hidden.bytes_on}
            self._block_buffers = [run.cache.buffer_bytes, run.hidden.buffer_bytes]
            times = run.run(choose, ended=lambda: all(group.finished for group in groups))
        for batch, group in zip(block.batches, groups, strict=True):
            job.completions.update(zip(batch, group.completions(), strict=True))
        return times

    # --------------------------------------------------------------- measuring

    def _measured(self, meter: Meter, policy: Policy, workload: Workload, generated: int) -> Measurement:
        assert self._weights is not None
        predicted = self._estimate(policy, workload)
        buffers = [self._weights.buffer_bytes, *self._block_buffers]
        resident = {
            tier: {
                "weights": float(self._weights.bytes_on[tier]),
                **{kind: float(found[tier]) for kind, found in self._block_bytes.items()},
                "buffers": float(sum(found.get(tier, 0) for found in buffers)),
            }
            for tier in ("gpu", "cpu", "disk")
        }
        return Measurement(
            model=self.spec,
            dtype=str(self.dtype).removeprefix("torch."),
            workload=workload,
            policy=policy,
            hardware=self.hardware.name,
            predicted=predicted,
            measured=meter.estimate(
                generated, self._peaks(resident), predicted.limit_bytes, prompts=workload.num_prompts or 1
            ),
            block_s=tuple((block.prefill_s, block.decode_s) for block in meter.blocks),
            resident_bytes=resident,
            origin=environment.describe(self.device, self._directory),
        )

    def _peaks(self, resident: dict[str, dict[str, float]]) -> dict[str, float]:
        """Peak bytes by tier: the operating system's and the allocator's count, the disk's from its files.

        Without a GPU the kernel counts both memory tiers as one: what was placed on the second is
        taken off.
        """
        found = self._watch.peak_bytes()
        disk = sum(resident["disk"].values())
        if "cpu" in found:
            return {"gpu": float(found["gpu"]), "cpu": float(found["cpu"]), "disk": disk}
        second = sum(resident["cpu"].values())
        return {"gpu": max(0.0, found["gpu"] - second), "cpu": second, "disk": disk}

    # ----------------------------------------------------------------- closing

    def close(self) -> None:
        """End every thread, give all memory and files back, and write the trace if one was asked for."""
        if self._movers is not None:
            self._movers.close()
        self._movers, self._weights, self._closed = None, None, True
        if self._trace is not None:
            self._timeline.save(self._trace)
            self._trace = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Job:
    """The prompts of one call and what has become of them."""

    on_text: Callable[[int, str], None] | None = None
    on_token: Callable[[int, int], None] | None = None
    on_progress: Callable[[int, int], None] | None = None

    def __init__(self, prompts: list[list[int]], params: list[SamplingParams], keys: list[int]) -> None:
        if len(keys) != len(prompts):
            raise InputError(f"keys has {len(keys)} entries for {len(prompts)} prompts")
        self.prompts, self.params, self.keys = prompts, params, keys
        self.completions: dict[int, Completion] = {}
        self._tokens, self._most = 0, sum(one.max_new_tokens for one in params)

    def sequences(self, batch: Sequence[int], eos: frozenset[int], tokenizer: Any | None) -> Sequences:
        """The state of the prompts of one batch."""
        prompts, params = [self.prompts[i] for i in batch], [self.params[i] for i in batch]
        stream = self.on_text is not None
        return Sequences(prompts, params, eos_token_ids=eos, tokenizer=tokenizer, stream=stream)

    def add(self, batch: Sequence[int], group: Sequences, new: Sequence[int]) -> None:
        """One more token of every prompt of a batch."""
        if self.on_token is not None:
            for index, token, done in zip(batch, new, group.done, strict=True):
                if not done:
                    self.on_token(index, token)
        pieces = group.add(new)
        self._tokens = min(self._most, self._tokens + len(batch))
        if self.on_text is not None:
            for index, piece in zip(batch, pieces, strict=True):
                if piece:
                    self.on_text(index, piece)
        if self.on_progress is not None:
            self.on_progress(self._tokens, self._most)


def _check_options(options: Mapping[str, Any], function: Callable[..., object]) -> None:
    """Raise :class:`InputError` for an argument that ``generate`` does not have."""
    known = inspect.signature(function).parameters
    for name in options:
        if name not in known:
            likely = ", ".join(other for other in known if other not in ("llm", "input_ids", "prompts"))
            raise InputError(f"generate has no argument {name!r}: it takes {likely}")


def _described(model: str) -> tuple[str, dict[str, Any], Path | None]:
    """Name, config and tokenizer folder of a model, without reading its weights."""
    if model.startswith(dummy.PREFIX):
        name, config = dummy.dummy_config(model)
        return name, config, None
    with open_checkpoint(model) as checkpoint:
        return checkpoint.name, checkpoint.config, checkpoint.folder


def _dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type to compute in: as asked for, else fp16 on CUDA, bf16 on CPUs that multiply it, fp32 on others."""
    if name is None:
        if device.type == "cuda":
            return torch.float16
        return torch.bfloat16 if environment.multiplies_bf16() else torch.float32
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}: one of {', '.join(DTYPES)} is expected")
    return DTYPES[name]


def _bytes(name: str, value: str | float | None) -> float | None:
    found = units.parse(value, "bytes") if isinstance(value, str) else value
    if found is not None and (found < 0 or (found == 0 and name == "gpu_memory")):
        raise InputError(f"{name} is {value}: it must be {'greater than' if name == 'gpu_memory' else 'at least'} 0")
    return found


def _offload_directory(given: str | os.PathLike[str] | None) -> Path:
    """The directory of the third tier, which must exist and be writable."""
    if given is None:
        directory = Path(tempfile.gettempdir()) / f"tierwise-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        return directory
    directory = Path(given)
    if not directory.is_dir():
        reason = "that is a file" if directory.exists() else "there is no such directory"
        raise InputError(f"offload_dir is {directory}: {reason}")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"offload_dir is {directory}: nothing can be written there")
    return directory


def _disk_settings(hardware: Hardware) -> dict[str, int]:
    """How the profiler drove the disk best: threads, and bytes a transfer."""
    found = ((hardware.measured or {}).get("disk") or {}).get("settings", {}).get("disk_read", {})
    names = {"threads": "disk_threads", "chunk_bytes": "chunk_bytes"}
    return {ours: int(found[theirs]) for theirs, ours in names.items() if theirs in found}
