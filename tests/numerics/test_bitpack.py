"""Bit packing against bit streams made of Python's big integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exlq.numerics import bitpack

WIDTHS = range(1, 17)


def stream_words(values: list[int], bits: int) -> list[int]:
    """Unsigned 32-bit words of a little-endian stream; the values must fill the last word."""
    stream = sum(value << (bits * i) for i, value in enumerate(values))
    n_words, rest = divmod(bits * len(values), 32)
    assert rest == 0
    return [stream >> (32 * i) & 0xFFFFFFFF for i in range(n_words)]


def stream_values(words: list[int], bits: int) -> list[int]:
    """The values a stream of words holds."""
    stream = sum(word << (32 * i) for i, word in enumerate(words))
    return [stream >> (bits * i) & ((1 << bits) - 1) for i in range(32 * len(words) // bits)]


def by_columns(columns: list[list[int]]) -> Tensor:
    """Columns of unsigned 32-bit values as an int32 matrix."""
    return torch.from_numpy(np.array(columns, dtype=np.uint32).T.astype(np.int32))


@st.composite
def level_columns(draw: Any) -> tuple[int, list[list[int]]]:
    bits = draw(st.sampled_from(WIDTHS))
    rows, columns = 32 * draw(st.integers(1, 4)), draw(st.integers(1, 3))
    level = st.integers(0, (1 << bits) - 1)
    return bits, draw(
        st.lists(st.lists(level, min_size=rows, max_size=rows), min_size=columns, max_size=columns)
    )


@settings(max_examples=60, deadline=None)
@given(level_columns())
def test_levels_become_a_little_endian_stream_down_each_column(case: tuple[int, list[list[int]]]) -> None:
    bits, columns = case
    words = bitpack.pack_levels(torch.tensor(columns).T, bits)
    assert words.dtype == torch.int32
    assert torch.equal(words, by_columns([stream_words(column, bits) for column in columns]))


@pytest.mark.parametrize("bits", WIDTHS)
def test_levels_are_read_back_from_any_words(bits: int) -> None:
    words = torch.randint(-(1 << 31), 1 << 31, (3 * bits, 5), generator=torch.Generator().manual_seed(bits))
    levels = bitpack.unpack_levels(words.int(), bits)
    expected = [stream_values([word & 0xFFFFFFFF for word in column], bits) for column in words.T.tolist()]
    assert torch.equal(levels, torch.tensor(expected, dtype=torch.int32).T)
    assert torch.equal(bitpack.pack_levels(levels, bits), words.int())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("largest", [True, False])
def test_extreme_levels_survive(bits: int, largest: bool) -> None:
    levels = torch.full((64, 2), ((1 << bits) - 1) * largest)
    words = bitpack.pack_levels(levels.byte() if bits <= 8 else levels, bits)
    assert (words == -int(largest)).all()
    assert torch.equal(bitpack.unpack_levels(words, bits), levels.int())


@pytest.mark.parametrize(
    ("bits", "n_words"), [(2, 1), (2, 3), (4, 1), (4, 7), (6, 3), (6, 9), (8, 1), (8, 11)]
)
def test_a_last_block_need_not_be_full(bits: int, n_words: int) -> None:
    """As in 2-bit groups of 16 rows: one word a column."""
    words = torch.randint(-(1 << 31), 1 << 31, (n_words, 4), generator=torch.Generator().manual_seed(n_words))
    expected = [stream_values([word & 0xFFFFFFFF for word in column], bits) for column in words.T.tolist()]
    assert torch.equal(bitpack.unpack_levels(words.int(), bits), torch.tensor(expected, dtype=torch.int32).T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.randoms(use_true_random=False))
def test_nibbles_fill_words_from_the_lowest_bits(rows: int, words: int, random: Any) -> None:
    codes = [[random.randrange(16) for _ in range(8 * words)] for _ in range(rows)]
    packed = bitpack.pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert packed.dtype == torch.int32
    assert [[word & 0xFFFFFFFF for word in row] for row in packed.tolist()] == [
        stream_words(row, 4) for row in codes
    ]
    assert bitpack.unpack_nibbles(packed).tolist() == codes
