"""The program of one batch shape (or a range): hand-solved, against CBC, against the formulas themselves."""

import dataclasses
import random
from typing import Any

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import SolverError
from costmodel.estimate import block_seconds, case_of
from costmodel.formulations import get
from costmodel.formulations.base import (
    KINDS,
    PARTS,
    Amounts,
    Case,
    Formulation,
    Part,
    Peak,
    Shape,
    Stage,
    Switches,
    Track,
    amounts_of,
    parts_of,
)
from costmodel.hardware import Hardware
from costmodel.linear_program import Question, Solution, optimum, readable, solve, solve_lexicographic
from costmodel.linear_program.coefficients import Program, build, unit_amounts
from costmodel.linear_program.highs import lower_bound, run
from costmodel.linear_program.question import BLOCKS, PROMPTS
from costmodel.model import ModelSpec
from costmodel.policy import TIERS, Policy, Split
from costmodel.search.problem import Decided, Problem
from costmodel.workload import Workload
from tests.instances import (
    any_machine,
    any_model,
    any_problem,
    any_shape,
    any_splits,
    any_switches,
    best_policy_of_shape,
    cost_of,
    inside,
    logarithmic,
    machine,
    plain_model,
    roomy_for,
)

FORMULATIONS = pytest.mark.parametrize("name", ["roofline", "flexgen"])
RANDOMS = st.randoms(use_true_random=False)

PLAIN = Switches(compress_weights=False, compress_cache=False, cpu_attention=True, overlap=True)
GB = 1e9


# ------------------------------------------------------------------ solved by hand


class Toy(Formulation):
    """Sixty GB of weights, two GB of cache a prompt; activations take no room.

    A pass streams the weights that are off the GPU at 20 GB/s. Beside that, a decode step attends on the CPU,
    at 10 GB/s, to the cache that is off the GPU. The disk delivers at once (its transfers hide behind others).
    """

    name = "toy"
    default_usable_fraction = 1.0
    activations_on_disk = True

    def prefill(self, case: Case, amounts: Amounts[Any]) -> list[Stage]:
        return [_stage(case, amounts.weights.off_gpu * (60 / 20))]

    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        return [_stage(case, amounts.weights.off_gpu * (60 / 20), amounts.cache.off_gpu * (2 / 10))]

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        def on(tier: str) -> Any:
            return getattr(amounts.weights, tier) * 60e9 + getattr(amounts.cache, tier) * 2e9

        return [Peak("gpu", "decode", on("gpu")), Peak("cpu", "decode", on("cpu")), Peak("disk", "decode", on("disk"))]

    def refusal(self, switches: Switches, hardware: Hardware) -> str | None:
        return None

    def check(self, hardware: Hardware, model: ModelSpec, workload: Workload) -> None:
        return None


def _stage(case: Case, *tracks: Any) -> Stage:
    return Stage("layers", {}, tuple(Track((), seconds) for seconds in tracks), case.shape)


def toy(*, gpu: float, cpu: float, disk: float, **changes: Any) -> Question:
    """Twenty prompts in four batches, one decode step; sizes in GB."""
    case = Case(
        hardware=machine(),
        model=plain_model(),
        workload=Workload(prompt_len=10, gen_len=2),
        switches=PLAIN,
        shape=Shape.exactly(5, 4),
    )
    limits = {"gpu": gpu * GB, "cpu": cpu * GB, "disk": disk * GB}
    return Question(formulation=Toy(), case=case, contexts=((11.0, 1),), limits=limits, **changes)


def block_s(solution: Solution | None) -> float:
    """Seconds of a block."""
    assert solution is not None
    return solution.seconds_per_prompt * solution.block_prompts


