"""What a command tells a person: the question as understood, the policy, its cost, its limits and the proof."""

import itertools
from collections.abc import Iterable, Sequence

from rich.text import Text

from costmodel import words
from costmodel.commands import terminal
from costmodel.commands.terminal import BAD, FAINT, GOOD, LABEL, Renderable, facts, heading
from costmodel.estimate import Estimate
from costmodel.frontier import Frontier
from costmodel.hardware import Hardware
from costmodel.model import BYTES_PER_VALUE
from costmodel.policy import TIERS, Policy
from costmodel.residency import KINDS, Plan, residency
from costmodel.search import SearchResult
from costmodel.units import GiB, format_bytes, format_rate, format_seconds

SHOWN_SHARE = 0.05
"""Resources busy for less of a phase are left out, the busiest aside."""

SHOWN_GAIN = 5e-4
"""A price below this rounds to +0.0 %."""

MOST_PRICES = 4

LOSSY = (
    "4-bit compression is lossy: check the quality of the answers, or forbid it with --compress-weights off and "
    "--compress-cache off"
)


def search_report(result: SearchResult, *, written: Sequence[str] = ()) -> list[Renderable]:
    """The answer of a search."""
    cost = result.estimate
    throughput = words.number(cost.throughput_tok_per_s)
    parts = [
        question(result),
        heading(f"Best policy: {throughput} token/s", GOOD),
        *_policy(result),
        heading("Expected"),
        _expected(result),
        heading("What limits it"),
        _limits(result),
        heading("Proof"),
        _proof(result),
    ]
    if result.prices:
        parts += [heading("What more would bring"), _prices(result)]
    if result.alternatives:
        costed = [(result.policy, cost), *result.alternatives]
        parts += [heading("Best policies by switches"), policy_table(costed)]
    return [*parts, *_closing(result, result.notes, written)]


def estimate_report(plan: Plan, *, notes: Sequence[str] = (), written: Sequence[str] = ()) -> list[Renderable]:
    """The answer for one fixed policy, whether it fits or not."""
    throughput = words.number(plan.estimate.throughput_tok_per_s)
    if plan.estimate.feasible:
        verdict = [heading(f"This policy fits: {throughput} token/s", GOOD)]
    else:
        verdict = [heading("This policy does not fit", BAD), _excess(plan)]
    return [
        question(plan),
        *verdict,
        *_policy(plan),
        heading("Expected" if plan.estimate.feasible else "Expected, were there room"),
        _expected(plan),
        heading("What limits it"),
        _limits(plan),
        *_closing(plan, notes, written),
    ]


def frontier_report(found: Frontier, *, written: Sequence[str] = ()) -> list[Renderable]:
    """The frontier as a table, fastest block first."""
    costed = [(point.policy, point.estimate) for point in found.points]
    gap = max(point.gap for point in found.points)
    about = (
        f"Each row is the highest throughput for a block of that latency; no policy within these flags is better by "
        f"more than {gap * 100:.2f} %."
    )
    return [
        question(found.points[-1], frontier=True),
        heading("Throughput against latency"),
        policy_table(costed),
        Text(f"\n{about}", style=FAINT),
        *_closing(found.points[-1], found.points[-1].notes, written),
    ]


