"""What one type of block holds, and its way to bytes and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

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

    def of_rows(self, rows: Tensor | slice) -> Fields:
        """Some of the rows."""
        chosen = rows.cpu() if isinstance(rows, Tensor) else rows
        named: dict[str, Any] = {n: None if v is None else v[chosen] for n, v in vars(self).items()}
        return Fields(**named)


@dataclass(frozen=True)
class BlockType:
    """One ggml type of quantized blocks: `fields(pack(x))` is x, with its integers as int8."""

    name: str
    ggml_type: int
    block_size: int  # weights
    type_size: int  # bytes of a block
    levels: Integers
    parts: tuple[Part, ...]  # in the order of their bytes
    sub_block: int = 0  # weights that share a sub-scale, 0 where there are none
    scales: Integers | None = None
    mins: Integers | None = None
    table: tuple[int, ...] | None = None  # what a level stands for, where it is not its own value

    def __post_init__(self) -> None:
        assert sum(part.size for part in self.parts) == self.type_size, self.name

    @property
    def halves(self) -> tuple[str, ...]:
        """Names of the fields stored as one float16 in each block."""
        return tuple(part.name for part in self.parts if part.name not in (LEVELS, SUB))

    @property
    def integers(self) -> dict[str, Integers]:
        """The ranges of the integer fields, by name."""
        ranges = {"levels": self.levels, "scales": self.scales, "mins": self.mins}
        return {name: kind for name, kind in ranges.items() if kind is not None}

    def pack(self, fields: Fields) -> Tensor:
        """Blocks that hold `fields`.

        Returns:
            (rows, row_bytes) uint8.

        Raises:
            FormatError: if rows are no whole blocks, a field is absent, not this type's or of a wrong shape
                or dtype, an integer is out of its range, or a float16 is not finite.
        """
        given = self._given(fields)
        n_blocks = self._n_blocks(fields.levels.shape[-1])
        shape = (*fields.levels.shape[:-1], n_blocks)
        vectors = {name: self._finite(name, self._shaped(name, given[name], shape)) for name in self.halves}
        codes = {name: self._codes(name, given[name], shape) for name in self.integers}
        vectors[LEVELS] = codes.pop("levels")
        if codes:
            vectors[SUB] = torch.cat([codes[name] for name in codes], dim=-1)
        return torch.cat([part.write(vectors) for part in self.parts], dim=-1).flatten(-2)

    def fields(self, blocks: Tensor) -> Fields:
        """What `blocks` hold, integers as int8: the inverse of `pack`.

        Raises:
            FormatError: if `blocks` is not uint8 with rows of whole blocks, or a float16 is not finite.
        """
        vectors = self._vectors(blocks)
        found = {name: self._finite(name, vectors[name]) for name in self.halves}
        codes = {"levels": vectors[LEVELS]}
        if self.sub_block:
            names = [name for name in self.integers if name != "levels"]
            codes |= zip(names, vectors[SUB].chunk(len(names), dim=-1), strict=True)
        for name, kind in self.integers.items():
            found[name] = (codes[name] - kind.bias).contiguous().view(torch.int8).flatten(-2)
        return Fields(**found)

    def values(self, fields: Fields) -> Tensor:
        """(rows, in_features) float32 that `fields` stand for, in ggml's order of float32 operations."""
        sub_block = self.sub_block or self.block_size
        levels = torch.unflatten(self._meaning(fields.levels), -1, (-1, sub_block))  # (rows, subs, weights)
        values = self._product(fields.d, fields.scales) * levels
        if fields.dmin is not None:
            values = values - self._product(fields.dmin, fields.mins)
        if fields.offset is not None:
            values = values + self._product(fields.offset, None)
        return values.flatten(-2)

    def unpack(self, blocks: Tensor) -> Tensor:
        """(rows, in_features) float32 from (rows, row_bytes) uint8; raises as `fields` does."""
        return self.values(self.fields(blocks))

    def _product(self, half: Tensor, integers: Tensor | None) -> Tensor:
        """A float16 times the integers of its block, in float32: (rows, subs, 1)."""
        wide = half.float().unsqueeze(-1)  # (rows, blocks, 1)
        if integers is not None:
            wide = wide * torch.unflatten(integers, -1, (half.shape[-1], -1)).float()
        return wide.flatten(-2).unsqueeze(-1)

    def _meaning(self, levels: Tensor) -> Tensor:
        if self.table is None:
            return levels.float()
        return torch.tensor(self.table, dtype=torch.float32, device=levels.device)[levels.long()]

    def _vectors(self, blocks: Tensor) -> dict[str, Tensor]:
        if blocks.dtype != torch.uint8:
            raise FormatError(f"{self.name} blocks are {blocks.dtype}, want torch.uint8; view them as bytes")
        if blocks.shape[-1] % self.type_size:
            raise FormatError(
                f"{self.name} blocks are {self.type_size} bytes each, found rows of {blocks.shape[-1]}; "
                "read them as the type they were stored in"
            )
        whole = torch.unflatten(blocks, -1, (-1, self.type_size))  # (rows, blocks, type_size)
        stored = whole.split_with_sizes([part.size for part in self.parts], dim=-1)
        vectors: dict[str, Tensor] = {}
        for part, own in zip(self.parts, stored, strict=True):
            read = part.read(own)
            vectors[part.name] = vectors[part.name] | read if part.name in vectors else read
        return vectors

    def _n_blocks(self, in_features: int) -> int:
        if in_features % self.block_size:
            raise FormatError(
                f"{self.name} stores whole blocks of {self.block_size} weights, found rows of {in_features}; "
                "choose a type whose block divides them"
            )
        return in_features // self.block_size

    def _given(self, fields: Fields) -> dict[str, Tensor]:
        given = {name: tensor for name, tensor in vars(fields).items() if tensor is not None}
        wanted = {*self.halves, *self.integers}
        if given.keys() != wanted:
            raise FormatError(f"{self.name} stores {sorted(wanted)}, found {sorted(given)}; give just those")
        return given

    def _shaped(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        if tuple(tensor.shape) != shape:
            raise FormatError(f"{self.name} needs {name} of shape {shape}, found {tuple(tensor.shape)}")
        return tensor

    def _finite(self, name: str, half: Tensor) -> Tensor:
        if half.dtype != torch.float16:
            raise FormatError(
                f"{self.name} stores {name} as torch.float16, found {half.dtype}; round it first"
            )
        if not half.isfinite().all():
            bad = (~half.isfinite()).sum()
            raise FormatError(f"{bad} of {half.numel()} {self.name} blocks have a {name} that is not finite")
        return half

    def _codes(self, name: str, integers: Tensor, blocks: tuple[int, ...]) -> Tensor:
        """(rows, blocks, n) uint8, as stored."""
        kind = self.integers[name]
        per_block = self.block_size // (1 if name == "levels" else self.sub_block)
        self._shaped(name, integers, (*blocks[:-1], blocks[-1] * per_block))
        if integers.is_floating_point():
            raise FormatError(
                f"{self.name} stores {name} as integers, found {integers.dtype}; round them first"
            )
        wrong = integers[(integers < kind.low) | (integers > kind.high)]
        if len(wrong):
            raise FormatError(
                f"{self.name} stores {name} from {kind.low} to {kind.high}, found {wrong[0]}; clamp first"
            )
        codes = (integers.to(torch.int16) + kind.bias).to(torch.uint8)
        return torch.unflatten(codes, -1, (-1, per_block))