def test_the_hand_solved_trade_between_weights_and_cache() -> None:
    # 60 GB of weights and 20 × 2 GB of cache, 40 GB of GPU: x GB of weights and y GB of cache are elsewhere,
    # x + y = 60. Prefill streams x: x/20 s. The decode step lasts max(x/20, y/10). Shifting a GB from x to y
    # saves 1/20 in prefill and, where x/20 leads, 1/20 more, but costs 1/10 where y/10 leads: the best is the
    # balance x/20 = y/10, so x = 40, y = 20: 2 s + 2 s.
    solution = solve(toy(gpu=40, cpu=1000, disk=0))
    assert solution is not None
    assert block_s(solution) == pytest.approx(4.0, rel=1e-9)
    weights, cache, _ = solution.splits()
    assert (weights.gpu, weights.cpu, weights.disk) == pytest.approx((1 / 3, 2 / 3, 0))
    assert (cache.gpu, cache.cpu, cache.disk) == pytest.approx((1 / 2, 1 / 2, 0))
    # With D = x + y = 100 - GPU, x = 2/3 D and the time is 2 · x/20 = D/15: a GB of GPU saves 1/15 s.
    # The price is for the reference prompts: one of the four batches, a quarter of the block.
    assert solution.prompts == 5
    assert solution.prices_s_per_byte["gpu"] * GB * 4 == pytest.approx(1 / 15)
    assert solution.prices_s_per_byte["cpu"] == solution.prices_s_per_byte["disk"] == 0


def test_the_hand_solved_program_with_fixed_weights() -> None:
    # All weights elsewhere: x = 60, 3 s a pass. The cache fills the GPU (40 GB) whole, so y = 0.
    fixed = (Split(gpu=0, cpu=1, disk=0), Split(gpu=1, cpu=0, disk=0), Split(gpu=1, cpu=0, disk=0))
    assert block_s(solve(toy(gpu=40, cpu=60, disk=0, fixed=fixed))) == pytest.approx(6.0, rel=1e-9)
    assert solve(toy(gpu=40, cpu=59.9, disk=0, fixed=fixed)) is None


def test_zero_percent_on_a_tier_means_zero() -> None:
    fixed = (Split(gpu=0, cpu=0.5, disk=0.5), Split(gpu=0, cpu=0, disk=1), Split(gpu=0, cpu=1, disk=0))
    solution = solve(toy(gpu=400, cpu=400, disk=400, fixed=fixed))
    assert solution is not None
    assert solution.splits() == fixed
    assert block_s(solution) == pytest.approx(3 + 4)  # decode attends to 40 GB at 10 GB/s


@pytest.mark.parametrize(("limit", "fits"), [(4.01, True), (3.99, False)])
def test_the_latency_limit_is_in_seconds_of_a_block(limit: float, fits: bool) -> None:
    question = toy(gpu=40, cpu=1000, disk=0, max_latency_s=limit)
    assert (solve(question) is not None) is fits
    assert readable(question).solve(pulp.HiGHS(msg=False)) == (1 if fits else -1)


def test_a_latency_limit_has_a_price_only_where_it_binds() -> None:
    # At a single shape the time is minimal already, so no limit above it can bind.
    slack = solve(toy(gpu=40, cpu=1000, disk=0, max_latency_s=5.0))
    assert slack is not None
    assert slack.latency_price == 0
    # Over 20 to 100 prompts, a longer block carries more prompts for the same weights: the limit binds.
    wide = Shape(gpu_batch_low=5, gpu_batch_high=5, batches_low=4, batches_high=20)
    question = toy(gpu=40, cpu=1000, disk=0, max_latency_s=5.0)
    question = dataclasses.replace(question, case=dataclasses.replace(question.case, shape=wide))
    here, later = solve(question), solve(dataclasses.replace(question, max_latency_s=5.0 + 1e-4))
    assert here is not None
    assert later is not None
    assert (here.seconds - later.seconds) / 1e-4 == pytest.approx(here.latency_price, rel=1e-4)
    assert here.latency_price > 0.01


def test_nothing_lies_on_disk_that_could_lie_elsewhere_at_equal_time() -> None:
    # The toy's disk costs nothing: leaving the GPU's overflow there is as fast as CPU memory.
    question = toy(gpu=40, cpu=70, disk=1000)
    tidy = solve_lexicographic(question)
    assert tidy is not None
    assert block_s(tidy) == pytest.approx(4.0, rel=1e-8)
    assert [split.disk for split in tidy.splits()] == [0, 0, 0]
    # With 50 GB of CPU memory, exactly 10 GB must be on disk.
    tidy = solve_lexicographic(toy(gpu=40, cpu=50, disk=1000))
    assert tidy is not None
    weights, cache, _ = tidy.splits()
    assert weights.disk * 60 + cache.disk * 40 == pytest.approx(10, rel=1e-6)
    assert block_s(tidy) == pytest.approx(4.0, rel=1e-8)


