"""What a command tells a person: the question as understood, the policy, its cost, its limits and the proof."""

from collections.abc import Iterable, Sequence

from rich.text import Text

from costmodel import words
from costmodel.commands import terminal
from costmodel.commands.terminal import BAD, FAINT, GOOD, LABEL, Renderable, Row, facts, heading
from costmodel.estimate import Estimate
from costmodel.frontier import Frontier
from costmodel.model import BYTES_PER_VALUE
from costmodel.policy import TIERS, Policy
from costmodel.residency import KINDS, Plan, residency
from costmodel.search import SearchResult
from costmodel.uncertainty import LEVEL, Interval, Intervals
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


def search_report(
    result: SearchResult, *, uncertain: Intervals | None = None, written: Sequence[str] = ()
) -> list[Renderable]:
    """The answer of a search."""
    cost = result.estimate
    throughput = _throughput(cost, uncertain)
    parts = [
        question(result),
        heading(f"Best policy: {throughput}", GOOD),
        *_policy(result),
        heading("Expected"),
        _expected(result, uncertain),
        heading("What limits it"),
        _limits(result),
        heading("Proof"),
        _proof(result),
    ]
    if result.prices:
        parts += [heading("What more would bring, at this GPU batch size"), _prices(result)]
    if result.alternatives:
        costed = [(result.policy, cost), *result.alternatives]
        parts += [heading("Best policies by switches"), policy_table(costed, uncertain)]
        if uncertain is not None:
            parts.append(Text(f"\n{_told_apart(uncertain)}"))
    return [*parts, *_closing(result, result.notes, written)]


def estimate_report(
    plan: Plan, *, uncertain: Intervals | None = None, notes: Sequence[str] = (), written: Sequence[str] = ()
) -> list[Renderable]:
    """The answer for one fixed policy, whether it fits or not."""
    if plan.estimate.feasible:
        verdict: list[Renderable] = [heading(f"This policy fits: {_throughput(plan.estimate, uncertain)}", GOOD)]
    else:
        verdict = [heading("This policy does not fit", BAD), _excess(plan)]
    return [
        question(plan),
        *verdict,
        *_policy(plan),
        heading("Expected" if plan.estimate.feasible else "Expected, were there room"),
        _expected(plan, uncertain),
        heading("What limits it"),
        _limits(plan),
        *_closing(plan, notes, written),
    ]


