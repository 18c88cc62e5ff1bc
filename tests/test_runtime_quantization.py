import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from costmodel.errors import InputError
from costmodel.model import COMPRESSED_BYTES_PER_VALUE
from runtime import quantization
from runtime.quantization import Quantized, Quantized4bitLinear

SIXTEEN_BIT = (torch.float16, torch.bfloat16)
DTYPES = (*SIXTEEN_BIT, torch.float32)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def round_trip(values: torch.Tensor, group_size: int = 64) -> torch.Tensor:
    quantized = quantization.quantize(values, group_size=group_size)
    return quantization.dequantize(quantized, dtype=torch.float32)


def unpacked_by_hand(quantized: Quantized) -> list[list[float]]:
    """The documented format read value by value in Python floats, for (rows, dim)."""
    rows, dim = quantized.shape
    result = []
    for row in range(rows):
        values, byte = [], 0
        edges = [*range(0, dim, quantized.group_size), dim]
        for group, (start, stop) in enumerate(pairwise(edges)):
            half = math.ceil((stop - start) / 2)
            data = quantized.packed[row, byte : byte + half].tolist()
            q = [value & 15 for value in data] + [value >> 4 for value in data][: stop - start - half]
            scale, minimum = quantized.scale[row, group].item(), quantized.minimum[row, group].item()
            values += [scale * value + minimum for value in q]
            byte += half
        assert byte == quantized.packed.shape[1]
        result.append(values)
    return result


# ---------------------------------------------------------------- format and size


@pytest.mark.parametrize(("group_size", "published"), [(32, 0.078), (64, 0.090), (128, 0.100)])
def test_gaussian_error_is_the_published_one(group_size, published):
    values = random(512, 1024)
    error = (round_trip(values, group_size) - values).pow(2).mean().sqrt() / values.pow(2).mean().sqrt()
    assert error.item() == pytest.approx(published, abs=6e-4)


def test_bytes_are_those_of_the_cost_model():
    weight = random(256, 512, dtype=torch.bfloat16)
    assert quantization.quantize(weight).nbytes == 256 * 512 * COMPRESSED_BYTES_PER_VALUE
    assert quantization.quantize_linear(weight).nbytes == 256 * 512 * COMPRESSED_BYTES_PER_VALUE


@pytest.mark.parametrize(("head_dim", "group_size", "bits"), [(64, 64, 4.5), (80, 128, 4.4), (128, 64, 4.5)])
def test_cache_groups_stay_within_the_cost_model(head_dim, group_size, bits):
    assert quantization.cache_group_size(head_dim) == group_size
    values = random(2, 3, 5, head_dim, dtype=torch.float16)
    cache = quantization.quantize(values, group_size=group_size)
    assert cache.nbytes * 8 / values.numel() == pytest.approx(bits)


@pytest.mark.parametrize("dim", [1, 2, 63, 64, 65, 80, 127, 128, 193])
@pytest.mark.parametrize("group_size", [32, 64])
def test_values_equal_the_documented_format_read_by_hand(dim, group_size):
    quantized = quantization.quantize(random(3, dim, seed=dim), group_size=group_size)
    by_hand = torch.tensor(unpacked_by_hand(quantized), dtype=torch.float64)
    ours = quantization.dequantize(quantized, dtype=torch.float32)
    torch.testing.assert_close(ours.double(), by_hand, rtol=2e-7, atol=1e-7)


# ---------------------------------------------------------------- promises