def test_what_the_gpu_holds_for_free_is_not_left_in_cpu_memory() -> None:
    # A GPU of 200 GB holds everything; with 90 GB, only cache whose attention hides (none is streamed) may leave.
    tidy = solve_lexicographic(toy(gpu=200, cpu=1000, disk=1000))
    assert tidy is not None
    assert [split.gpu for split in tidy.splits()] == pytest.approx([1, 1, 1])


def test_a_ray_without_end_is_a_solver_error_with_its_status() -> None:
    endless = Program(
        cost=np.array([-1.0]),
        offset=0.0,
        lower=np.zeros(1),
        upper=np.array([np.inf]),
        matrix=np.array([[1.0]]),
        row_lower=np.array([0.0]),
        row_upper=np.array([np.inf]),
        row_names=("ray",),
        prompts=1.0,
    )
    with pytest.raises(SolverError, match="HiGHS ended with status 'Unbounded'"):
        run(endless, endless.cost, 0.0)


# ------------------------------------------------------------------ what the solver's tolerance cannot decide


def one_variable(*, end: float) -> Program:
    """min x for 2 <= x, in a row, and 0 <= x <= end."""
    return Program(
        cost=np.array([1.0]),
        offset=0.0,
        lower=np.zeros(1),
        upper=np.array([end]),
        matrix=np.array([[1.0]]),
        row_lower=np.array([2.0]),
        row_upper=np.array([np.inf]),
        row_names=("two",),
        prompts=1.0,
    )


@pytest.mark.parametrize(
    ("dual", "bound"),
    [
        (1.0, 2.0),  # the optimal dual: the optimum
        (0.5, 1.0),  # half of the row, and x itself is at least 0
        (2.0, -6.0),  # twice the row is 4; what is left costs -1 each, up to 10
        (-1.0, 0.0),  # the row has no upper end: a dual of that sign proves nothing
    ],
)
def test_the_bound_from_duals_is_what_they_prove(dual: float, bound: float) -> None:
    program = one_variable(end=10.0)
    assert lower_bound(program, program.cost, 0.0, np.array([dual])) == pytest.approx(bound, abs=1e-12)
    assert lower_bound(program, program.cost, 5.0, np.array([dual])) == pytest.approx(5 + bound, abs=1e-12)


def test_duals_that_need_an_end_prove_nothing_without_one() -> None:
    program = one_variable(end=np.inf)
    assert lower_bound(program, program.cost, 0.0, np.array([2.0])) == -np.inf


@FORMULATIONS
def test_no_duals_prove_more_than_the_optimum(name: str) -> None:
    feasible = 0
    for seed in range(40):
        question = any_question(seed, name, single=seed % 2 == 0)
        program = build(question)
        answer = run(program, program.cost, program.offset)
        optimum = least_ms(question, cbc())
        if answer is None or optimum is None:
            continue
        feasible += 1
        assert answer.bound == pytest.approx(optimum, rel=1e-6)
        rng = np.random.default_rng(seed)
        for spread in (1e-6, 0.1, 3.0):
            duals = answer.duals * (1 + spread * rng.standard_normal(len(answer.duals)))
            assert lower_bound(program, program.cost, program.offset, duals) <= optimum * (1 + 1e-7)
    assert feasible > 5


class Buffered(Toy):
    """The GPU needs a buffer of 10 GB for weights that are elsewhere (a part of it for a part of them)."""

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        gpu, *others = super().peaks(case, amounts)
        return [Peak("gpu", "decode", gpu.bytes + amounts.weights.off_gpu * 10e9), *others]


def buffered(*, gpu: float, disk: float, shape: tuple[int, int]) -> Question:
    question = toy(gpu=gpu, cpu=100, disk=disk)
    case = dataclasses.replace(question.case, shape=Shape.exactly(*shape))
    return dataclasses.replace(question, formulation=Buffered(), case=case)


BLOCKS_OF_ALL_SIZES = pytest.mark.parametrize(
    "shape", [(5, 4), (5, 10_000), (31_623, 4), (31_623, 10_000), (31_623, 100_000)]
)


@BLOCKS_OF_ALL_SIZES
@pytest.mark.parametrize("disk", [1e3, 1e9, 1e10])
def test_what_no_disk_mends_does_not_fit_however_many_prompts_share_the_weights(
    shape: tuple[int, int], disk: float
) -> None:
    # 60 GB of weights on the GPU or 10 GB for their buffer: 5 GB hold neither. Counted per prompt, 31,623 × 10,000
    # prompts have 2e-7 bytes of weights beside 2 GB of cache.
    assert solve(buffered(gpu=5, disk=disk, shape=shape)) is None


