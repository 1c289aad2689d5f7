"""The parts a stored block is made of, each a few bytes of every block.

Inside a block everything is unsigned: the codes of its levels, and the codes of its sub-scales followed by
those of its sub-mins. A part reads or writes some bits of one of these vectors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LEVELS, SUB = "levels", "sub"


class Part(Protocol):
    """Some bytes of a block; `read` gives the bits that `write` stored, the others zero."""

    @property
    def name(self) -> str:
        """The vector of the block these bytes belong to; bits of parts of one name add up."""
        ...

    @property
    def size(self) -> int:
        """Bytes in each block."""
        ...

    def write(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """(..., size) uint8 from vectors of shape (..., n)."""
        ...

    def read(self, stored: Tensor) -> Tensor:
        """(..., n) from (..., size) uint8."""
        ...


@dataclass(frozen=True)
class Half:
    """One little-endian float16."""

    name: str
    size: int = 2

    def write(self, vectors: Mapping[str, Tensor]) -> Tensor:
        return vectors[self.name].unsqueeze(-1).contiguous().view(torch.uint8)

    def read(self, stored: Tensor) -> Tensor:
        aligned = stored.clone(memory_format=torch.contiguous_format)
        return aligned.view(torch.float16).squeeze(-1)


@dataclass(frozen=True)
class Plane:
    """`bits` bits of each code from bit `lowest` on, several codes to a byte.

    With p = 8 / bits codes in a byte, codes come in runs of p · width: code k · width + w of a run lies in
    its byte w at shift k · bits. So width 1 puts neighbours into one byte, as in one little-endian word.
    """

    name: str
    count: int  # codes in a block
    bits: int
    width: int
    lowest: int = 0

    @property
    def size(self) -> int:
        return self.count * self.bits // 8

    def write(self, vectors: Mapping[str, Tensor]) -> Tensor:
        codes = (vectors[self.name] >> self.lowest) & self._mask
        codes = torch.unflatten(codes, -1, (-1, 8 // self.bits, self.width))  # (..., runs, p, width)
        return (codes << self._shifts(codes)).sum(-2, dtype=torch.uint8).flatten(-2)

    def read(self, stored: Tensor) -> Tensor:
        runs = torch.unflatten(stored, -1, (-1, 1, self.width))  # (..., runs, 1, width)
        codes = (runs >> self._shifts(stored)) & self._mask  # (..., runs, p, width)
        return codes.flatten(-3) << self.lowest

    @property
    def _mask(self) -> int:
        return (1 << self.bits) - 1

    def _shifts(self, like: Tensor) -> Tensor:
        return torch.arange(0, 8, self.bits, dtype=torch.uint8, device=like.device)[:, None]


@dataclass(frozen=True)
class SixBitPairs:
    """Eight scales s and eight mins m of six bits each, as Q4_K and Q5_K hold them.

    Byte k of four:  0..3   s[4+k] bits 5-4 | s[k] bits 5-0
                     4..7   m[4+k] bits 5-4 | m[k] bits 5-0
                     8..11  m[4+k] bits 3-0 | s[4+k] bits 3-0
    """

    name: str = SUB
    size: int = 12

    def write(self, vectors: Mapping[str, Tensor]) -> Tensor:
        s, s_late, m, m_late = vectors[self.name].chunk(4, dim=-1)
        tops = [s | (s_late >> 4) << 6, m | (m_late >> 4) << 6]
        return torch.cat([*tops, (s_late & 15) | (m_late & 15) << 4], dim=-1)

    def read(self, stored: Tensor) -> Tensor:
        s, m, late = stored.chunk(3, dim=-1)
        s_late = (s >> 6) << 4 | late & 15
        m_late = (m >> 6) << 4 | late >> 4
        return torch.cat([s & 63, s_late, m & 63, m_late], dim=-1)
