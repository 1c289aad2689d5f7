"""EXL2 scales as the rounding sweep uses them: chosen when a group is reached, shared by all its rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from exlq.formats import exl2
from exlq.numerics import scales
from exlq.numerics.rounding import Kernel
from exlq.types import Group

Member = tuple[int, int, int]  # an option, which of its groups, the group's bits


class Exl2Grid:
    """Grids of several options for the same output rows.

    Scales are fitted to the weights as the errors of earlier groups have left them, weighted by the
    pivots of the Hessian. The multiplier of a group belongs to all output rows of the matrix: where
    these are swept in parts, the first part chooses it and the others take it over (`leader`).
    """

    def __init__(
        self,
        layouts: Sequence[Sequence[Group]],
        importance: Tensor,
        rows: int,
        leader: Exl2Grid | None = None,
    ) -> None:
        self.importance, self.leader = importance, leader
        device = importance.device
        starts = [{group.start for group in groups} for groups in layouts]
        self.edges: Sequence[int] = sorted(set.intersection(*starts) - {0})
        self.codes = [torch.zeros(len(g), rows, dtype=torch.uint8, device=device) for g in layouts]
        self.multipliers = [torch.zeros(len(g), dtype=torch.float16, device=device) for g in layouts]
        self._scale = torch.ones(len(layouts), rows, device=device)
        self._low = torch.zeros(len(layouts), 1, device=device)
        self._opening = _by_start(layouts)

    def open(self, column: int, current: Tensor) -> None:
        for size, members in self._opening.get(column, {}).items():
            options = [option for option, _, _ in members]
            bits = [width for _, _, width in members]
            taken = None if self.leader is None else self.leader._taken(members)
            multiplier, codes = scales.fit_squared_scales(
                current[:size, options], self.importance[column : column + size], bits, taken
            )
            self._scale[options] = exl2.group_scales(codes, multiplier).float()
            self._low[options] = torch.tensor([[-(2.0 ** (b - 1))] for b in bits], device=self._low.device)
            for i, (option, index, _) in enumerate(members):
                self.multipliers[option][index] = multiplier[i]
                self.codes[option][index] = codes[i]

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        levels = (weights / self._scale).round_().clamp_(self._low, -1 - self._low)
        return levels.mul_(self._scale).half().float()  # rounded once, as the kernels round the product

    def kernel(self, start: int, end: int) -> Kernel:
        from exlq.numerics.compiled import round_columns

        scale, low = self._scale.contiguous(), self._low.squeeze(-1).contiguous()
        return partial(round_columns, scale.numpy(), low.numpy())

    def _taken(self, members: Sequence[Member]) -> Tensor:
        return torch.stack([self.multipliers[option][index] for option, index, _ in members])


def levels_of(values: Tensor, codes: Tensor, multiplier: Tensor, groups: Sequence[Group]) -> Tensor:
    """Unsigned levels (in, out) uint8 of stored values (in, out) float32, both in packed order."""
    levels = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for group, scale in zip(groups, exl2.group_scales(codes, multiplier).float(), strict=True):
        rows = slice(group.start, group.stop)
        levels[rows] = (values[rows] / scale).round() + float(1 << (group.bits - 1))
    return levels


def _by_start(layouts: Sequence[Sequence[Group]]) -> dict[int, dict[int, list[Member]]]:
    """Column → size → the groups that begin there and are fitted together."""
    opening: dict[int, dict[int, list[Member]]] = {}
    for option, groups in enumerate(layouts):
        for index, group in enumerate(groups):
            alike = opening.setdefault(group.start, {}).setdefault(group.size, [])
            alike.append((option, index, group.bits))
    return opening
