"""Group-wise 4-bit numbers: an integer in [0, 15] per value, a scale and a minimum per group.

    value = q · scale + minimum,   scale = (maximum − minimum) / 15

Groups lie along the last dimension, which is the input dimension of a weight and the head dimension of
a cache. The scale and the minimum are 16-bit, so that a group of 64 takes 4.5 bits per value
(``costmodel.model.COMPRESSED_BYTES_PER_VALUE``). A last group may be short: head dim 80 is 64 + 16.

:class:`Quantized` keeps the order of the values and serves caches; :class:`Quantized4bitLinear` is the
same numbers in the order in which ATen's CPU kernel reads a weight.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from costmodel.errors import InputError

LEVELS = 15
"""Largest 4-bit integer: steps between a group's minimum and maximum."""

GROUP_SIZES = (32, 64, 128, 256)
"""What ATen's kernels accept; the cost model counts 64."""

ZERO_POINT = 8
"""ATen's weights are (q − 8) · scale + zero, so its zero is minimum + 8 · scale."""

LINEAR_BLOCK = 64
"""Output features that lie side by side in the order of ATen's AVX512 kernel: low nibbles 0–31, high 32–63."""

INT4_KERNEL_ROWS = 64
"""Rows up to which ATen's int4 kernel is used. A 4096 × 4096 weight takes it 0.40 ms a row; dequantising takes
14 ms and the bf16 product 0.16 ms a row: the kernel takes 22 against 23 ms at 48 rows, 25 against 24 at 64, 54
against 37 at 128. At 1 row it also beats plain bf16, 0.9 against 3.2 ms. (AMD EPYC with AVX512-BF16, torch
2.13, one thread, least of 20, other programs running: trust the ratios.)"""

CHUNK_VALUES = 2**21
"""Values expanded at a time on a CPU: 4 MiB in bf16 stay in cache between the passes over them."""

