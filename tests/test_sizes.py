from __future__ import annotations

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exlq.errors import ConfigError
from exlq.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4200000000", 4_200_000_000),
        ("4.2GB", 4_200_000_000),
        ("4.2GiB", 4_509_715_660),  # and 0.8 of a byte
        ("512 MiB", 512 << 20),
        (" 7kb ", 7000),
        ("7KiB", 7168),
        (".5 TiB", 1 << 39),
        ("1.TB", 10**12),
        ("12 B", 12),
        ("999999999999999999", 10**18 - 1),
    ],
)
def test_decimal_units_are_powers_of_1000_and_binary_ones_of_1024(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@given(st.integers(1, 10**18 - 1), st.integers(0, 10**9 - 1), st.sampled_from(["B", "GB", "TiB"]))
def test_no_byte_is_lost_to_rounding(whole: int, fraction: int, unit: str) -> None:
    scale = {"B": 1, "GB": 10**9, "TiB": 2**40}[unit]
    exact = (whole + Fraction(fraction, 10**9)) * scale
    assert parse_bytes(f"{whole}.{fraction:09d}{unit}") == exact.numerator // exact.denominator


@pytest.mark.parametrize(
    "text",
    ["", "GB", "4.2G", "-1GB", "1e9", "4,2GB", "1 000", "nan", "4.2 GiBs", "½GB", "0", "0.9", "9" * 5000],
)
def test_what_is_no_size_is_refused_and_repeated(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(repr(text))):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (4_509_715_660, "4.20 GiB"),
        (5 << 40, "5.00 TiB"),
        (5 << 50, "5120.00 TiB"),
    ],
)
def test_a_size_is_shown_in_the_largest_unit_it_fills(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(1 << 10, 1 << 49))
def test_what_is_shown_is_the_size_to_half_a_percent(n_bytes: int) -> None:
    error = abs(parse_bytes(format_bytes(n_bytes)) - n_bytes)
    assert error <= 0.005 * n_bytes + 1, (
        f"{error} bytes of {n_bytes}"
    )  # one byte where its fraction is dropped