@BLOCKS_OF_ALL_SIZES
def test_weights_count_however_many_prompts_share_them(shape: tuple[int, int]) -> None:
    # 15 GB of GPU hold the buffer and the cache of 2.5 prompts. Weights are streamed in 3 s, which hides in decode;
    # the other prompts take 0.2 s each. (A GB for cache saves 0.1 s, for weights 3 s / 50.)
    solution = solve(buffered(gpu=15, disk=1e10, shape=shape))
    prompts = shape[0] * shape[1]
    assert block_s(solution) == pytest.approx(3 + 0.2 * (prompts - 2.5), rel=1e-9)
    assert solution is not None
    assert solution.fits
    assert sum(solution.amounts[:3]) == pytest.approx(solution.amounts[BLOCKS], rel=1e-6)


def a_little_over(program: Program) -> Program:
    """The program whose limits of memory are a ten-thousandth larger."""
    matrix = program.matrix.copy()
    matrix[["_memory_" in name for name in program.row_names], BLOCKS] *= 1 + 1e-4
    return dataclasses.replace(program, matrix=matrix)


def test_splits_that_exceed_a_limit_are_looked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the solver's tolerance were a ten-thousandth: the 40 GB of the hand-solved trade would become 40.004 GB.
    monkeypatch.setattr(optimum, "run", lambda program, *rest: run(a_little_over(program), *rest))
    solution = solve(toy(gpu=40, cpu=1000, disk=0))
    assert solution is not None
    assert solution.fits
    weights, cache, _ = solution.splits()
    assert 39.98 < weights.gpu * 60 + cache.gpu * 40 <= 40
    # The bound is still that of the first answer, 60.004 GB / 15: what the lower limit costs is not proven.
    assert block_s(solution) == pytest.approx((100 - 40.004) / 15, rel=1e-9)


def test_splits_that_exceed_every_limit_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    # 100 GB in 40 + 59.999: a solver that finds room for them is not believed.
    monkeypatch.setattr(optimum, "run", lambda program, *rest: run(a_little_over(program), *rest))
    solution = solve(toy(gpu=40, cpu=59.999, disk=0))
    assert solution is not None
    assert not solution.fits


class KeptForParts(Toy):
    """And three GB on the GPU for every tier that holds cache."""

    def peaks(self, case: Case, amounts: Amounts[Any]) -> list[Peak]:
        gpu, *others = super().peaks(case, amounts)
        return [Peak("gpu", "decode", gpu.bytes + case.parts(amounts, "cache") * 3e9), *others]


def test_what_is_kept_for_parts_is_counted_by_their_share_until_they_are_settled() -> None:
    # 40 GB of cache on two tiers: its shares add up to one part of 3 GB, while two parts take 6 of 40 GB.
    open_question = dataclasses.replace(toy(gpu=40, cpu=1000, disk=0), formulation=KeptForParts())
    relaxed = solve(open_question)
    assert relaxed is not None
    weights, cache, _ = relaxed.splits()
    assert 0 < cache.gpu < 1
    assert weights.gpu * 60 + cache.gpu * 40 == pytest.approx(37)
    assert not relaxed.fits
    both = frozenset({("cache", "gpu"), ("cache", "cpu")})
    settled = solve(dataclasses.replace(open_question, case=dataclasses.replace(open_question.case, used=both)))
    assert settled is not None
    assert settled.fits
    weights, cache, _ = settled.splits()
    assert weights.gpu * 60 + cache.gpu * 40 == pytest.approx(34)
    assert block_s(relaxed) < block_s(settled)


# ------------------------------------------------------------------ the formulas are linear


