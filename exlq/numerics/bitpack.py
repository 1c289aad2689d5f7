"""Levels as bit streams in 32-bit words.

A stream is little-endian: level r takes bits [r·b, (r+1)·b), least significant first, and bit t of
the stream is bit t mod 32 of word t div 32. Streams run down the first dimension, one per column.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_PER_BLOCK = 32  # 32 levels of b bits fill exactly b words


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """Words that hold `levels`, column by column.

    Args:
        levels: (rows, columns) integers in [0, 2^bits); rows a multiple of 32.
        bits: width of one level, 1 to 16.

    Returns:
        (rows * bits / 32, columns) int32, to be read as unsigned.
    """
    rows, columns = levels.shape
    blocks = levels.to(torch.int64).reshape(rows // ROWS_PER_BLOCK, ROWS_PER_BLOCK, columns)
    words = torch.zeros(len(blocks), bits + 1, columns, dtype=torch.int64, device=levels.device)
    for row in range(ROWS_PER_BLOCK):
        word, shift = divmod(row * bits, 32)
        wide = blocks[:, row] << shift  # at most 31 + 16 bits
        words[:, word] |= wide & 0xFFFFFFFF
        words[:, word + 1] |= wide >> 32
    return _signed(words[:, :bits]).reshape(-1, columns)


def unpack_levels(words: Tensor, bits: int) -> Tensor:
    """Levels held by `words`: the inverse of `pack_levels`.

    Args:
        words: (rows * bits / 32, columns) int32; rows need not fill the last block.

    Returns:
        (rows, columns) int32 in [0, 2^bits).
    """
    n_words, columns = words.shape
    whole = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 0, 0, -n_words % bits))
    blocks = whole.reshape(-1, bits, columns)
    levels = torch.empty(len(blocks), ROWS_PER_BLOCK, columns, dtype=torch.int32, device=words.device)
    for row in range(ROWS_PER_BLOCK):
        word, shift = divmod(row * bits, 32)
        level = blocks[:, word] >> shift
        if shift + bits > 32:
            level = level | (blocks[:, word + 1] << (32 - shift))
        levels[:, row] = (level & ((1 << bits) - 1)).to(torch.int32)
    return levels.reshape(-1, columns)[: n_words * 32 // bits]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Words of eight 4-bit codes each, along the last dimension.

    Args:
        codes: (rows, columns) integers in [0, 16); columns a multiple of 8.

    Returns:
        (rows, columns / 8) int32; code c of a word is bits 4c to 4c + 3.
    """
    grouped = codes.to(torch.int64).reshape(len(codes), -1, 8)
    shifts = torch.arange(0, 32, 4, device=codes.device)
    return _signed((grouped << shifts).sum(-1))


def unpack_nibbles(words: Tensor) -> Tensor:
    """(rows, 8 * words) int32 codes in [0, 16): the inverse of `pack_nibbles`."""
    shifts = torch.arange(0, 32, 4, device=words.device)
    codes = (words.to(torch.int64).unsqueeze(-1) >> shifts) & 15
    return codes.to(torch.int32).reshape(len(words), -1)


def _signed(words: Tensor) -> Tensor:
    """Unsigned 32-bit values in int64 as the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