@settings(max_examples=60, deadline=None)
@given(
    dim=st.integers(1, 200),
    group_size=st.sampled_from(quantization.GROUP_SIZES),
    dtype=st.sampled_from(DTYPES),
    magnitude=st.integers(-6, 4),
    offset=st.sampled_from([0.0, 1.0, -30.0]),
    seed=st.integers(0, 2**31),
)
def test_every_value_is_within_half_a_step(dim, group_size, dtype, magnitude, offset, seed):
    largest = min(torch.finfo(dtype).max, 1e6)  # infinity is no value that the promise covers
    values = ((random(4, dim, seed=seed) + offset) * 10.0**magnitude).clamp(-largest, largest).to(dtype)
    back = round_trip(values, group_size)
    parameter = dtype if dtype in SIXTEEN_BIT else torch.bfloat16
    unit = torch.finfo(parameter).eps / 2
    for start in range(0, dim, group_size):
        group = values[:, start : start + group_size].float()
        low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)
        # Rounding of the minimum, of 15 scales and, where fp16 has no smaller number, its least one.
        rounding = 2 * unit * low.abs() + 2 * unit * (high - low) + 16 * torch.finfo(parameter).smallest_normal * unit
        error = (back[:, start : start + group_size] - group).abs()
        assert (error <= (high - low) / 30 + 2 * rounding).all()
        at_edges = (group == low) | (group == high)
        assert (error <= 2 * rounding)[at_edges].all()


@settings(max_examples=60, deadline=None)
@given(
    value=st.floats(-60000, 60000, width=16),
    dim=st.integers(1, 150),
    group_size=st.sampled_from(quantization.GROUP_SIZES),
    dtype=st.sampled_from(SIXTEEN_BIT),
)
def test_constant_groups_come_back_exactly(value, dim, group_size, dtype):
    values = torch.full((2, dim), value).to(dtype)
    quantized = quantization.quantize(values, group_size=group_size)
    for back_dtype in (dtype, torch.float32):
        assert torch.equal(quantization.dequantize(quantized, dtype=back_dtype).float(), values.float())
    weight = quantization.pack_linear(quantized)
    assert torch.equal(quantization.dequantize_linear(weight, dtype=torch.float32), values.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", SIXTEEN_BIT)
@pytest.mark.parametrize("back_dtype", DTYPES)
def test_extreme_values_stay_finite(dtype, parameter_dtype, back_dtype):
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    rows = [
        [info.max, info.min],
        [info.max, info.max],
        [0.0, info.max],
        [info.min, 0.0],
        [tiny, -tiny],
        [0.0, tiny / 8],
    ]
    values = torch.tensor(rows, dtype=torch.float64).repeat_interleave(40, 1).to(dtype)
    quantized = quantization.quantize(values, group_size=64, parameter_dtype=parameter_dtype)
    assert quantized.scale.isfinite().all()
    assert quantized.minimum.isfinite().all()
    if torch.finfo(back_dtype).max >= torch.finfo(parameter_dtype).max:
        assert quantization.dequantize(quantized, dtype=back_dtype).isfinite().all()
    else:  # bf16 parameters may exceed what fp16 holds
        assert not quantization.dequantize(quantized, dtype=back_dtype).isnan().any()


def test_fp16_extremes_come_back():
    largest = torch.finfo(torch.float16).max
    values = torch.tensor([largest, -largest] * 32, dtype=torch.float16)
    quantized = quantization.quantize(values)
    for dtype in (torch.float16, torch.float32):
        back = quantization.dequantize(quantized, dtype=dtype).float()
        torch.testing.assert_close(back, values.float(), rtol=2e-3, atol=0)


def test_a_chunked_tensor_equals_its_parts(monkeypatch):
    values = random(37, 4, 80, dtype=torch.bfloat16)
    whole = quantization.quantize(values)
    back = quantization.dequantize(whole, dtype=torch.bfloat16)
    monkeypatch.setattr(quantization, "CHUNK_VALUES", 4 * 80 * 5)
    parts = quantization.quantize(values)
    assert torch.equal(parts.packed, whole.packed)
    assert torch.equal(parts.scale, whole.scale)
    assert torch.equal(quantization.dequantize(whole, dtype=torch.bfloat16), back)


def test_tokens_of_a_cache_are_written_in_place():
    cache = quantization.zeros((2, 3, 8, 80), dtype=torch.bfloat16)
    values = random(2, 3, 2, 80, dtype=torch.bfloat16)
    quantization.quantize_into(values, cache.tokens(4, 6))
    back = quantization.dequantize(cache, dtype=torch.bfloat16)
    alone = quantization.dequantize(quantization.quantize(values), dtype=torch.bfloat16)
    assert torch.equal(back[:, :, 4:6], alone)
    assert torch.equal(quantization.dequantize(cache.tokens(4, 6), dtype=torch.bfloat16), alone)
    assert back[:, :, :4].eq(0).all()
    assert back[:, :, 6:].eq(0).all()


def test_dequantize_writes_into_out():
    quantized = quantization.quantize(random(4, 100))
    out = torch.full((4, 2, 100), torch.nan)[:, 0]
    result = quantization.dequantize(quantized, dtype=torch.float32, out=out)
    assert result is out
    assert torch.equal(out, quantization.dequantize(quantized, dtype=torch.float32))


# ---------------------------------------------------------------- weights


@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 3, quantization.INT4_KERNEL_ROWS + 1]),
    out_features=st.integers(1, 200),
    in_features=st.integers(1, 200),
    group_size=st.sampled_from([32, 64]),
    with_bias=st.booleans(),
)
def test_fp32_inputs_equal_the_dequantised_reference(rows, out_features, in_features, group_size, with_bias):
    quantized = quantization.quantize(random(out_features, in_features), group_size=group_size)
    weight = quantization.pack_linear(quantized)
    reference = quantization.dequantize_linear(weight, dtype=torch.float32)
    # Reordering rounds zero = minimum + 8 · scale to bf16, and nothing else.
    plain = quantization.dequantize(quantized, dtype=torch.float32)
    torch.testing.assert_close(reference, plain, rtol=0, atol=plain.abs().max().item() * 2**-7)
    x, bias = random(rows, in_features, seed=1), random(out_features, seed=2) if with_bias else None
    ours = quantization.linear_4bit(x, weight, bias)
    exact_bias = torch.zeros(out_features) if bias is None else bias
    expected = x.double() @ reference.T.double() + exact_bias.double()
    # The bound on a sum of K products in fp32, in any order: (K + 1) · 2⁻²⁴ times the sum of their sizes.
    sizes = x.double().abs() @ reference.T.double().abs() + exact_bias.double().abs()
    assert ((ours.double() - expected).abs() <= (in_features + 1) * 2.0**-24 * sizes).all()


