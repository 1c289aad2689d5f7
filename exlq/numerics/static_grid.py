"""Grids whose scales were chosen before the sweep, so that columns may be rounded in any order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from exlq.numerics.kernels import for_triton
from exlq.numerics.rounding import STEP, Kernel

TABLE_SIZE = 16
NO_TABLE = (0.0,) * TABLE_SIZE


@dataclass(frozen=True)
class Affine:
    """Values scale · level - offset, or scale · table[level] - offset, of one option.

    Runs of `in_features / len(scale)` neighbouring input channels share scale and offset. `fields` is
    whatever the maker wants to find again, and has an `of_rows` like this.
    """

    scale: Tensor  # (runs, rows) float32
    offset: Tensor  # (runs, rows) float32
    low: int
    high: int
    table: tuple[int, ...] | None = None
    fields: Any = None

    def of_rows(self, rows: Tensor) -> Affine:
        """Some of its rows, by their places (n,) int64."""
        fields = None if self.fields is None else self.fields.of_rows(rows)
        return replace(self, scale=self.scale[:, rows], offset=self.offset[:, rows], fields=fields)

    def levels(self, values: Tensor) -> Tensor:
        """(in_features, rows) int16 levels of stored `values`, (in_features, rows), in the model's order."""
        run = len(values) // len(self.scale)
        scale, offset = (x.repeat_interleave(run, 0) for x in (self.scale, self.offset))
        wanted = (values + offset) / torch.where(scale == 0, 1.0, scale)
        if self.table is None:
            return wanted.round_().clamp_(self.low, self.high).to(torch.int16)
        return torch.bucketize(wanted, _middles(self.table, values)).to(torch.int16)


class StaticGrid:
    """Affine grids of several options for the same output rows, their columns processed in `perm`'s order."""

    def __init__(self, options: Sequence[Affine], perm: Tensor) -> None:
        self.options, self.perm = options, perm
        in_features = len(perm)
        self.edges: Sequence[int] = range(STEP, in_features, STEP)
        runs = max(len(option.scale) for option in options)
        self._units = torch.div(perm, in_features // runs, rounding_mode="floor")
        self._scale = _stacked([option.scale for option in options], runs)
        self._offset = _stacked([option.offset for option in options], runs)
        ends = [(1, 0) if option.table else (option.low, option.high) for option in options]
        self._low, self._high = torch.tensor(ends, dtype=torch.float32, device=perm.device).T.contiguous()
        tables = [option.table or NO_TABLE for option in options]
        self._table = torch.tensor(tables, dtype=torch.float32, device=perm.device)

    def open(self, column: int, current: Tensor) -> None:
        """Nothing is left to be chosen."""

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        unit = self._units[column : column + 1]  # the host need not know it
        scale, offset = self._scale[unit][0], self._offset[unit][0]  # (options, rows)
        wanted = (weights + offset) / torch.where(scale == 0, 1.0, scale)
        levels = torch.minimum(torch.maximum(wanted.round(), self._low[:, None]), self._high[:, None])
        for index, option in enumerate(self.options):
            if option.table is not None:
                places = torch.bucketize(wanted[index], _middles(option.table, weights))
                levels[index] = self._table[index][places]
        return scale * levels - offset

    def of_rows(self, rows: Tensor) -> StaticGrid:
        return StaticGrid([option.of_rows(rows) for option in self.options], self.perm)

    def kernel(self, start: int, end: int) -> Kernel:
        arrays = (self._scale, self._offset, self._units[start:end], self._low, self._high, self._table)
        if for_triton(self._scale):
            from exlq.numerics.triton_sweep import Steps, round_columns

            return partial(round_columns, Steps(*arrays))
        from exlq.numerics.compiled_affine import round_affine_columns

        return partial(round_affine_columns, *(x.numpy() for x in arrays))


def _stacked(parts: Sequence[Tensor], runs: int) -> Tensor:
    """(runs, options, rows), values of wider runs repeated."""
    return torch.stack([part.repeat_interleave(runs // len(part), 0) for part in parts], 1)


def _middles(table: Sequence[int], like: Tensor) -> Tensor:
    """Where the nearest of two neighbours in a rising table changes."""
    values = torch.tensor(table, dtype=torch.float32, device=like.device)
    return (values[1:] + values[:-1]) / 2
