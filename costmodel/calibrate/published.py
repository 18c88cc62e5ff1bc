"""The published runs: FlexGen on one T4, and the ablations of the paper's table.

The files in costmodel/catalog/published name their source. Throughputs marked ``projected`` were
computed by the authors from the first decode step, so the prediction repeats that step too.
"""

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from costmodel.estimate import block_seconds, case_of
from costmodel.formulations.base import Formulation
from costmodel.hardware import Hardware
from costmodel.model import ModelSpec
from costmodel.policy import Policy
from costmodel.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: the policy that was really executed and what was measured (token/s)."""

    model: ModelSpec
    workload: Workload
    policy: Policy
    projected: bool
    throughput_tok_per_s: float
    decode_throughput_tok_per_s: float | None = None

    @property
    def name(self) -> str:
        """A short label: model, prompt length, batch shape and compression."""
        policy = self.policy
        shape = f"{policy.gpu_batch_size}×{policy.num_gpu_batches}"
        kinds = [word for word, on in (("w", policy.compress_weights), ("c", policy.compress_cache)) if on]
        return " ".join(
            [self.model.name, f"s={self.workload.prompt_len}", shape, *(["4-bit", "+".join(kinds)] * bool(kinds))]
        )


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A run of another system on the same machine: the prompts it held at once, and token/s."""

    system: str
    model: str
    workload: Workload
    prompts: int
    throughput_tok_per_s: float


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """A published variant of a run; ``published`` is ``None`` where the paper says out of memory."""

    variant: str
    run: Run
    published_tok_per_s: float | None


def predict(run: Run, hardware: Hardware, formulation: Formulation) -> tuple[float, float]:
    """Predicted throughput and decode throughput (token/s) of a run."""
    case = case_of(run.policy, hardware, run.model, run.workload)
    steps = run.workload.gen_len - 1
    contexts = [(run.workload.prompt_len + 1.0, steps)] if run.projected and not formulation.mean_context_only else None
    prefill_s, decode_s = block_seconds(formulation, case, run.policy, contexts)
    prompts = run.policy.block_size
    return prompts * run.workload.gen_len / (prefill_s + decode_s), prompts * steps / decode_s


def _rows(name: str) -> Iterator[dict[str, str]]:
    text = (resources.files("costmodel.catalog") / "published" / name).read_text(encoding="utf-8")
    return csv.DictReader(line for line in text.splitlines() if not line.startswith("#"))


@cache
def runs() -> tuple[Run, ...]:
    """The 12 published runs, with the weights where FlexGen really put them.

    What it failed to place on the GPU stayed in CPU memory.
    """
    return tuple(_run(row) for row in _rows("flexgen_t4_published.csv"))


def _run(row: dict[str, str]) -> Run:
    weights_gpu = float(row["effective_weights_gpu"])
    weights_cpu = float(row["weights_cpu"]) + float(row["weights_gpu"]) - weights_gpu
    others = (float(row[name]) for name in ("cache_gpu", "cache_cpu", "activations_gpu", "activations_cpu"))
    policy = Policy.from_percent(
        (weights_gpu, weights_cpu, *others),
        gpu_batch_size=int(row["gpu_batch_size"]),
        num_gpu_batches=int(row["num_gpu_batches"]),
        **{name: row[name] == "true" for name in ("compress_weights", "compress_cache", "cpu_attention", "overlap")},
    )
    decode = row["decode_throughput_tok_per_s"]
    return Run(
        model=ModelSpec.from_catalog(row["model"]),
        workload=Workload(prompt_len=int(row["prompt_len"]), gen_len=int(row["gen_len"])),
        policy=policy,
        projected=row["projected"] == "true",
        throughput_tok_per_s=float(row["throughput_tok_per_s"]),
        decode_throughput_tok_per_s=float(decode) if decode else None,
    )


@cache
def baselines() -> tuple[Baseline, ...]:
    """What the paper prints for other systems: Accelerate, DeepSpeed, and Petals a GPU."""
    return tuple(
        Baseline(
            system=row["system"],
            model=row["model"],
            workload=Workload(prompt_len=int(row["prompt_len"]), gen_len=BASELINE_GEN_LEN),
            prompts=int(row["effective_batch"]),
            throughput_tok_per_s=float(row["throughput_tok_per_s"]),
        )
        for row in _rows("baselines_t4_published.csv")
    )


BASELINE_GEN_LEN = 32
"""Tokens that every system generated for a prompt, as the file's first lines say."""

SMALL_BATCH = {"opt-30b": 8, "opt-175b": 2}
"""Prompts under "DeepSpeed policy", which the table does not state.

The paper's DeepSpeed runs held 4 and 1. Streaming 60 GB of OPT-30B weights for every token at 1.57
token/s with 4 prompts would need 23.5 GB/s from a 15.75 GB/s link, so the batch was larger: the next
powers of two.
"""


@cache
def ablated_runs() -> Mapping[str, Run]:
    """The runs that the ablation table takes something from, by model: prompt 512, without compression."""
    return {
        run.model.name: run
        for run in runs()
        if run.workload.prompt_len == 512 and run.policy.cpu_attention and run.model.name in SMALL_BATCH
    }


def published_ablation(variant: str, model: str) -> float | None:
    """A cell of the ablation table (token/s); ``None`` for out of memory. Raises for a row that it lacks."""
    (cell,) = (row[model] for row in _rows("flexgen_ablation_t4_published.csv") if row["variant"] == variant)
    return None if cell == "OOM" else float(cell)


@cache
def ablations() -> tuple[Ablation, ...]:
    """The ablations that change a policy, for OPT-30B and OPT-175B."""
    found = []
    for variant, vary in _VARIANTS.items():
        for model, run in ablated_runs().items():
            published = published_ablation(variant, model)
            policy = vary(run)
            varied = Run(
                model=run.model,
                workload=run.workload,
                policy=policy,
                projected=run.projected,
                throughput_tok_per_s=published or 0.0,
            )
            found.append(Ablation(variant=variant, run=varied, published_tok_per_s=published))
    return tuple(found)


def _small_batch(run: Run) -> Policy:
    """Everything but the weights on the GPU, one small batch: DeepSpeed ZeRO-Inference's policy."""
    on_disk = run.policy.weights.disk > 0
    return Policy.from_percent(
        (0, 0 if on_disk else 100, 100, 0, 100, 0),
        gpu_batch_size=SMALL_BATCH[run.model.name],
        num_gpu_batches=1,
        cpu_attention=False,
    )


_VARIANTS = {
    "no overlapping": lambda run: run.policy.replace(overlap=False),
    "no CPU compute": lambda run: run.policy.replace(cpu_attention=False),
    "DeepSpeed policy": _small_batch,
}
