"""Levels and scales of GGUF blocks improved together after the rounding sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from exlq.formats.gguf_blocks.block import BlockType, Fields
from exlq.formats.gguf_moves import BlockMoves
from exlq.numerics.descent import descend, row_parts
from exlq.numerics.hessian import Curvature, Factor
from exlq.numerics.rounding import Rounded
from exlq.numerics.static_grid import Affine, StaticGrid
from exlq.numerics.threads import in_parallel

ROUNDS = 3  # each takes off less than the one before
WITHOUT_GAIN = ("Q8_0",)  # so fine that scales hardly matter


def descended(
    kinds: Sequence[BlockType], grid: StaticGrid, factor: Factor, weight: Tensor, rounded: Rounded
) -> tuple[StaticGrid, Rounded]:
    """The outcome of a sweep over `weight`, (in_features, rows) in processing order, made better.

    `rounded` is modified.
    """
    curvature = factor.curvature
    assert curvature is not None
    inverse = factor.perm.argsort()
    natural = weight[inverse]
    options = list(grid.options)
    for index, kind in enumerate(kinds):
        if kind.name in WITHOUT_GAIN:
            continue
        values, energy, fields = _one(
            kind, options[index].fields, natural, rounded.values[:, index][inverse], curvature
        )
        options[index] = affine(kind, fields, weight.device)
        rounded.values[:, index] = values[factor.perm]
        rounded.errors[:, index] = weight - rounded.values[:, index]
        rounded.energy[index] = energy
    return StaticGrid(options, factor.perm), rounded


def affine(kind: BlockType, fields: Fields, device: torch.device) -> Affine:
    """What `fields` say of a matrix's values, rows last."""
    runs = fields.levels.shape[1] // (kind.sub_block or kind.block_size)

    def product(half: Tensor | None, integers: Tensor | None) -> Tensor:
        """(runs, rows) a float16 times the integers of its block, in float32 as ggml has it."""
        if half is None:
            return torch.zeros(runs, len(fields.levels), device=device)
        wide = half.float().unsqueeze(-1)  # (rows, blocks, 1)
        if integers is not None:
            wide = wide * torch.unflatten(integers, -1, (half.shape[-1], -1)).float()
        return wide.flatten(-2).T.contiguous().to(device)

    offset = product(fields.dmin, fields.mins) if fields.offset is None else -product(fields.offset, None)
    ends = kind.levels
    return Affine(product(fields.d, fields.scales), offset, ends.low, ends.high, kind.table, fields)


def _one(
    kind: BlockType, fields: Fields, weight: Tensor, values: Tensor, curvature: Curvature
) -> tuple[Tensor, Tensor, Fields]:
    """Values (in_features, rows), their energies (rows,) and fields of one type, rows walked in parts."""

    run = kind.sub_block or kind.block_size
    runs = curvature.runs([run] * (len(weight) // run), ordered=False)

    def walked(rows: slice) -> tuple[Tensor, Tensor, Fields]:
        moves = BlockMoves(kind, fields.of_rows(rows))
        part = weight[:, rows].contiguous(), values[:, rows].contiguous()
        better, energy = descend(*part, curvature.natural, runs, moves, ROUNDS, curvature.ridge)
        return better, energy, moves.fields()

    parts = in_parallel(walked, row_parts(weight.shape[1], weight.device), weight.device)
    better, energies, changed = zip(*parts, strict=True)
    return torch.cat(better, 1), torch.cat(energies), _joined(changed)


def _joined(parts: Sequence[Fields]) -> Fields:
    named: dict[str, Any] = {
        name: None if value is None else torch.cat([vars(part)[name] for part in parts])
        for name, value in vars(parts[0]).items()
    }
    return Fields(**named)
