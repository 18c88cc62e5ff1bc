import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from costmodel.errors import InputError
from runtime import attention


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_definition(q, k, v, seen, scale, bias=None):
    """Softmax attention in float64, one row at a time over the keys it sees; seen (batch, queries, keys)."""
    batch, heads, queries, dim = q.shape
    groups = heads // k.shape[1]
    out = torch.zeros(batch, heads, queries, dim, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keys = seen[b, i].nonzero().flatten()
                if len(keys):
                    scores = k[b, h // groups, keys].double() @ q[b, h, i].double() * scale
                    if bias is not None:
                        scores = scores + bias[b, h, i, keys].double()
                    out[b, h, i] = scores.softmax(0) @ v[b, h // groups, keys].double()
    return out


def left_padded(lengths: list[int], tokens: int) -> torch.Tensor:
    return torch.tensor([[position >= tokens - length for position in range(tokens)] for length in lengths])


MASKS = {
    "none": None,
    "left": left_padded([7, 3, 7], 7),
    "empty row": left_padded([0, 1, 5], 7),
    "right": left_padded([7, 3, 4], 7).flip(1),
    "holes": torch.tensor([[1, 0, 1, 1, 0, 1, 1], [0, 1, 0, 0, 1, 0, 1], [1, 1, 1, 1, 1, 1, 0]]).bool(),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_bias", [False, True])
def test_prefill_is_softmax_attention(mask, kv_heads, with_bias):
    q, k, v = random(3, 4, 7, 16), random(3, kv_heads, 7, 16, seed=1), random(3, kv_heads, 7, 16, seed=2)
    bias = random(3, 4, 7, 7, seed=3) if with_bias else None
    real = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & real[:, None, :]
    expected = by_definition(q, k, v, seen, 0.3, bias)
    ours = attention.prefill(q, k, v, scale=0.3, key_padding_mask=mask, bias=bias)
    assert ours.isfinite().all()
    rows = real[:, None, :].expand(3, 4, 7)
    torch.testing.assert_close(ours[rows].double(), expected[rows], rtol=1e-5, atol=1e-5)


def windowed(tokens: int, window: int | None) -> torch.Tensor:
    """True where a query (row) sees a key."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return seen if window is None else seen & ~seen.tril(-window)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize("sloped", [False, True])
def test_prefill_with_slopes_and_windows_is_softmax_attention(mask, window, sloped):
    """Masks with holes take the way of a CUDA device, through a table of the whole bias."""
    q, k, v = random(3, 4, 7, 16), random(3, 2, 7, 16, seed=1), random(3, 2, 7, 16, seed=2)
    slopes = torch.tensor([0.5, 0.25, 2.0, 0.1]) if sloped else None
    distance = (torch.arange(7)[None, :] - torch.arange(7)[:, None]).float()
    bias = slopes[None, :, None, None] * distance.expand(3, 1, 7, 7) if sloped else None
    real = torch.ones(3, 7, dtype=torch.bool) if mask is None else mask
    expected = by_definition(q, k, v, windowed(7, window) & real[:, None, :], 0.3, bias)
    ours = attention.prefill(q, k, v, scale=0.3, key_padding_mask=mask, slopes=slopes, window=window)
    assert ours.isfinite().all()
    rows = real[:, None, :].expand(3, 4, 7)
    torch.testing.assert_close(ours[rows].double(), expected[rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 50, 128, 200])
@pytest.mark.parametrize("sloped", [False, True])
def test_blocks_of_a_long_prompt_are_one_softmax(dtype, window, sloped, monkeypatch):
    """Several blocks of queries, and of heads and prompts."""
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 3 * 128 * 300)
    tokens = 300
    q, k, v = (random(2, 4, tokens, 8, seed=seed, dtype=dtype) for seed in range(3))
    slopes = torch.tensor([0.5, 0.02, 0.2, 0.1]) if sloped else None
    bias = torch.zeros(1, 4, tokens, tokens)
    if sloped:
        bias = bias + slopes[None, :, None, None] * (torch.arange(tokens)[None, :] - torch.arange(tokens)[:, None])
    scores = (q.float() @ k.float().transpose(2, 3)) * 0.3 + bias
    scores = scores.masked_fill(~windowed(tokens, window), -torch.inf)
    expected = scores.softmax(-1) @ v.float()
    ours = attention.prefill(q, k, v, scale=0.3, slopes=slopes, window=window).float()
    tolerance = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance)


def test_no_row_of_a_mask_is_empty():
    """Kernels differ in what they make of an empty row: zeros on a CPU today, NaN elsewhere."""
    mask = attention.causal_mask(7, MASKS["empty row"])
    assert mask.any(-1).all()
    real = MASKS["empty row"][:, None, :, None].expand_as(mask)
    seen = torch.ones(7, 7, dtype=torch.bool).tril() & MASKS["empty row"][:, None, None, :]
    assert torch.equal(mask[real], seen[real])


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5),
    kv_heads=st.sampled_from([1, 2, 4]),
    room=st.integers(9, 40),
    with_bias=st.booleans(),
    whole=st.booleans(),
)
def test_decode_sees_the_masked_tokens_and_no_room(lengths, kv_heads, room, with_bias, whole):
    batch = len(lengths)
    q = random(batch, 4, 1, 8)
    k, v = random(batch, kv_heads, room, 8, seed=1), random(batch, kv_heads, room, 8, seed=2)
    bias = random(batch, 4, 9, seed=3) if with_bias else None
    mask = left_padded(lengths, 9)
    expected = by_definition(
        q, k[:, :, :9], v[:, :, :9], mask[:, None], 0.5, None if bias is None else bias[:, :, None]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_read_whole", lambda cache, tokens: whole)
        ours = attention.decode(q, k, v, scale=0.5, mask=mask, bias=bias)
    assert ours.isfinite().all()
    rows = torch.tensor(lengths) > 0
    torch.testing.assert_close(ours[rows].double(), expected[rows], rtol=1e-5, atol=1e-5)


def test_decode_without_a_mask_sees_all():
    q, k, v = random(2, 4, 1, 8), random(2, 4, 5, 8, seed=1), random(2, 4, 5, 8, seed=2)
    expected = functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(attention.decode(q, k, v, scale=0.5), expected)


def test_decode_takes_a_view_of_a_larger_cache():
    q, k, v = random(2, 4, 1, 8), random(2, 4, 9, 8, seed=1), random(2, 4, 9, 8, seed=2)
    expected = functional.scaled_dot_product_attention(q, k[:, :, :5], v[:, :, :5], scale=0.5)
    torch.testing.assert_close(attention.decode(q, k[:, :, :5], v[:, :, :5], scale=0.5), expected)


@pytest.mark.parametrize("room", [64, 100, 1000])
def test_bf16_decode_agrees_with_fp32(room):
    """Tolerance: weights and result are rounded to 2⁻⁹, scores of size about 1 too."""
    q, k, v = (random(2, 4, n, 64, seed=n, dtype=torch.bfloat16) for n in (1, room, room))
    mask = left_padded([64, 20], 64)
    ours = attention.decode(q, k, v, scale=0.125, mask=mask)
    assert ours.dtype == torch.bfloat16
    expected = attention.decode(q.float(), k.float(), v.float(), scale=0.125, mask=mask)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("dtype", "room", "whole"), [(torch.bfloat16, 40, True), (torch.bfloat16, 41, False), (torch.float32, 12, False)]
)
def test_the_room_is_read_only_where_that_saves_a_copy(dtype, room, whole):
    cache = torch.zeros(2, 2, room, 8, dtype=dtype)
    assert attention._read_whole(cache, 10) is whole
    assert not attention._read_whole(cache[:, :, :11], 10)


def test_a_growing_cache_is_read_in_few_lengths():
    few, many = (torch.empty((rows, 1, 0, 64), dtype=torch.bfloat16) for rows in (1024, 1025))

    def read(tokens: int, cache: torch.Tensor = many) -> int:
        return attention.tokens_read(tokens, 6000, cache)

    assert [read(tokens) for tokens in (1, 16, 17, 128, 129, 256, 257)] == [16, 16, 32, 128, 160, 256, 320]
    assert [read(tokens, few) for tokens in (1, 64, 65, 256, 257, 513)] == [64, 64, 128, 256, 320, 640]
    assert all(tokens <= read(tokens) < 1.25 * tokens for tokens in range(64, 5000))
    assert len({read(tokens) for tokens in range(513, 1025)}) == 4
    assert attention.tokens_read(1025, 1030, many) == 1030, "never beyond the room"
    assert attention.tokens_read(20, 40, few) == 40
    assert attention.tokens_read(1025, 6000, many.float()) == 1040, "nothing is compiled for 32 bits"


def test_bf16_prefill_agrees_with_fp32():
    q, k, v = (random(2, 4, 40, 64, seed=n, dtype=torch.bfloat16) for n in range(3))
    mask = left_padded([40, 11], 40)
    ours = attention.prefill(q, k, v, scale=0.125, key_padding_mask=mask)
    expected = attention.prefill(q.float(), k.float(), v.float(), scale=0.125, key_padding_mask=mask)
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=0.02)


def test_large_scores_do_not_overflow():
    q, k, v = random(2, 2, 6, 8) * 1e3, random(2, 2, 6, 8, seed=1) * 1e3, random(2, 2, 6, 8, seed=2)
    mask = left_padded([6, 2], 6)
    assert attention.prefill(q, k, v, scale=1.0, key_padding_mask=mask).isfinite().all()
    assert attention.decode(q[:, :, -1:], k, v, scale=1.0, mask=mask).isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda q: attention.prefill(q, q[:, :, :3], q[:, :, :3], scale=1.0), "a prompt attends to itself"),
        (lambda q: attention.prefill(q, q[:, :3], q[:, :3], scale=1.0), "q has shape"),
        (lambda q: attention.prefill(q[0], q[0], q[0], scale=1.0), "q, k and v have shapes"),
        (
            lambda q: attention.prefill(q, q, q, scale=1.0, key_padding_mask=torch.ones(2, 4).bool()),
            "key_padding_mask has shape",
        ),
        (lambda q: attention.decode(q, q, q, scale=1.0), "decode takes one"),
        (lambda q: attention.decode(q[:, :, :1], q, q, scale=1.0, mask=torch.ones(2, 6).bool()), "mask has shape"),
    ],
)
def test_bad_shapes_are_named(call, message):
    with pytest.raises(InputError, match=message):
        call(random(2, 4, 5, 8))