@pytest.mark.parametrize("rows", [1, 8, quantization.INT4_KERNEL_ROWS, quantization.INT4_KERNEL_ROWS + 1, 100])
@pytest.mark.parametrize(
    ("out_features", "in_features", "group_size"), [(256, 512, 64), (200, 256, 128), (64, 80, 64), (128, 96, 32)]
)
def test_bf16_inputs_agree_with_the_dequantised_reference(rows, out_features, in_features, group_size):
    """Tolerance: bf16 rounds weight and result to 2⁻⁹ each; the sum of K random terms grows as √K."""
    weight = quantization.quantize_linear(
        random(out_features, in_features, dtype=torch.bfloat16), group_size=group_size
    )
    reference = quantization.dequantize_linear(weight, dtype=torch.float32)
    x, bias = random(rows, in_features, seed=1, dtype=torch.bfloat16), random(out_features, dtype=torch.bfloat16)
    ours = quantization.linear_4bit(x, weight, bias)
    assert ours.dtype == torch.bfloat16
    expected = x.float() @ reference.T + bias.float()
    torch.testing.assert_close(ours.float(), expected, rtol=2**-7, atol=2**-7 * in_features**0.5)


def test_what_the_kernel_takes():
    weight = quantization.quantize_linear(random(128, 128, dtype=torch.bfloat16))
    x = random(2, 128, dtype=torch.bfloat16)
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        assert quantization.kernel_takes(weight, x)
    assert not quantization.kernel_takes(weight, x.float())
    ragged = quantization.quantize_linear(random(128, 80, dtype=torch.bfloat16))
    assert not quantization.kernel_takes(ragged, x[:, :80])