def frontier_report(found: Frontier, *, written: Sequence[str] = ()) -> list[Renderable]:
    """The frontier as a table, fastest block first."""
    costed = [(point.policy, point.estimate) for point in found.points]
    gap = _gap(max(point.gap for point in found.points))
    about = (
        f"Each row is the best policy under one latency limit, proven within {gap} %; limits between the rows have "
        "policies of their own (more --points)."
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
    rows: list[Row] = [("Machine", f"{hardware.name}: {hardware.description.rstrip('. ')}")]
    if hardware.gpu.kind == "cpu":
        rows.append(("", "without a GPU: what is called GPU here are the cores and the memory that compute"))
    links = ("cpu_to_gpu", "gpu_to_cpu", "disk_read", "disk_write")
    rates = [(words.resource_name(link), getattr(hardware.links, link).bytes_per_s.effective) for link in links]
    sizes = [_size(tier, capacity) for tier, capacity in hardware.capacity_bytes.items()]
    rows.append(("", f"{', '.join(sizes)}; {words.percent(plan.usable_fraction)} of each may be used"))
    rows.append(("", ", ".join(f"{name} {format_rate(rate, 'bytes/s')}" for name, rate in rates)))
    weights = format_bytes(model.total_params * BYTES_PER_VALUE)
    cache = format_bytes(model.kv_bytes_per_token(compressed=False) * model.num_layers)
    shape = f"{words.parameters(model.total_params)} parameters, {weights} in 16 bits; KV cache {cache} a token"
    rows.append(("Model", f"{model.name}: {shape}"))
    endless = workload.num_prompts is None
    prompts = "an endless queue of prompts" if endless else words.counted(workload.num_prompts or 0, "prompt")
    tokens = f"{prompts} of {words.counted(workload.prompt_len, 'token')}, {workload.gen_len:,} generated for each"
    if workload.max_latency_s is not None and not frontier:
        tokens += f"; a block may take {format_seconds(workload.max_latency_s)}"
    return facts(*rows, ("Workload", tokens), ("Cost model", plan.formulation))


def _size(tier: str, capacity: float) -> str:
    name = words.memory_name(tier)
    return f"{name} {format_bytes(capacity)}" if capacity else f"no {name}"


def _policy(plan: Plan) -> list[Renderable]:
    policy = plan.policy
    return [
        facts(("Batches", words.batches(policy)), ("Switches", ", ".join(words.switches(policy)))),
        Text(),
        _placement(plan),
    ]


def _placement(plan: Plan) -> Renderable:
    """Percent and GiB of each kind on each tier, the peaks and what may be used."""
    cost, held = plan.estimate, residency(plan)
    headings = [text for tier in TIERS for text in (f">{words.tier_name(tier)}", ">GiB")]
    table = terminal.table("", *headings)
    for kind in KINDS[:-1]:
        split = getattr(plan.policy, kind)
        shares = {tier: getattr(split, tier) for tier in TIERS}
        cells = [
            (words.percent(shares[tier]), _gib(held[tier][kind])) if shares[tier] else ("–", "–") for tier in TIERS
        ]
        table.add_row(words.KINDS[kind], *_flat(cells))
    table.add_row("buffers", *_flat(("", _gib(held[tier]["buffers"])) for tier in TIERS), end_section=True)
    peaks = [(_gib(cost.peak_bytes[tier]), BAD if tier in cost.violations else "") for tier in TIERS]
    table.add_row("at its fullest", *_flat(("", Text(*peak)) for peak in peaks), style=LABEL)
    table.add_row("usable", *_flat(("", _gib(cost.limit_bytes[tier])) for tier in TIERS))
    return table


def _flat(pairs: Iterable[tuple[Renderable, Renderable]]) -> list[Renderable]:
    """The cells of a row, two a tier."""
    return [cell for pair in pairs for cell in pair]


def _gib(size: float) -> str:
    if size == 0:
        return "–"
    return f"{size / GiB:,.1f}" if size >= 0.05 * GiB else "<0.1"


def _throughput(cost: Estimate, uncertain: Intervals | None) -> str:
    """``"12.3 token/s"``, or ``"12.3 token/s ± 8 %"`` where the hardware file says how well it is known."""
    text = f"{words.number(cost.throughput_tok_per_s)} token/s"
    return text if uncertain is None else f"{text} {_half(uncertain.each[0])}"


def _half(interval: Interval) -> str:
    return f"± {max(interval.relative * 100, 0.1):.2g} %"


def _interval(uncertain: Intervals) -> str:
    """The ends of the interval, and what they rest on."""
    first = uncertain.each[0]
    ends = f"{LEVEL * 100:.0f} % of runs: {words.number(first.low)} to {words.number(first.high)} token/s"
    if uncertain.basis == "calibration":
        return f"{ends}, by the calibration of this hardware file"
    return f"{ends}, by the spreads of its measured rates alone; what the formulas miss comes on top (calibrate)"


def _told_apart(uncertain: Intervals) -> str:
    """Which rows of the table may be as fast as the first."""
    same = [str(row) for row, apart in enumerate(uncertain.apart, start=2) if not apart]
    level = f"{LEVEL * 100:.0f} % sure"
    if not same:
        return f"The first policy is faster than each of the others ({level})."
    rows = f"row {same[0]}" if len(same) == 1 else f"rows {', '.join(same[:-1])} and {same[-1]}"
    return f"The first policy and {rows} cannot be told apart: their difference is not {level}."


def _expected(plan: Plan, uncertain: Intervals | None = None) -> Renderable:
    cost, policy, workload = plan.estimate, plan.policy, plan.workload
    throughput = f"{words.number(cost.throughput_tok_per_s)} token/s"
    if cost.decode_throughput_tok_per_s is not None:
        throughput += f" over the whole run; {words.number(cost.decode_throughput_tok_per_s)} token/s while decoding"
    block = f"{format_seconds(cost.latency_s)} for {words.counted(policy.block_size, 'prompt')}"
    if cost.decode_s:
        block += f": prefill {format_seconds(cost.prefill_s)}, decode {format_seconds(cost.decode_s)}"
    rows: list[Row] = [("Throughput", throughput)]
    if uncertain is not None:
        rows.append(("Interval", _interval(uncertain)))
    rows.append(("A block", block))
    if cost.blocks is not None and cost.job_s is not None and workload.num_prompts is not None:
        prompts, blocks = words.counted(workload.num_prompts, "prompt"), words.counted(cost.blocks, "block")
        job = f"{format_seconds(cost.job_s)} for {prompts} in {blocks}"
        if workload.num_prompts % policy.block_size:
            job += "; the last one is not full, but charged as if it were"
        rows.append(("The job", job))
    return facts(*rows)


def _limits(plan: Plan) -> Renderable:
    """The busiest resource of each phase with its busy share, the runners-up, and full tiers."""
    cost = plan.estimate
    rows: list[Row] = []
    for phase in cost.bottleneck:
        bottleneck = cost.bottleneck[phase]
        ranked = sorted(cost.busy_share(phase).items(), key=lambda item: (item[0] != bottleneck, -item[1]))
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
    return Text("".join(f"{line}\n" for line in words.excess(plan.estimate)), style=BAD)


def _proof(result: SearchResult) -> Renderable:
    effort = f"{words.counted(result.linear_programs, 'linear program')}, {format_seconds(result.seconds)}"
    return Text(
        f"No policy within your flags exceeds {words.number(result.bound_tok_per_s)} token/s by this cost model: "
        f"the gap is {_gap(result.gap)} % ({effort})."
    )


def _gap(gap: float) -> str:
    """A gap in percent, never rounded down to nothing."""
    return "less than 0.01" if gap < 1e-4 else f"{gap * 100:.2f}"


def _prices(result: SearchResult) -> Renderable:
    worth = [price for price in result.prices if price.gain >= SHOWN_GAIN]
    lines = [price.sentence() for price in worth[:MOST_PRICES]]
    rest = [f"{price.amount} of {price.what} {price.gain * 100:+.1f} %" for price in worth[MOST_PRICES:]]
    if rest:
        lines.append(f"less: {', '.join(rest)}")
    useless = [f"{price.amount} of {price.what}" for price in result.prices if price.gain < SHOWN_GAIN]
    if useless:
        lines.append(f"hardly anything: {', '.join(useless)}")
    return Text("\n".join(lines))


def policy_table(costed: Iterable[tuple[Policy, Estimate]], uncertain: Intervals | None = None) -> Renderable:
    """Policies side by side, one a row; ``uncertain`` are their intervals."""
    costed = list(costed)
    overlaps = all(policy.overlap for policy, _ in costed)
    halves = [] if uncertain is None else [_half(one) for one in uncertain.each]
    headings = [
        ">token/s",
        *([">95 %"] if halves else []),
        ">a block",
        ">block",
        "weights",
        "KV cache",
        "activ.",
        "4-bit",
        "attn.",
    ]
    table = terminal.table(*headings, *([] if overlaps else ["overlap"]))
    for place, (policy, cost) in enumerate(costed):
        splits = [getattr(policy, kind) for kind in KINDS[:-1]]
        row = [
            words.number(cost.throughput_tok_per_s),
            *halves[place : place + 1],
            format_seconds(cost.latency_s),
            f"{policy.gpu_batch_size} × {policy.num_gpu_batches}",
            *("/".join(f"{getattr(split, tier) * 100:.0f}" for tier in TIERS) for split in splits),
            words.compressed(policy),
            words.attention(policy),
        ]
        table.add_row(*row, *([] if overlaps else ["yes" if policy.overlap else "no"]))
    tiers = "/".join(words.tier_name(tier) for tier in TIERS)
    table.caption = f"block: prompts of a GPU batch × GPU batches; the rest in percent on {tiers}"
    table.caption_justify = "left"
    return table


def _closing(plan: Plan, notes: Sequence[str], written: Sequence[str]) -> list[Renderable]:
    """What to bear in mind, and the files that were written."""
    lossy = [LOSSY] if plan.policy.compress_weights or plan.policy.compress_cache else []
    lines = [("Note", note) for note in (*lossy, *notes)] + [("Written", name) for name in written]
    return [Text(), facts(*lines)] if lines else []