def question(plan: Plan, *, frontier: bool = False) -> Renderable:
    """The machine, the model and the workload as understood."""
    hardware, model, workload = plan.hardware, plan.model, plan.workload
    capacity = hardware.capacity_bytes
    sizes = ", ".join(
        f"{words.memory_name(tier)} {format_bytes(capacity[tier])}" if capacity[tier] else f"no {words.memory_name(tier)}"
        for tier in TIERS
    )
    links = hardware.links
    rates = {
        words.resource_name(name): format_rate(getattr(links, name).bytes_per_s.effective, "bytes/s")
        for name in ("cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write")
    }
    weights = format_bytes(model.total_params * BYTES_PER_VALUE)
    cache = format_bytes(model.kv_bytes_per_token(compressed=False) * model.num_layers)
    prompts = "an endless queue of prompts" if workload.num_prompts is None else words.counted(workload.num_prompts, "prompt")
    tokens = f"{prompts} of {workload.prompt_len:,} tokens, {workload.gen_len:,} generated for each"
    if workload.max_latency_s is not None and not frontier:
        tokens += f"; a block may take {format_seconds(workload.max_latency_s)}"
    without = [("", "without a GPU: what is called GPU here are the cores and the memory that compute")]
    return facts(
        ("Machine", f"{hardware.name}: {_sentence(hardware)}"),
        *(without if hardware.gpu.kind == "cpu" else []),
        ("", f"{sizes}; {words.percent(plan.usable_fraction)} of each may be used"),
        ("", ", ".join(f"{name} {rate}" for name, rate in rates.items())),
        ("Model", f"{model.name}: {words.parameters(model.total_params)} parameters, {weights} in 16 bits; KV cache {cache} a token"),
        ("Workload", tokens),
        ("Cost model", plan.formulation),
    )


def _sentence(hardware: Hardware) -> str:
    """The machine's description without its full stop."""
    return hardware.description.rstrip(". ")


def _policy(plan: Plan) -> list[Renderable]:
    policy = plan.policy
    rows: list[tuple[str, str | Text | Renderable]] = [
        ("Batches", words.batches(policy)),
        ("Switches", ", ".join(words.switches(policy))),
    ]
    return [facts(*rows), Text(), _placement(plan)]


def _placement(plan: Plan) -> Renderable:
    """Percent and GiB of each kind on each tier, the peaks and what may be used."""
    cost = plan.estimate
    names = [words.tier_name(tier) for tier in TIERS]
    table = terminal.table("", *itertools.chain.from_iterable((f">{name}", ">GiB") for name in names))
    held = residency(plan)
    for kind in KINDS[:-1]:
        split = getattr(plan.policy, kind)
        cells = [(words.percent(getattr(split, tier)), _gib(held[tier][kind])) for tier in TIERS]
        shown = [pair if getattr(split, tier) else ("–", "–") for tier, pair in zip(TIERS, cells, strict=True)]
        table.add_row(words.KINDS[kind], *itertools.chain.from_iterable(shown))
    table.add_row("buffers", *itertools.chain.from_iterable(("", _gib(held[tier]["buffers"])) for tier in TIERS), end_section=True)
    peaks = [
        ("", Text(_gib(cost.peak_bytes[tier]), style=BAD if tier in cost.violations else "")) for tier in TIERS
    ]
    table.add_row("at its fullest", *itertools.chain.from_iterable(peaks), style=LABEL)
    usable = [("", _gib(cost.limit_bytes[tier])) for tier in TIERS]
    table.add_row("usable", *itertools.chain.from_iterable(usable))
    return table


def _gib(size: float) -> str:
    if size == 0:
        return "–"
    return f"{size / GiB:,.1f}" if size >= 0.05 * GiB else "<0.1"


def _expected(plan: Plan) -> Renderable:
    cost, policy, workload = plan.estimate, plan.policy, plan.workload
    throughput = f"{words.number(cost.throughput_tok_per_s)} token/s"
    if cost.decode_throughput_tok_per_s is not None:
        throughput += f" over the whole run; {words.number(cost.decode_throughput_tok_per_s)} token/s while decoding"
    block = (
        f"{format_seconds(cost.latency_s)} for {words.counted(policy.block_size, 'prompt')}: "
        f"prefill {format_seconds(cost.prefill_s)}, decode {format_seconds(cost.decode_s)}"
    )
    rows: list[tuple[str, str | Text | Renderable]] = [("Throughput", throughput), ("A block", block)]
    if cost.blocks is not None and cost.job_s is not None and workload.num_prompts is not None:
        job = f"{format_seconds(cost.job_s)} for {words.counted(workload.num_prompts, 'prompt')} in {words.counted(cost.blocks, 'block')}"
        if workload.num_prompts % policy.block_size:
            job += "; the last one is not full, but charged as if it were"
        rows.append(("The job", job))
    return facts(*rows)