@FORMULATIONS
@settings(max_examples=60)
@given(rng=RANDOMS)
def test_coefficients_times_amounts_are_the_formulas(name: str, rng: random.Random) -> None:
    formulation, model = get(name), any_model(rng, flexgen=name == "flexgen")
    workload = Workload(prompt_len=rng.choice([1, 64, 500]), gen_len=rng.choice([2, 40]))
    hardware = any_machine(rng, gpu_bytes=16e9, cpu_bytes=64e9, disk_bytes=1e12)
    switches = any_switches(rng, formulation, hardware)
    weights, cache, hidden = any_splits(rng, disk_activations=formulation.activations_on_disk)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=hidden,
        gpu_batch_size=rng.randint(1, 300),
        num_gpu_batches=rng.randint(1, 50),
        **dataclasses.asdict(switches),
    )
    case = case_of(policy, hardware, model, workload)
    numbers, units = amounts_of(policy), unit_amounts()
    kinds = (numbers.weights, numbers.cache, numbers.activations)
    values = [getattr(kind, tier) for kind in kinds for tier in TIERS]
    vector = np.array([*values, numbers.blocks, numbers.prompts])
    assert (BLOCKS, PROMPTS) == (9, 10)

    def same(coefficients: Any, number: Any) -> None:
        assert float(coefficients @ vector) == pytest.approx(float(number), rel=1e-12, abs=1e-300)

    context_len = workload.prompt_len + rng.uniform(1, 40)
    for rows, plain in (
        (formulation.prefill(case, units), formulation.prefill(case, numbers)),
        (formulation.decode(case, units, context_len), formulation.decode(case, numbers, context_len)),
    ):
        assert [stage.name for stage in rows] == [stage.name for stage in plain]
        for row, stage in zip(rows, plain, strict=True):
            for resource, seconds in stage.busy.items():
                same(row.busy[resource], seconds)
            for track, seconds in zip(row.tracks, stage.tracks, strict=True):
                same(track.spread, seconds.spread)
                same(track.lasting, seconds.lasting)
                assert (track.first_batch is None) == (seconds.first_batch is None)
                if track.first_batch is not None:
                    same(track.first_batch, seconds.first_batch)
            assert (row.serial is None) == (stage.serial is None)
            if row.serial is not None:
                same(row.serial, stage.serial)
    for peak, number in zip(formulation.peaks(case, units), formulation.peaks(case, numbers), strict=True):
        same(peak.bytes, number.bytes)


@FORMULATIONS
@settings(max_examples=60)
@given(rng=RANDOMS)
def test_the_optimum_is_the_estimate_of_its_policy(name: str, rng: random.Random) -> None:
    problem = any_problem(rng, name)
    switches, shape = problem.switches[0], Shape.exactly(rng.randint(1, 40), rng.randint(1, 12))
    relaxed = solve(problem.question(switches, shape, segments=1000))
    if relaxed is None:
        return
    cost = cost_of(problem, problem.policy(switches, shape, relaxed.splits()))
    assert cost.feasible is relaxed.fits
    assert block_s(relaxed) <= cost.latency_s * (1 + 1e-6)  # which counts calls by what they are for
    settled = only(parts_of(relaxed.splits()))
    solution = solve(problem.question(switches, shape, 1000, settled))
    if solution is None:
        assert not relaxed.fits
        return
    assert block_s(relaxed) <= block_s(solution) * (1 + 1e-6)
    cost = cost_of(problem, problem.policy(switches, shape, solution.splits()))
    assert cost.feasible
    if parts_of(solution.splits()) == settled.used:
        assert cost.latency_s == pytest.approx(block_s(solution), rel=1e-6)
    else:
        assert cost.latency_s <= block_s(solution) * (1 + 1e-6)


def only(used: frozenset[Part]) -> Decided:
    """These parts in use and no others."""
    return Decided(used=used, unused=frozenset(PARTS) - used)


# ------------------------------------------------------------------ against other solvers


def cbc() -> pulp.LpSolver:
    """The CBC program that PuLP 3 ships."""
    return pulp.COIN_CMD(path=pulp.apis.coin_api.pulp_cbc_path, msg=False)


def least_ms(question: Question, solver: pulp.LpSolver) -> float | None:
    """The optimum of the readable model, or ``None`` where the solver finds it infeasible."""
    problem = readable(question)
    status = problem.solve(solver)
    if status == pulp.LpStatusInfeasible:
        return None
    assert status == pulp.LpStatusOptimal, pulp.LpStatus[status]
    return float(pulp.value(problem.objective))


