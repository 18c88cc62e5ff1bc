"""Text to numbers and back."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from costmodel import units
from costmodel.errors import InputError
from costmodel.units import Dimension, format_bytes, format_rate, format_seconds, parse


def test_gb_is_not_gib() -> None:
    assert units.GB == 1_000_000_000
    assert units.GiB == 1_073_741_824
    assert parse("1GB", "bytes") != parse("1GiB", "bytes")
    assert parse("1GiB", "bytes") / parse("1GB", "bytes") == pytest.approx(1.073741824, rel=1e-15)
    assert format_bytes(2**30) != format_bytes(10**9)


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("16GiB", "bytes", 17_179_869_184),
        ("16 GiB", "bytes", 17_179_869_184),
        (" 16GiB ", "bytes", 17_179_869_184),
        ("208 GB", "bytes", 208e9),
        ("1.5TB", "bytes", 1.5e12),
        ("1TiB", "bytes", 1_099_511_627_776),
        ("2 PiB", "bytes", 2_251_799_813_685_248),
        ("3MiB", "bytes", 3_145_728),
        ("5KiB", "bytes", 5120),
        ("5kB", "bytes", 5000),
        ("5KB", "bytes", 5000),
        ("7 B", "bytes", 7),
        (".5GB", "bytes", 5e8),
        ("1e3MB", "bytes", 1e9),
        ("1_500 GB", "bytes", 1.5e12),
        ("0GB", "bytes", 0),
        ("-1GB", "bytes", -1e9),
        ("12.9GB/s", "bytes/s", 12.9e9),
        ("12GiB/s", "bytes/s", 12_884_901_888),
        ("65TFLOP/s", "FLOP/s", 65e12),
        ("1.3 PFLOP/s", "FLOP/s", 1.3e15),
        ("9 Gvalues/s", "values/s", 9e9),
        ("20us", "s", 2e-5),
        ("20 µs", "s", 2e-5),
        ("5 ms", "s", 5e-3),
        ("2min", "s", 120),
        ("1.5 h", "s", 5400),
        (16, "bytes", 16),
        (2.5, "s", 2.5),
    ],
)
def test_text_is_read_in_the_base_unit(text: str | float, dimension: Dimension, value: float) -> None:
    assert parse(text, dimension) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("text", "dimension"),
    [
        ("16", "bytes"),  # GB or GiB? They differ by 7 %
        ("", "bytes"),
        ("GiB", "bytes"),
        ("16GiB/s", "bytes"),
        ("16Gb", "bytes"),
        ("16gib", "bytes"),
        ("16G", "bytes"),
        ("1,5GB", "bytes"),
        ("1.5.0GB", "bytes"),
        ("sixteen GB", "bytes"),
        ("16GB 4GB", "bytes"),
        ("nan GB", "bytes"),
        ("inf GB", "bytes"),
        ("16GB", "bytes/s"),
        ("100Mbit/s", "bytes/s"),
        ("65TFLOPS", "FLOP/s"),
        ("65TB/s", "FLOP/s"),
        ("9G", "values/s"),
        ("3 days", "s"),
        ("5 GB", "s"),
    ],
)
def test_what_is_not_a_quantity_is_refused_with_an_example(text: str, dimension: Dimension) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, dimension)
    message = str(caught.value)
    assert message.startswith(f"{text!r} is not a quantity in {dimension}: ")
    example = message.split("such as '")[1].split("'")[0]
    assert parse(example, dimension) > 0


@pytest.mark.parametrize("value", ["1e400GB", math.inf, -math.inf, math.nan])
def test_what_is_not_finite_is_refused(value: str | float) -> None:
    with pytest.raises(InputError, match="not a finite quantity in bytes"):
        parse(value, "bytes")


SCALES = {
    "B": 1.0,
    "kB": 1e3,
    "MB": 1e6,
    "GB": 1e9,
    "TB": 1e12,
    "PB": 1e15,
    "KiB": 1024.0,
    "MiB": 1024.0**2,
    "GiB": 1024.0**3,
    "TiB": 1024.0**4,
    "PiB": 1024.0**5,
}


@given(number=st.floats(0, 1e6, allow_subnormal=False), unit=st.sampled_from(sorted(SCALES)))
def test_what_python_prints_is_read_back(number: float, unit: str) -> None:
    assert parse(f"{number!r}{unit}", "bytes") == number * SCALES[unit]
    assert parse(f"{number!r} {unit}/s", "bytes/s") == number * SCALES[unit]


@given(value=st.floats(1, 1e15), binary=st.booleans())
def test_formatted_bytes_are_read_back_to_four_digits(value: float, binary: bool) -> None:
    text = format_bytes(value, binary=binary)
    assert parse(text, "bytes") == pytest.approx(value, rel=5.1e-4)
    if value >= 1024:
        assert ("i" in text) == binary


@given(value=st.floats(1, 1e17), dimension=st.sampled_from(["bytes/s", "FLOP/s", "values/s"]))
def test_formatted_rates_are_read_back_to_four_digits(value: float, dimension: Dimension) -> None:
    assert parse(format_rate(value, dimension), dimension) == pytest.approx(value, rel=5.1e-4)


@given(value=st.floats(1e-6, 119.9))
def test_formatted_short_times_are_read_back_to_four_digits(value: float) -> None:
    assert parse(format_seconds(value), "s") == pytest.approx(value, rel=5.1e-4)


@given(value=st.floats(120, 1e7))
def test_long_times_are_right_to_the_second_or_the_minute(value: float) -> None:
    first, first_unit, second, second_unit = format_seconds(value).split()
    assert (first_unit, second_unit) in (("min", "s"), ("h", "min"))
    per_second, per_first = (1, 60) if first_unit == "min" else (60, 3600)
    assert abs(int(first) * per_first + int(second) * per_second - value) <= per_second / 2
    assert int(second) < 60


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (17_179_869_184, "16 GiB"),
        (2**30 - 1, "1 GiB"),
        (2**40, "1 TiB"),
        (1536, "1.5 KiB"),
        (1000, "1000 B"),
        (0, "0 B"),
    ],
)
def test_bytes_are_printed_in_binary_units(value: float, text: str) -> None:
    assert format_bytes(value) == text


@pytest.mark.parametrize(("value", "text"), [(208e9, "208 GB"), (999_999, "1 MB"), (1.5e12, "1.5 TB")])
def test_bytes_are_printed_in_decimal_units_on_request(value: float, text: str) -> None:
    assert format_bytes(value, binary=False) == text


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [(1.29e10, "bytes/s", "12.9 GB/s"), (6.5e13, "FLOP/s", "65 TFLOP/s"), (9e9, "values/s", "9 Gvalues/s")],
)
def test_rates_are_printed_with_decimal_prefixes(value: float, dimension: Dimension, text: str) -> None:
    assert format_rate(value, dimension) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0042, "4.2 ms"),
        (2e-5, "20 µs"),
        (12.5, "12.5 s"),
        (119, "119 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
        (3600, "1 h 00 min"),
        (0, "0 s"),
    ],
)
def test_times_are_printed_for_people(value: float, text: str) -> None:
    assert format_seconds(value) == text