def _limits(plan: Plan) -> Renderable:
    """The busiest resource of each phase with its busy share, the runners-up, and full tiers."""
    cost = plan.estimate
    rows: list[tuple[str, str | Text | Renderable]] = []
    for phase in cost.bottleneck:
        ranked = sorted(cost.busy_share(phase).items(), key=lambda item: -item[1])
        first, *others = [(words.resource_name(name), words.percent(share), share) for name, share in ranked]
        line = Text.assemble((first[0], LABEL), f" busy {first[1]} of the time")
        then = ", ".join(f"{name} {text}" for name, text, share in others if share >= SHOWN_SHARE)
        line.append(f"; then {then}" if then else "; nothing else comes near")
        rows.append((phase.capitalize(), line))
    full = [tier for tier in TIERS if cost.limit_bytes[tier] and cost.peak_bytes[tier] > 0.995 * cost.limit_bytes[tier]]
    if full and cost.feasible:
        rows.append(("Full", ", ".join(words.memory_name(tier) for tier in full)))
    return facts(*rows)


def _excess(plan: Plan) -> Renderable:
    """Which tiers are exceeded, and by how much."""
    cost = plan.estimate
    lines = [
        f"{words.memory_name(tier)} is exceeded by {format_bytes(cost.peak_bytes[tier] - cost.limit_bytes[tier])}: "
        f"{format_bytes(cost.peak_bytes[tier])} needed, {format_bytes(cost.limit_bytes[tier])} usable"
        for tier in cost.violations
    ]
    return Text("\n".join(lines) + "\n", style="red")


def _proof(result: SearchResult) -> Renderable:
    within = "less than 0.01" if result.gap < 1e-4 else f"{result.gap * 100:.2f}"
    effort = f"{words.counted(result.linear_programs, 'linear program')}, {format_seconds(result.seconds)}"
    return Text(
        f"No policy within your flags exceeds {words.number(result.bound_tok_per_s)} token/s by this cost model: "
        f"the gap is {within} % ({effort})."
    )


def _prices(result: SearchResult) -> Renderable:
    worth = [price for price in result.prices if price.gain >= SHOWN_GAIN]
    lines = [price.sentence() for price in worth[:MOST_PRICES]]
    rest = [f"{price.amount} of {price.what} {price.gain * 100:+.1f} %" for price in worth[MOST_PRICES:]]
    if rest:
        lines.append(f"less: {', '.join(rest)}")
    useless = [f"{price.amount} of {price.what}" for price in result.prices if price.gain < SHOWN_GAIN]
    if useless:
        lines.append(f"nothing: {', '.join(useless)}")
    return Text("\n".join(lines))


def policy_table(costed: Iterable[tuple[Policy, Estimate]]) -> Renderable:
    """Policies side by side, one a row."""
    costed = list(costed)
    overlaps = all(policy.overlap for policy, _ in costed)
    headings = [">token/s", ">a block", ">batches", "weights", "KV cache", "activ.", "4-bit", "attn."]
    table = terminal.table(*headings, *([] if overlaps else ["overlap"]))
    for policy, cost in costed:
        splits = [getattr(policy, kind) for kind in KINDS[:-1]]
        row = [
            words.number(cost.throughput_tok_per_s),
            format_seconds(cost.latency_s),
            f"{policy.num_gpu_batches} × {policy.gpu_batch_size}",
            *("/".join(f"{getattr(split, tier) * 100:.0f}" for tier in TIERS) for split in splits),
            words.compressed(policy),
            words.attention(policy),
        ]
        table.add_row(*row, *([] if overlaps else ["yes" if policy.overlap else "no"]))
    tiers = "/".join(words.tier_name(tier) for tier in TIERS)
    table.caption = f"batches × prompts in each; weights, KV cache and activations in percent on {tiers}"
    table.caption_justify = "left"
    return table


def _closing(plan: Plan, notes: Sequence[str], written: Sequence[str]) -> list[Renderable]:
    """What to bear in mind, and the files that were written."""
    lossy = [LOSSY] if plan.policy.compress_weights or plan.policy.compress_cache else []
    lines = [("Note", note) for note in (*lossy, *notes)] + [("Written", name) for name in written]
    return [Text(), facts(*lines)] if lines else []
