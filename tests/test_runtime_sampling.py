"""Choosing tokens: the distributions are those of transformers, the random numbers those of the request."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from costmodel.errors import InputError, TierwiseError
from runtime.sampling import Sampler, SamplingParams, warped

VOCABULARY = 61


def logits(rows: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, ties: bool = False) -> torch.Tensor:
    values = torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3
    return (values.round() if ties else values).to(dtype)


def by_transformers(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The scores as ``generate(do_sample=True)`` warps them."""
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    warpers = [TemperatureLogitsWarper(params.temperature)] if params.temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k=params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(top_p=params.top_p)] if params.top_p < 1 else []
    scores = scores.to(torch.float32)
    for warper in warpers:
        scores = warper(ids, scores)
    return scores


# ------------------------------------------------------------------ parameters


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("max_new_tokens", 0, "max_new_tokens is 0: it must be at least 1"),
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5: a whole number"),
        ("max_new_tokens", True, "a whole number"),
        ("temperature", -0.5, "temperature is -0.5: it must be at least 0"),
        ("temperature", math.nan, "temperature is nan"),
        ("temperature", math.inf, "finite"),
        ("temperature", "hot", "a number is expected"),
        ("top_k", -1, "top_k is -1: it must be at least 0"),
        ("top_p", 1.01, r"top_p is 1.01: it must lie in \[0, 1\]"),
        ("top_p", math.nan, "top_p is nan"),
        ("seed", 2**63, "seed is 9223372036854775808: it must be at most"),
        ("stop", ["a", 7], r"stop is \['a', 7\]: a string or a sequence of strings"),
        ("stop", 7, "stop is 7: a string or a sequence of strings"),
        ("stop", b"end", "a string or a sequence of strings"),
        ("stop", {"a"}, "a string or a sequence of strings"),
        ("stop", ("a", ""), "empty string"),
        ("stop", "", "empty string"),
        ("ignore_eos", "yes", "true or false"),
    ],
)
def test_wrong_parameters_are_told_by_name_value_and_limit(field: str, value: object, told: str) -> None:
    with pytest.raises(InputError, match=told):
        SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("given", "kept"), [("end", ("end",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), ([], ()), ((), ())]
)
def test_stop_is_one_string_or_a_sequence_of_them(given: str | list[str], kept: tuple[str, ...]) -> None:
    params = SamplingParams(stop=given)
    assert params.stop == kept
    assert params == SamplingParams(stop=kept)
    assert hash(params) == hash(SamplingParams(stop=kept))


def test_default_is_greedy() -> None:
    assert SamplingParams().greedy


# ------------------------------------------------------------------ greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_largest_in_fp32(dtype: torch.dtype) -> None:
    scores = logits(50, dtype=dtype, ties=True)
    chosen = Sampler([SamplingParams()] * 50, range(50)).choose(scores, 0)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == [row.index(max(row)) for row in scores.float().tolist()]
    assert chosen.tolist() == scores.to(torch.float32).argmax(-1).tolist()


def test_greedy_rows_stay_greedy_beside_sampled_ones() -> None:
    scores = logits(6)
    params = [SamplingParams(), SamplingParams(temperature=1.5, seed=1)] * 3
    chosen = Sampler(params, range(6)).choose(scores, 0)
    assert chosen[0::2].tolist() == scores[0::2].argmax(-1).tolist()


def test_top_k_of_one_is_greedy() -> None:
    scores = logits(4)
    chosen = Sampler([SamplingParams(temperature=2.0, top_k=1)] * 4, range(4)).choose(scores, 0)
    assert chosen.tolist() == scores.argmax(-1).tolist()


# ------------------------------------------------------------------ distributions


@given(
    temperature=st.floats(0.05, 5),
    top_k=st.one_of(st.just(0), st.integers(1, 2 * VOCABULARY)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    seed=st.integers(0, 1000),
    ties=st.booleans(),
)
def test_scores_are_those_of_transformers(temperature: float, top_k: int, top_p: float, seed: int, ties: bool) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p)
    scores = logits(3, seed=seed, ties=ties, dtype=torch.bfloat16)
    assert torch.equal(warped(scores, [params] * 3), by_transformers(scores, params))


