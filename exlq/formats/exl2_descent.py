"""Levels and scales of EXL2 groups improved together after the rounding sweep."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exlq.formats import exl2
from exlq.formats.exl2_grid import Exl2Grid
from exlq.numerics.descent import Lattice, descend, row_parts
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded
from exlq.numerics.threads import in_parallel
from exlq.types import Group

ROUNDS = 3  # each takes off less than the one before
ROOT_MOVES = (0, -1, 1)


class GroupMoves:
    """The 4-bit scale codes of some rows of one option; its multipliers, which are all rows', stay."""

    def __init__(self, groups: Sequence[Group], multipliers: Tensor, codes: Tensor) -> None:
        self._groups, self._multipliers = groups, multipliers  # (groups,) float16
        self.codes = codes  # (groups, rows) uint8, changed in place
        self._offered = codes[:1]

    def candidates(self, index: int) -> Lattice:
        moves = torch.tensor(ROOT_MOVES, device=self.codes.device)[:, None]
        self._offered = (self.codes[index].to(torch.int64) + moves).clamp(0, 15).to(torch.uint8)
        multiplier = self._multipliers[index].expand(len(self._offered))
        step = exl2.group_scales(self._offered, multiplier).float()
        half = 1 << (self._groups[index].bits - 1)
        return Lattice(step, torch.zeros_like(step), -half, half - 1, float16=True)

    def take(self, index: int, picked: Tensor) -> None:
        self.codes[index] = self._offered.gather(0, picked.unsqueeze(0))[0]


def descended(
    layouts: Sequence[Sequence[Group]], grid: Exl2Grid, factor: Factor, weight: Tensor, rounded: Rounded
) -> tuple[Exl2Grid, Rounded]:
    """The outcome of a sweep over `weight`, (in_features, rows) in processing order, made better.

    `rounded` and the codes of `grid` are modified.
    """
    curvature = factor.curvature
    assert curvature is not None
    hessian = curvature.ordered()
    for index, groups in enumerate(layouts):
        runs = curvature.runs((group.size for group in groups), ordered=True)
        codes, values = grid.codes[index], rounded.values[:, index]

        def walked(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            moves = GroupMoves(groups, grid.multipliers[index], codes[:, rows].clone())  # noqa: B023
            part = weight[:, rows].contiguous(), values[:, rows].contiguous()  # noqa: B023
            return *descend(*part, hessian, runs, moves, ROUNDS, factor.ridge), moves.codes  # noqa: B023

        parts = in_parallel(walked, row_parts(weight.shape[1], weight.device), weight.device)
        better, energies, changed = zip(*parts, strict=True)
        rounded.values[:, index] = torch.cat(better, 1)
        rounded.energy[index] = torch.cat(energies)
        grid.codes[index] = torch.cat(changed, 1)
    torch.sub(weight.unsqueeze(1), rounded.values, out=rounded.errors)
    return grid, rounded