def test_few_rows_are_not_dequantised_and_many_are(monkeypatch):
    weight = quantization.quantize_linear(random(64, 64, dtype=torch.bfloat16))
    few = random(quantization.INT4_KERNEL_ROWS, 64, dtype=torch.bfloat16)
    if not quantization.kernel_takes(weight, few):
        pytest.skip("this CPU's int4 kernel has another order")
    dequantised = []
    original = quantization._dequantized_columns
    monkeypatch.setattr(
        quantization, "_dequantized_columns", lambda *given: dequantised.append(given) or original(*given)
    )
    quantization.linear_4bit(few, weight)
    assert not dequantised
    quantization.linear_4bit(torch.cat((few, few[:1])), weight)
    assert len(dequantised) == 1


def test_our_order_is_what_aten_packs():
    if not quantization.kernel_takes(
        quantization.quantize_linear(random(64, 64).bfloat16()), torch.zeros(1).bfloat16()
    ):
        pytest.skip("this CPU's int4 kernel has another order")
    q = torch.randint(0, 16, (192, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    q[:, 0], q[:, 1] = 0, 15  # so that scale is 1 and minimum 0
    theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    ours = quantization.quantize_linear(q.bfloat16())
    assert torch.equal(ours.packed.flatten(), theirs.flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_writes_into_columns_of_a_wider_matrix(rows, with_bias, dtype):
    weight = quantization.quantize_linear(random(100, 64))
    x, bias = random(rows, 64, dtype=dtype), random(100, seed=2, dtype=dtype) if with_bias else None
    wide = torch.full((rows, 120), 7.0, dtype=dtype)
    quantization.linear_4bit(x, weight, bias, out=wide[:, 10:110])
    torch.testing.assert_close(wide[:, 10:110], quantization.linear_4bit(x, weight, bias))
    assert (wide[:, :10] == 7).all()
    assert (wide[:, 110:] == 7).all()


def test_a_weight_may_be_a_view_into_one_buffer():
    weight = quantization.quantize_linear(random(128, 128, dtype=torch.bfloat16))
    buffer = torch.zeros(weight.nbytes + 64, dtype=torch.uint8)
    packed = buffer[: weight.packed.nbytes].view(weight.packed.shape)
    parameters = buffer[packed.nbytes : weight.nbytes].view(torch.bfloat16).view(weight.scales_and_zeros.shape)
    packed.copy_(weight.packed)
    parameters.copy_(weight.scales_and_zeros)
    view = Quantized4bitLinear(packed=packed, scales_and_zeros=parameters, out_features=128, group_size=64)
    x = random(4, 128, dtype=torch.bfloat16)
    assert torch.equal(quantization.linear_4bit(x, view), quantization.linear_4bit(x, weight))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (torch.zeros(4, 4), {"group_size": 48}, "group_size is 48: it must be one of 32, 64, 128, 256"),
        (torch.zeros(4, 0), {}, "no groups"),
        (torch.zeros(4, 4, dtype=torch.int32), {}, "no groups"),
        (torch.zeros(4, 4), {"parameter_dtype": torch.float32}, "parameter_dtype is torch.float32"),
    ],
)
def test_bad_values_are_named(values, options, message):
    with pytest.raises(InputError, match=message):
        quantization.quantize(values, **options)


def test_parts_that_do_not_fit_are_named():
    quantized = quantization.quantize(torch.zeros(4, 64))
    with pytest.raises(InputError, match="packed has shape"):
        Quantized(**{**vars(quantized), "shape": (4, 128)})
    weight = quantization.pack_linear(quantized)
    with pytest.raises(InputError, match="scales_and_zeros has shape"):
        Quantized4bitLinear(**{**vars(weight), "group_size": 32})
    with pytest.raises(InputError, match="packed has shape"):
        Quantized4bitLinear(**{**vars(weight), "out_features": 100})
    with pytest.raises(InputError, match="is no matrix"):
        quantization.pack_linear(quantization.quantize(torch.zeros(2, 2, 64)))
    with pytest.raises(InputError, match="the room has"):
        quantization.quantize_into(torch.zeros(3, 64), quantized)
    with pytest.raises(InputError, match="out is"):
        quantization.dequantize(quantized, dtype=torch.float32, out=torch.zeros(3, 64))