def test_every_row_has_its_own_parameters() -> None:
    params = [
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.0, top_k=5),
        SamplingParams(temperature=1.3, top_p=0.6),
        SamplingParams(temperature=2.0, top_k=9, top_p=0.3),
    ]
    scores = logits(4)
    alone = torch.cat([by_transformers(scores[row : row + 1], one) for row, one in enumerate(params)])
    assert torch.equal(warped(scores, params), alone)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, seed=3),
        SamplingParams(temperature=0.6, top_k=12, seed=4),
        SamplingParams(temperature=1.7, top_p=0.8, seed=5),
    ],
    ids=["plain", "top-k", "top-p"],
)
def test_tokens_follow_the_distribution(params: SamplingParams) -> None:
    draws = 20_000
    row = logits(1, seed=8)
    chosen = Sampler([params] * draws, range(draws)).choose(row.expand(draws, -1), 0)
    counts = torch.bincount(chosen, minlength=VOCABULARY)
    expected = by_transformers(row, params).softmax(-1)[0].double() * draws
    assert counts[expected == 0].sum() == 0
    likely = expected >= 5  # the usual rule for the chi-square test; the others are one class
    observed = [*counts[likely].tolist(), int(counts[~likely].sum())]
    wanted = [*expected[likely].tolist(), float(expected[~likely].sum())]
    observed, wanted = (observed, wanted) if wanted[-1] > 0 else (observed[:-1], wanted[:-1])
    scale = sum(observed) / sum(wanted)
    assert stats.chisquare(observed, [value * scale for value in wanted]).pvalue > 1e-3


def test_steps_draw_independently() -> None:
    """Successive tokens of one sequence: the chi-square test of independence on pairs."""
    params, steps = SamplingParams(temperature=1.0, seed=11), 4000
    sampler = Sampler([params] * 2, [0, 1])
    flat = torch.zeros(2, 4)
    drawn = torch.stack([sampler.choose(flat, step) for step in range(steps)])
    pairs = torch.zeros(4, 4)
    across = torch.zeros(4, 4)
    for step in range(steps - 1):
        pairs[drawn[step, 0], drawn[step + 1, 0]] += 1
        across[drawn[step, 0], drawn[step, 1]] += 1
    assert stats.chi2_contingency(pairs.numpy()).pvalue > 1e-3
    assert stats.chi2_contingency(across.numpy()).pvalue > 1e-3


# ------------------------------------------------------------------ random numbers


def sampled(keys: list[int], *, seed: int | None = 7, steps: int = 8) -> dict[int, list[int]]:
    """The tokens of the requests ``keys`` in one batch; a request's logits depend on its key only."""
    sampler = Sampler([SamplingParams(temperature=1.0, seed=seed)] * len(keys), keys)
    scores = torch.cat([logits(1, seed=key) for key in keys])
    return dict(
        zip(keys, torch.stack([sampler.choose(scores, step) for step in range(steps)], 1).tolist(), strict=True)
    )


def test_a_request_draws_the_same_in_any_batch() -> None:
    together = sampled([5, 0, 3, 9])
    assert sampled([3]) == {3: together[3]}
    assert sampled([9, 5]) == {9: together[9], 5: together[5]}


def test_keys_seeds_and_steps_differ() -> None:
    scores = torch.zeros(2, VOCABULARY)
    sampler = Sampler([SamplingParams(temperature=1.0, seed=7)] * 2, [0, 1])
    tokens = torch.stack([sampler.choose(scores, step) for step in range(8)], 1).tolist()
    assert tokens[0] != tokens[1]
    assert len(set(tokens[0])) > 1
    assert sampled([0]) != sampled([0], seed=8)


def test_without_a_seed_runs_differ() -> None:
    assert sampled([0], seed=None, steps=16) != sampled([0], seed=None, steps=16)


def test_slices_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled(list(range(7)))
    monkeypatch.setattr("runtime.sampling._VALUES_AT_ONCE", 2 * VOCABULARY)
    assert sampled(list(range(7))) == whole


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    scores = torch.full((200, VOCABULARY), -math.inf)
    scores[:, [0, 17, 60]] = 0.0
    chosen = Sampler([SamplingParams(temperature=1.0, seed=1)] * 200, range(200)).choose(scores, 0)
    assert set(chosen.tolist()) == {0, 17, 60}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    scores = logits(2)
    scores[1, 4] = bad
    sampler = Sampler([SamplingParams(temperature=1.0)] * 2, [0, 1])
    with pytest.raises(TierwiseError, match="not finite"):
        sampler.choose(scores, 0)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="one of each per row"):
        Sampler([SamplingParams()], [0, 1])
    with pytest.raises(ValueError, match=r"\(1, vocabulary\) is expected"):
        Sampler([SamplingParams()], [0]).choose(logits(2), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_chooses_as_the_cpu_does() -> None:
    """Sums differ in their last bits there, which may move a rare number across a border."""
    rows = 512
    kinds = [
        SamplingParams(),
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(temperature=0.7, top_k=9, seed=2),
        SamplingParams(temperature=1.3, top_p=0.8, seed=3),
    ]
    sampler = Sampler([kinds[row % 4] for row in range(rows)], range(rows))
    scores = logits(rows)
    there = sampler.choose(scores.cuda(), 5)
    assert there.is_cuda
    same = there.cpu() == sampler.choose(scores, 5)
    assert same[0::4].all()
    assert same.float().mean() > 0.99