def any_question(seed: int, name: str, *, single: bool) -> Question:
    """A question with a range or a single shape, at times with fixed splits or a latency limit."""
    rng = random.Random(seed)
    problem = any_problem(rng, name)
    shape = any_shape(rng, most=12)
    if single:
        shape = inside(rng, shape)
    splits = any_splits(rng, disk_activations=problem.formulation.activations_on_disk)
    problem = dataclasses.replace(problem, splits=splits if rng.random() < 0.2 else None)
    free = solve(problem.question(problem.switches[0], shape, 4))
    if free is not None and rng.random() < 0.4:
        limited = dataclasses.replace(problem.workload, max_latency_s=block_s(free) * rng.choice([0.5, 0.9, 1.1]))
        problem = dataclasses.replace(problem, workload=limited)
    decided = any_decided(rng) if problem.splits is None else Decided()
    return problem.question(problem.switches[0], shape, 4, decided)


def any_decided(rng: random.Random) -> Decided:
    """Often nothing; at times parts in use, and one that is not."""
    if rng.random() < 0.5:
        return Decided()
    used = frozenset(part for part in PARTS if rng.random() < 0.5)
    others = sorted(frozenset(PARTS) - used)
    return Decided(used=used, unused=frozenset([rng.choice(others)]) if others else frozenset())


@FORMULATIONS
@pytest.mark.parametrize("single", [True, False], ids=["single shape", "range"])
def test_three_solvers_agree(name: str, single: bool) -> None:
    feasible = 0
    for seed in range(60):
        question = any_question(seed, name, single=single)
        direct = solve(question)
        highs, coin = least_ms(question, pulp.HiGHS(msg=False)), least_ms(question, cbc())
        if direct is None:
            assert (highs, coin) == (None, None), seed
            continue
        feasible += 1
        assert highs == pytest.approx(direct.seconds * 1e3, rel=1e-6), seed
        assert coin == pytest.approx(direct.seconds * 1e3, rel=1e-6), seed
    assert 15 <= feasible <= 55  # both outcomes occur


@FORMULATIONS
def test_a_solver_that_shares_no_code_agrees(name: str) -> None:
    feasible = 0
    for seed in range(40):
        rng = random.Random(1000 + seed)
        problem = any_problem(rng, name)
        switches, shape = problem.switches[0], Shape.exactly(rng.randint(1, 24), rng.randint(1, 8))
        relaxed = solve(problem.question(switches, shape, segments=1000))
        other = best_policy_of_shape(problem, switches, shape)
        assert (relaxed is None) == (other is None), seed
        if relaxed is not None and other is not None:
            feasible += 1
            assert block_s(relaxed) <= other.cost.latency_s * (1 + 1e-6), seed
            used = parts_of((other.policy.weights, other.policy.cache, other.policy.activations))
            direct = solve(problem.question(switches, shape, 1000, only(used)))
            assert block_s(direct) == pytest.approx(other.cost.latency_s, rel=1e-6), seed
    assert 5 <= feasible <= 39


@FORMULATIONS
def test_every_constraint_has_a_name(name: str) -> None:
    for seed in range(6):
        question = any_question(seed, name, single=seed % 2 == 0)
        names = [str(constraint.name) for constraint in readable(question).constraints()]
        assert not [constraint for constraint in names if constraint.startswith("_")]  # what PuLP makes up
        rows = build(question).row_names
        assert len(set(rows)) == len(rows)
        # What is a bound of a variable in the program of coefficients stands as a row in the readable one.
        bounds = {f"{kind}_{tier}_as_given" for kind in KINDS for tier in TIERS}
        bounds |= {f"no_{kind}_on_{tier}" for kind, tier in PARTS}
        assert set(names) - bounds == set(rows) - bounds


# ------------------------------------------------------------------ a range bounds its shapes


@FORMULATIONS
@settings(max_examples=300)
@given(rng=RANDOMS)
def test_no_shape_of_a_range_beats_its_bound(name: str, rng: random.Random) -> None:
    problem = any_problem(rng, name)
    switches, whole = problem.switches[0], any_shape(rng, most=rng.choice([6, 40, 400]))
    decided = any_decided(rng)
    bound = solve(problem.question(switches, whole, 2, decided))
    for _ in range(3):
        shape = inside(rng, whole)
        single = solve(problem.question(switches, shape, 1000, decided))
        if single is None:
            continue
        assert bound is not None
        assert bound.seconds_per_prompt <= single.seconds_per_prompt * (1 + 1e-7)


