"""What one type of block holds, and its way to bytes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf_blocks.layout import LEVELS, SUB, Part


class StoredType(Protocol):
    """A ggml type as a reader sees it; rows of `block_size` weights lie in `type_size` bytes."""

    @property
    def name(self) -> str: ...
    @property
    def ggml_type(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def type_size(self) -> int: ...

    def unpack(self, blocks: Tensor) -> Tensor:
        """(rows, in_features) float32 from (rows, row_bytes) uint8, bit for bit as ggml computes it."""
        ...


@dataclass(frozen=True)
class Integers:
    """Integers from `low` to `high`, stored as eight or fewer bits of value + bias, modulo 256."""

    low: int
    high: int
    bias: int = 0


@dataclass(frozen=True)
class Fields:
    """Everything rows of blocks store; `BlockType` says which of the optional ones it has.

    A weight is d·s·q − dmin·m, or d·q + offset where a type has no sub-scales; q is the level, or the entry
    of the type's table at the level.
    """

    levels: Tensor  # (rows, in_features) integers
    d: Tensor  # (rows, in_features / block_size) float16, finite
    dmin: Tensor | None = None  # like d
    offset: Tensor | None = None  # like d
    scales: Tensor | None = None  # (rows, in_features / sub_block) integers, s
    mins: Tensor | None = None  # like scales, m


@dataclass(frozen=True)
class BlockType:
    """One ggml type of quantized blocks: `fields(pack(x))` is x, with its integers as int8."""

    name: str
    ggml_type: int
    block_size: int  # weights
    type_size: int  # bytes of a block
    levels: Integers
    parts: tuple[Part, ...]  # in the order of their bytes
    sub_block: int = 0  # weights that share a sub-scale; 0 where there are none
    scales: Integers | None = None
    mins: Integers | None = None
    table: tuple[int, ...] | None = None  # what a level stands for, where it is not its own value

    def __post_init__(self) -> None:
        assert sum(part.size for part in self.parts) == self.type_size, self.name

    @property
    def halves(self) -> tuple[str, ...]:
        """The fields stored as one float16 in each block."""
        return tuple(part.name for part in self.parts if part.name not in (LEVELS, SUB))

    def pack(self, fields: Fields) -> Tensor:
        """Blocks that hold `fields`.

        Returns:
            (rows, row_bytes) uint8.

        Raises:
            FormatError: if rows are no whole blocks, a field is absent, not this type's or of a wrong shape,
                an integer is out of its range, or a float16 is not finite.
        """
        n_blocks = self._blocks_of(fields)
        vectors = {LEVELS: self._codes("levels", fields.levels, self.levels, n_blocks)}
        sub = [
            self._codes(name, tensor, kind, n_blocks)
            for name, tensor, kind in (
                ("scales", fields.scales, self.scales),
                ("mins", fields.mins, self.mins),
            )
            if tensor is not None and kind is not None
        ]
        if sub:
            vectors[SUB] = torch.cat(sub, dim=-1)
        vectors |= {name: self._finite(name, getattr(fields, name)) for name in self.halves}
        return torch.cat([part.write(vectors) for part in self.parts], dim=-1).flatten(-2)

    def fields(self, blocks: Tensor) -> Fields:
        """What `blocks` hold, integers as int8: the inverse of `pack`.

        Raises:
            FormatError: if `blocks` is not uint8 with rows of whole blocks, or a float16 is not finite.
        """
        vectors = self._vectors(blocks)
        halves = {name: self._finite(name, vectors[name]) for name in self.halves}
        sub = (
            dict(zip(("scales", "mins"), vectors[SUB].chunk(2 if self.mins else 1, -1), strict=False))
            if (self.scales)
            else {}
        )
        kinds = {"scales": self.scales, "mins": self.mins}
        signed = {name: _signed(codes, kinds[name]) for name, codes in sub.items()}
        return Fields(levels=_signed(vectors[LEVELS], self.levels), **halves, **signed)

    def values(self, fields: Fields) -> Tensor:
        """(rows, in_features) float32 that `fields` stand for, in ggml's order of float32 operations."""
        step = fields.d.float().unsqueeze(-1)  # (rows, blocks, 1)
        if fields.scales is not None:
            step = self._per_block(fields.scales).float() * step  # (rows, blocks, subs)
        n_steps = step.shape[-1]
        levels = self._meaning(fields.levels).unflatten(-1, (-1, n_steps, self.block_size // n_steps))
        values = step.unsqueeze(-1) * levels  # (rows, blocks, subs, weights)
        if fields.dmin is not None and fields.mins is not None:
            low = fields.dmin.float().unsqueeze(-1) * self._per_block(fields.mins).float()
            values = values - low.unsqueeze(-1)
        if fields.offset is not None:
            values = values + fields.offset.float()[..., None, None]
        return values.flatten(-3)

    def unpack(self, blocks: Tensor) -> Tensor:
        """(rows, in_features) float32 from (rows, row_bytes) uint8; raises as `fields` does."""
        return self.values(self.fields(blocks))
