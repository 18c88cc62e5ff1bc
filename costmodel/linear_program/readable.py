"""The same program in PuLP, constraint by named constraint."""

from typing import TYPE_CHECKING, Any

from costmodel.formulations.base import KINDS, Amounts, PerTier
from costmodel.linear_program.question import MS, SPLIT_VARIABLES, Question
from costmodel.policy import TIERS
from costmodel.units import GB

if TYPE_CHECKING:
    import pulp


def readable(question: Question) -> "pulp.LpProblem":
    """The same program as a PuLP problem whose constraints carry their names.

    Solve it with any PuLP solver, or print it: it reads like docs/cost-model.md. Its objective is in ms
    for the reference prompts.
    """
    import pulp

    problem = pulp.LpProblem("placement", pulp.LpMinimize)
    prompts = question.prompts
    least, most = question.blocks_range
    blocks = problem.add_variable("blocks", lowBound=least, upBound=most)
    split = {name: problem.add_variable(name, lowBound=0) for name in SPLIT_VARIABLES}

    def tiers(kind: str) -> PerTier[Any]:
        return PerTier(*(split[f"{kind}_{tier}"] for tier in TIERS))

    amounts: Amounts[Any] = Amounts(
        tiers("weights"), tiers("cache"), tiers("activations"), prompts=prompts, blocks=blocks
    )

    def constrain(condition: Any, name: str) -> None:
        """Name a constraint; one between plain numbers holds or fails by itself and is dropped."""
        if isinstance(condition, pulp.LpConstraint):
            problem.addConstraint(condition, name)

    for kind in KINDS:
        whole = blocks if kind == "weights" else prompts
        constrain(pulp.lpSum(split[f"{kind}_{tier}"] for tier in TIERS) == whole, f"{kind}_are_somewhere")
    for peak in question.formulation.peaks(question.case, amounts):
        limit = question.limits[peak.tier] / GB
        constrain(peak.bytes * (1 / GB) <= blocks * limit, f"{peak.tier}_memory_{peak.moment}".replace(" ", "_"))
    milliseconds: Any = 0
    for name, stage, passes in question.timed_stages(amounts):
        longest = problem.add_variable(f"{name}_longest", lowBound=0)
        for j, track in enumerate(stage.tracks):
            constrain(longest >= track.lasting * MS, f"{name}_track{j}")
        stage_ms: Any = longest
        if stage.has_first_batch:
            first = problem.add_variable(f"{name}_first_batch", lowBound=0)
            later = stage.later_batches_share
            constrain(first >= longest * (1 - later), f"{name}_first_batch_is_no_shorter")
            for j, seconds in enumerate(stage.first_batch_seconds()):
                constrain(first >= seconds * MS, f"{name}_first_batch_track{j}")
            stage_ms = first + longest * later
        plain = stage.plain_seconds()
        if plain is not None:
            stage_ms = stage_ms * stage.longest_weight + plain * MS
        milliseconds = milliseconds + stage_ms * passes
    problem.setObjective(milliseconds)
    for kind, tier in sorted(question.empty):
        constrain(split[f"{kind}_{tier}"] == 0, f"no_{kind}_on_{tier}")
    if question.fixed is not None:
        for kind, given in zip(KINDS, question.fixed, strict=True):
            whole = blocks if kind == "weights" else prompts
            for tier in TIERS:
                constrain(split[f"{kind}_{tier}"] == whole * getattr(given, tier), f"{kind}_{tier}_as_given")
    if question.max_latency_s is not None:
        constrain(milliseconds <= blocks * (question.max_latency_s * MS), "latency")
    return problem