@FORMULATIONS
@settings(max_examples=100)
@given(rng=RANDOMS)
def test_each_coefficient_of_a_range_is_the_least_of_its_shapes(name: str, rng: random.Random) -> None:
    # The premise of the bound, term by term: an optimum seldom rests on all of them.
    problem = any_problem(rng, name)
    whole = any_shape(rng, most=rng.choice([6, 400]))
    units, decided = unit_amounts(), any_decided(rng)

    def at(shape: Shape) -> tuple[list[Any], list[Any], list[float]]:
        case = problem.question(problem.switches[0], shape, 1, decided).case
        stages = [
            *problem.formulation.prefill(case, units),
            *problem.formulation.decode(case, units, case.workload.prompt_len + 7.5),
        ]
        rows = [track.lasting for stage in stages for track in stage.tracks]
        rows += [seconds for stage in stages if stage.has_first_batch for seconds in stage.first_batch_seconds()]
        rows += [plain for stage in stages if (plain := stage.plain_seconds()) is not None]
        shares = [stage.later_batches_share for stage in stages]
        return rows, [peak.bytes for peak in problem.formulation.peaks(case, units)], shares

    ranges, singles = at(whole), at(inside(rng, whole))
    for lower, exact in zip(ranges, singles, strict=True):
        assert len(lower) == len(exact)
        for bound, value in zip(lower, exact, strict=True):
            assert np.all(np.asarray(bound) >= 0)
            assert np.all(np.asarray(bound) <= np.asarray(value) * (1 + 1e-12))


@FORMULATIONS
@settings(max_examples=60)
@given(rng=RANDOMS)
def test_a_range_bounds_each_half_of_itself(name: str, rng: random.Random) -> None:
    problem = any_problem(rng, name)
    switches, whole = problem.switches[0], any_shape(rng, most=100)
    ends = inside(rng, whole)
    part = dataclasses.replace(whole, gpu_batch_low=ends.gpu_batch_low, batches_high=ends.batches_low)
    larger, smaller = (solve(problem.question(switches, shape, segments=1)) for shape in (whole, part))
    if smaller is not None:
        assert larger is not None
        assert larger.seconds_per_prompt <= smaller.seconds_per_prompt * (1 + 1e-7)


# ------------------------------------------------------------------ neighbouring steps share a context


@settings(max_examples=40)
@given(rng=RANDOMS)
def test_fewer_contexts_never_overstate_the_time(rng: random.Random) -> None:
    problem = any_problem(rng, "roofline")
    gen_len = rng.choice([3, 17, 64])
    problem = dataclasses.replace(problem, workload=dataclasses.replace(problem.workload, gen_len=gen_len))
    switches, shape = problem.switches[0], Shape.exactly(rng.randint(1, 20), rng.randint(1, 8))
    solutions = [solve(problem.question(switches, shape, segments)) for segments in (1, 2, 4, 1000)]
    if solutions[-1] is None:
        return
    exact = block_s(solutions[-1])
    times = [block_s(solution) for solution in solutions]
    assert all(time <= exact * (1 + 1e-7) for time in times)
    policy = problem.policy(switches, shape, solutions[-1].splits())
    # Calls counted by the share of a batch, as the programs above count them.
    case = dataclasses.replace(
        case_of(policy, problem.hardware, problem.model, problem.workload), used=frozenset[Part]()
    )
    assert sum(block_seconds(problem.formulation, case, policy)) == pytest.approx(exact, rel=1e-6)


class Crossing(Toy):
    """A decode step lasts 200 s or as many seconds as it has context, whichever is longer."""

    def decode(self, case: Case, amounts: Amounts[Any], context_len: Any) -> list[Stage]:
        return [_stage(case, amounts.blocks * 200.0, amounts.blocks * context_len)]


def test_more_contexts_close_the_gap() -> None:
    # A prompt token and 400 more: contexts 2 to 400. Exactly: 199 steps of 200 s, then 201 + … + 400 = 60100 s.
    # With the mean context, 201, alone: 399 steps of 201 s. In halves: 200 of 200 s, 199 of 301 s.
    workload = Workload(prompt_len=1, gen_len=400)

    def seconds(segments: int) -> float:
        contexts = tuple(Crossing().decode_contexts(workload, segments))
        return block_s(
            solve(dataclasses.replace(toy(gpu=200, cpu=0, disk=0), formulation=Crossing(), contexts=contexts))
        )

    assert seconds(1) == pytest.approx(399 * 201, rel=1e-9)
    assert seconds(2) == pytest.approx(200 * 200 + 199 * 301, rel=1e-9)
    assert seconds(399) == pytest.approx(199 * 200 + 60100, rel=1e-9)
    times = [seconds(segments) for segments in (1, 2, 4, 8, 16, 64, 399)]
    assert times == pytest.approx(sorted(times), rel=1e-12)