ROUNDED_VALUES = 2**19
"""Values rounded to 4 bits at a time on a CPU, which is done in fp32: 2 MiB. More are a tenth to a third faster."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """4-bit values in the order of the tensor they came from.

    packed   uint8 (…, bytes_per_row(dim)): of a group of n values, byte i holds value i in its low half and
             value ceil(n / 2) + i in its high half
    scale    16-bit (…, groups)
    minimum  16-bit (…, groups)
    shape    of the values, (…, dim)

    Raises :class:`InputError` where these do not fit together.
    """

    packed: Tensor
    scale: Tensor
    minimum: Tensor
    shape: tuple[int, ...]
    group_size: int

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)
        *leading, dim = self.shape
        groups = (*leading, -(-dim // self.group_size))
        expected = {
            "packed": (*leading, bytes_per_row(dim, group_size=self.group_size)),
            "scale": groups,
            "minimum": groups,
        }
        for field, size in expected.items():
            given = tuple(getattr(self, field).shape)
            if given != size:
                raise InputError(f"{field} has shape {given}: values of shape {self.shape} need {size}")

    @property
    def nbytes(self) -> int:
        """Bytes of the three tensors."""
        return self.packed.nbytes + self.scale.nbytes + self.minimum.nbytes

    def tokens(self, start: int, stop: int) -> "Quantized":
        """View of rows ``start`` to ``stop`` of the dimension before the last: the tokens of a cache."""
        rows = slice(start, stop)
        packed, scale, minimum = (part[..., rows, :] for part in (self.packed, self.scale, self.minimum))
        shape = (*self.shape[:-2], packed.shape[-2], self.shape[-1])
        return Quantized(packed=packed, scale=scale, minimum=minimum, shape=shape, group_size=self.group_size)


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized4bitLinear:
    """A 4-bit weight (out_features, in_features), ready for ATen's CPU kernel; see :func:`pack_linear`.

    packed            uint8 (blocks, in_features, 32): of block b, byte i of a row holds output feature
                      64 b + i in its low half and 64 b + 32 + i in its high half; the last block is padded
    scales_and_zeros  16-bit (groups along in_features, 64 · blocks, 2): weight = (q − 8) · scale + zero

    Both are contiguous; they may be views into a larger buffer.
    """

    packed: Tensor
    scales_and_zeros: Tensor
    out_features: int
    group_size: int

    def __post_init__(self) -> None:
        _check_group_size(self.group_size)
        blocks = -(-self.out_features // LINEAR_BLOCK)
        if self.packed.dim() != 3 or (self.packed.shape[0], self.packed.shape[2]) != (blocks, LINEAR_BLOCK // 2):
            raise InputError(
                f"packed has shape {tuple(self.packed.shape)}: {self.out_features} output features need "
                f"({blocks}, in_features, {LINEAR_BLOCK // 2})"
            )
        expected = (-(-self.in_features // self.group_size), blocks * LINEAR_BLOCK, 2)
        if tuple(self.scales_and_zeros.shape) != expected:
            raise InputError(f"scales_and_zeros has shape {tuple(self.scales_and_zeros.shape)}: it must be {expected}")

    @property
    def in_features(self) -> int:
        """Width of the inputs."""
        return self.packed.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.packed.nbytes + self.scales_and_zeros.nbytes


def bytes_per_row(dim: int, *, group_size: int = 64) -> int:
    """Bytes of the 4-bit integers of ``dim`` values; a group of an odd number wastes half a byte."""
    whole, rest = divmod(dim, group_size)
    return whole * (group_size // 2) + (rest + 1) // 2


def cache_group_size(head_dim: int) -> int:
    """Smallest group that keeps a cache within the 4.5 bits per value that the cost model counts.

    64 for head dims 64 and 128; 128 for head dim 80 (one group, 4.4 bits), where 64 + 16 takes 4.8.
    """
    for group_size in GROUP_SIZES[1:]:
        groups = -(-head_dim // group_size)
        if (bytes_per_row(head_dim, group_size=group_size) + 4 * groups) * 16 <= 9 * head_dim:
            return group_size
    return GROUP_SIZES[1]


def zeros(
    shape: tuple[int, ...], *, group_size: int = 64, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Quantized:
    """Room for values of this shape, all 0; ``dtype`` is that of scale and minimum."""
    *leading, dim = shape
    groups = (*leading, -(-dim // group_size))
    packed = torch.zeros((*leading, bytes_per_row(dim, group_size=group_size)), dtype=torch.uint8, device=device)
    scale = torch.zeros(groups, dtype=dtype, device=device)
    minimum = torch.zeros(groups, dtype=dtype, device=device)
    return Quantized(packed=packed, scale=scale, minimum=minimum, shape=tuple(shape), group_size=group_size)


def quantize(values: Tensor, *, group_size: int = 64, parameter_dtype: torch.dtype | None = None) -> Quantized:
    """Round values (…, dim) of any float type to 4 bits in groups along the last dimension.

    ``parameter_dtype`` (float16 or bfloat16) holds scale and minimum: by default the type of the values,
    bfloat16 for wider ones. Every value comes back within half a step, plus the rounding of the
    parameters; a group's minimum, and so a constant group, comes back exactly if ``parameter_dtype``
    holds it. Finite values come back finite; beyond the range of ``parameter_dtype`` (half of it for
    bfloat16) they saturate. NaN and infinity are not 4-bit numbers: the caller keeps them out.
    """
    if not values.is_floating_point() or values.dim() == 0 or values.shape[-1] == 0:
        raise InputError(f"values of type {values.dtype} and shape {tuple(values.shape)} have no groups to quantise")
    narrow = values.dtype in (torch.float16, torch.bfloat16)
    dtype = parameter_dtype or (values.dtype if narrow else torch.bfloat16)
    if dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"parameter_dtype is {dtype}: it must be torch.float16 or torch.bfloat16")
    _check_group_size(group_size)
    into = zeros(tuple(values.shape), group_size=group_size, dtype=dtype, device=values.device)
    quantize_into(values, into)
    return into


def quantize_into(values: Tensor, into: Quantized) -> None:
    """Quantise into given room of the same shape, which may be a view: ``cache.tokens(start, stop)``."""
    if tuple(values.shape) != into.shape:
        raise InputError(f"values have shape {tuple(values.shape)}: the room has {into.shape}")
    for chunk in _chunks(values, ROUNDED_VALUES):
        for dims, at, groups in _pieces(into.shape[-1], into.group_size):
            q, scale, minimum = _round(_split_last(values[chunk][..., dims], *groups), into.scale.dtype)
            into.packed[chunk][..., at] = _pack(q).flatten(-2)
            first = dims.start // into.group_size
            into.scale[chunk][..., first : first + groups[0]] = scale
            into.minimum[chunk][..., first : first + groups[0]] = minimum


def dequantize(quantized: Quantized, *, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Values (…, dim) in ``dtype``, contiguous, or in ``out``: q · scale + minimum.

    On a CPU the product is rounded to bfloat16 before the sum when both the parameters and ``dtype``
    are bfloat16 (a fused pass over broadcast parameters takes three times as long); otherwise the sum is rounded once.
    """
    if out is None:
        out = torch.empty(quantized.shape, dtype=dtype, device=quantized.packed.device)
    elif tuple(out.shape) != quantized.shape or out.dtype != dtype:
        raise InputError(f"out is {out.dtype} {tuple(out.shape)}: it must be {dtype} {quantized.shape}")
    for chunk in _chunks(out, CHUNK_VALUES):
        for dims, at, (count, size) in _pieces(quantized.shape[-1], quantized.group_size):
            first = dims.start // quantized.group_size
            scale, minimum = (
                part[chunk][..., first : first + count].unsqueeze(-1) for part in (quantized.scale, quantized.minimum)
            )
            packed = _split_last(quantized.packed[chunk][..., at], count, (size + 1) // 2)
            _unround(packed, scale, minimum, _split_last(out[chunk][..., dims], count, size))
    return out


def pack_linear(weight: Quantized) -> Quantized4bitLinear:
    """Reorder a weight (out_features, in_features) for :func:`linear_4bit`; no value is rounded again
    but zero = minimum + 8 · scale, to 16 bits.
    """
    if len(weight.shape) != 2:
        raise InputError(f"a weight of shape {weight.shape} is no matrix")
    out_features, in_features = weight.shape
    blocks = -(-out_features // LINEAR_BLOCK)
    half = LINEAR_BLOCK // 2
    packed = torch.empty((blocks, in_features, half), dtype=torch.uint8, device=weight.packed.device)
    for block in range(blocks):  # one at a time: unpacked, a whole matrix takes four times its 4 bits
        rows = slice(block * LINEAR_BLOCK, (block + 1) * LINEAR_BLOCK)
        q = weight.packed.new_zeros((LINEAR_BLOCK, in_features))
        for dims, at, (count, size) in _pieces(in_features, weight.group_size):
            nibbles = _split_last(weight.packed[rows, at], count, (size + 1) // 2)
            q[: len(nibbles), dims] = torch.cat((nibbles & 15, (nibbles >> 4)[..., : size // 2]), -1).flatten(-2)
        packed[block] = (q[:half] | q[half:] << 4).T
    scale, minimum = weight.scale.float(), weight.minimum.float()
    parameters = torch.stack((scale, minimum + ZERO_POINT * scale), dim=-1)
    padded = functional.pad(parameters, (0, 0, 0, 0, 0, blocks * LINEAR_BLOCK - out_features))
    return Quantized4bitLinear(
        packed=packed,
        scales_and_zeros=padded.transpose(0, 1).to(weight.scale.dtype).contiguous(),
        out_features=out_features,
        group_size=weight.group_size,
    )


def quantize_linear(weight: Tensor, *, group_size: int = 64) -> Quantized4bitLinear:
    """Quantise a weight (out_features, in_features) in groups along its inputs, for :func:`linear_4bit`."""
    return pack_linear(quantize(weight, group_size=group_size))


def dequantize_linear(weight: Quantized4bitLinear, *, dtype: torch.dtype) -> Tensor:
    """The weight (out_features, in_features) as :func:`linear_4bit` multiplies with it when it dequantises."""
    columns = torch.cat([chunk.clone() for chunk in _dequantized_columns(weight, dtype)], dim=1)
    return columns[:, : weight.out_features].T


def linear_4bit(
    rows: Tensor, weight: Quantized4bitLinear, bias: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """``rows @ weight.T + bias`` for rows (rows, in_features) gives (rows, out_features) in their type, in ``out``.

    Few rows of bf16 on a CPU go through ATen's int4 kernel (:data:`INT4_KERNEL_ROWS`); all else
    dequantises in the type of the rows and multiplies: on a CPU a few columns at a time, so that the
    dequantised weight never leaves its caches.
    """
    if out is None:
        out = rows.new_empty((len(rows), weight.out_features))
    if len(rows) <= INT4_KERNEL_ROWS and kernel_takes(weight, rows):
        packed = weight.packed.view(-1, weight.in_features // 2)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(
            rows.contiguous(), packed, weight.group_size, weight.scales_and_zeros
        )
        product = product[:, : weight.out_features]
        return out.copy_(product) if bias is None else torch.add(product, bias, out=out)
    first = 0
    for columns in _dequantized_columns(weight, rows.dtype):
        last = min(first + columns.shape[1], weight.out_features)
        part, place = columns[:, : last - first], out[:, first:last]
        if bias is None:
            torch.mm(rows, part, out=place)
        else:
            torch.addmm(bias[first:last], rows, part, out=place)
        first = last
    return out


def kernel_takes(weight: Quantized4bitLinear, x: Tensor) -> bool:
    """Whether ATen's int4 kernel of this CPU can multiply bf16 inputs with this weight as it lies."""
    bf16 = x.dtype == weight.scales_and_zeros.dtype == torch.bfloat16
    whole = weight.in_features % weight.group_size == 0
    return bf16 and whole and x.device.type == "cpu" and _kernel_has_our_order()


@cache
def _kernel_has_our_order() -> bool:
    """Whether this CPU's kernel packs weights in our order: AVX512 does; the order is not documented, so ask it."""
    weight = torch.arange(LINEAR_BLOCK * 32, dtype=torch.int32).view(LINEAR_BLOCK, 32) * 7 // 5 % 16
    half = LINEAR_BLOCK // 2
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight, 1)
    except (AttributeError, RuntimeError):
        return False
    ours = (weight[:half] | weight[half:] << 4).T.to(torch.uint8)
    return bool(torch.equal(packed.view(-1), ours.reshape(-1)))


class _Scratch(threading.local):
    """Memory of each thread that weights are expanded in: kept, because memory taken anew for every matrix leaves holes
    of its size all over the C library's heap."""

    memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        if self.memory.nbytes < nbytes:
            self.memory = torch.empty(0, dtype=torch.uint8)  # the old one goes first
            self.memory = torch.empty(nbytes, dtype=torch.uint8)
        return self.memory[:nbytes]


_scratch = _Scratch()


def _dequantized_columns(weight: Quantized4bitLinear, dtype: torch.dtype) -> Iterator[Tensor]:
    """The transposed weight (in_features, columns of some blocks) part by part, in memory that this thread reuses."""
    packed, group_size, in_features = weight.packed, weight.group_size, weight.in_features
    scale, zero = (part.contiguous().to(dtype) for part in weight.scales_and_zeros.unbind(-1))
    blocks, on_cpu = packed.shape[0], packed.device.type == "cpu"
    step = min(blocks, max(1, CHUNK_VALUES // (in_features * LINEAR_BLOCK))) if on_cpu else blocks
    half = LINEAR_BLOCK // 2
    values, integers = in_features * step * LINEAR_BLOCK, in_features * step * half
    nbytes = values * dtype.itemsize + integers
    memory = _scratch.take(nbytes) if on_cpu else torch.empty(nbytes, dtype=torch.uint8, device=packed.device)
    buffer, q = memory[:-integers].view(dtype), memory[-integers:]
    for first in range(0, blocks, step):
        part = packed[first : first + step]
        count = len(part) * LINEAR_BLOCK
        columns = buffer[: in_features * count].view(in_features, count)
        halves = columns.view(in_features, len(part), 2, half)
        some = q[: part.numel()].view(part.shape)
        halves[:, :, 0] = _signed(torch.bitwise_and(part, 15, out=some)).transpose(0, 1)
        halves[:, :, 1] = _signed(torch.bitwise_right_shift(part, 4, out=some)).transpose(0, 1)
        span = slice(first * LINEAR_BLOCK, first * LINEAR_BLOCK + count)
        for dims, _, (groups, size) in _pieces(in_features, group_size):
            start = dims.start // group_size
            rows = columns[dims].view(groups, size, count)
            here = slice(start, start + groups)
            torch.addcmul(zero[here, None, span], rows, scale[here, None, span], out=rows)
        yield columns


def _signed(q: Tensor) -> Tensor:
    """q − 8 as int8, in place: uint8 wraps around to the same bits."""
    signed: Tensor = q.sub_(ZERO_POINT).view(torch.int8)
    return signed


def _round(groups: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Integers (…, groups, size) in fp32, scale and minimum (…, groups) of values (…, groups, size)."""
    largest = torch.finfo(dtype).max
    # In bf16 q · scale is rounded by itself (see dequantize), so that the range must be finite too.
    limit = largest / 2 if dtype == torch.bfloat16 else largest
    values = groups.to(torch.float32, copy=True).clamp_(-limit, limit)
    minimum = values.amin(-1).to(dtype)  # aminmax takes ten times as long on a CPU
    scale = ((values.amax(-1) - minimum.float()) / LEVELS).clamp_(min=0).to(dtype)
    top = LEVELS * scale.float()
    overflows = (top > largest) | (top + minimum.float() > largest)
    smaller = (scale.view(torch.int16) - 1).view(dtype)  # the next 16-bit float towards 0
    scale = torch.where(overflows, smaller, scale)
    step = torch.where(scale == 0, 1, scale).float().unsqueeze(-1)
    q = values.sub_(minimum.float().unsqueeze(-1)).div_(step).round_().clamp_(0, LEVELS)
    return q, scale, minimum


def _pack(q: Tensor) -> Tensor:
    """Bytes (…, ceil(size / 2)) of integers (…, size) in fp32: the first half low, the second half high.

    They are put together before they are bytes: half as many to convert, and nothing to shift.
    """
    half = (q.shape[-1] + 1) // 2
    packed = q[..., :half]
    packed[..., : q.shape[-1] - half].add_(q[..., half:], alpha=16)
    return packed.to(torch.uint8)


def _unround(packed: Tensor, scale: Tensor, minimum: Tensor, out: Tensor) -> None:
    """Write q · scale + minimum of packed (…, groups, bytes) into out (…, groups, size)."""
    dtype = torch.promote_types(scale.dtype, out.dtype)
    work = out if dtype == out.dtype else torch.empty(out.shape, dtype=dtype, device=out.device)
    half = packed.shape[-1]
    work[..., :half] = packed & 15
    work[..., half:] = (packed >> 4)[..., : out.shape[-1] - half]
    scale, minimum = scale.to(dtype), minimum.to(dtype)
    if out.device.type == "cpu" and dtype != torch.float16:
        work.mul_(scale).add_(minimum)
    else:
        torch.addcmul(minimum, work, scale, out=work)
    if work is not out:
        out.copy_(work)


def _split_last(values: Tensor, count: int, size: int) -> Tensor:
    """View (…, count · size) as (…, count, size), also where the leading dimensions are strided."""
    return values.view(*values.shape[:-1], count, size)


def _pieces(dim: int, group_size: int) -> Iterator[tuple[slice, slice, tuple[int, int]]]:
    """Whole groups, then the short one: their values, their bytes, (groups, values in each)."""
    whole, rest = divmod(dim, group_size)
    dims, at = whole * group_size, whole * (group_size // 2)
    if whole:
        yield slice(0, dims), slice(0, at), (whole, group_size)
    if rest:
        yield slice(dims, dim), slice(at, at + (rest + 1) // 2), (1, rest)


def _chunks(values: Tensor, most: int) -> Iterator[slice]:
    """Slices of the first dimension of about ``most`` values, which fit a CPU's caches; all of it elsewhere."""
    if values.dim() == 1 or values.device.type != "cpu":
        yield slice(None)
        return
    step = max(1, most * len(values) // max(1, values.numel()))
    for first in range(0, len(values), step):
        yield slice(first, first + step)


def _check_group_size(group_size: int) -> None:
    if group_size not in GROUP_SIZES:
        raise InputError(f"group_size is {group_size}: it must be one of {', '.join(map(str, GROUP_SIZES))}")