@pytest.mark.parametrize("segments", [1, 2, 3, 7, 30, 31, 64])
@pytest.mark.parametrize("gen_len", [1, 2, 5, 32])
def test_contexts_cover_every_step_once(segments: int, gen_len: int) -> None:
    workload = Workload(prompt_len=100, gen_len=gen_len)
    contexts = get("roofline").decode_contexts(workload, segments)
    assert len(contexts) == min(segments, gen_len - 1)
    # Step i attends to the prompt and the tokens generated so far, its own among them: 101, 102, …
    steps = [100.0 + i for i in range(1, gen_len)]
    assert sum(count for _, count in contexts) == len(steps)
    assert sum(context * count for context, count in contexts) == pytest.approx(sum(steps))
    assert get("roofline").decode_contexts(workload) == [(step, 1) for step in steps]


# ------------------------------------------------------------------ among equals


@settings(max_examples=40)
@given(rng=RANDOMS)
def test_the_tidy_optimum_is_as_fast_and_moves_nothing_down(rng: random.Random) -> None:
    problem = any_problem(rng, "roofline")
    question = problem.question(problem.switches[0], Shape.exactly(rng.randint(1, 24), rng.randint(1, 6)), 1000)
    first, tidy = solve(question), solve_lexicographic(question)
    assert (first is None) == (tidy is None)
    if first is None or tidy is None:
        return
    assert tidy.seconds == pytest.approx(first.seconds, rel=1e-6)
    on_disk = [question_bytes(question, solution, "disk") for solution in (first, tidy)]
    limit = max(question.limits.values())
    assert on_disk[1] <= on_disk[0] + 1e-6 * limit
    # No policy with a hundredth of the tiers' bytes less on disk is as fast.
    if on_disk[1] > 0.02 * limit:
        tighter = {**question.limits, "disk": on_disk[1] - 0.01 * limit}
        slower = solve(dataclasses.replace(question, limits=tighter))
        assert slower is None or slower.seconds > first.seconds * (1 + 1e-10)


def question_bytes(question: Question, solution: Solution, tier: str) -> float:
    """Bytes that one tier holds, from the formulas."""
    peaks = question.formulation.peaks(question.case, unit_amounts())
    vector = np.append(solution.amounts[:PROMPTS], solution.prompts)
    largest = max(float(peak.bytes @ vector) for peak in peaks if peak.tier == tier)
    return largest / float(solution.amounts[BLOCKS])


# ------------------------------------------------------------------ sizes


@pytest.mark.parametrize("shrink", [1.0, 1e-3, 1e-6])
def test_small_machines_are_solved_as_well_as_large_ones(shrink: float) -> None:
    # A fixed tolerance of a solver must not decide what fits a machine of kilobytes (a model of a unit test).
    for seed in range(12):
        rng = random.Random(seed)
        width = {1.0: 1024, 1e-3: 128, 1e-6: 16}[shrink]
        model = plain_model(num_layers=4, hidden_size=width, num_heads=4, vocab_size=round(5e7 * shrink) + 10)
        workload = Workload(prompt_len=20, gen_len=3)
        hardware = any_machine(rng, **roomy_for(rng, model, workload.total_len, logarithmic(rng, 1, 20)))
        formulation = get("roofline")
        switches = any_switches(rng, formulation, hardware)
        problem = Problem(
            formulation=formulation,
            hardware=hardware,
            model=model,
            workload=workload,
            limits=hardware.capacity_bytes,
            switches=(switches,),
        )
        for batches in (1, 30):
            solution = solve(problem.question(switches, Shape.exactly(2, batches), 10))
            if solution is not None:
                cost = cost_of(problem, problem.policy(switches, Shape.exactly(2, batches), solution.splits()))
                assert cost.feasible, (seed, batches, cost.peak_bytes, cost.limit_bytes)
                assert cost.latency_s == pytest.approx(block_s(solution), rel=1e-6)
