"""EXL2 scales as the rounding sweep uses them: chosen when a group is reached, shared by all its rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.formats import exl2
from exlq.numerics import scales
from exlq.numerics.kernels import for_triton
from exlq.numerics.rounding import Kernel
from exlq.types import Group


class Members(NamedTuple):
    """Groups of one size that begin at one column."""

    options: Tensor  # (n,) int64
    groups: Tensor  # (n,) int64, which of the option's
    bits: tuple[int, ...]
    low: Tensor  # (n, 1) float32, the lowest levels

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, int]], device: torch.device) -> Members:
        """From an option, which of its groups and the group's bits each."""
        options, groups, bits = zip(*found, strict=True)
        low = torch.tensor([[-(2.0 ** (b - 1))] for b in bits], device=device)
        return cls(torch.tensor(options, device=device), torch.tensor(groups, device=device), bits, low)


Opening = dict[int, dict[int, Members]]  # column → size → the groups that begin there


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
        self.layouts = layouts
        device = importance.device
        starts = [{group.start for group in groups} for groups in layouts]
        self.edges: Sequence[int] = sorted(set.intersection(*starts) - {0})
        most = max(map(len, layouts))
        self._codes = torch.zeros(len(layouts), most, rows, dtype=torch.uint8, device=device)
        self._multipliers = torch.zeros(len(layouts), most, dtype=torch.float16, device=device)
        self.codes = [own[: len(g)] for own, g in zip(self._codes, layouts, strict=True)]  # views
        self.multipliers = [own[: len(g)] for own, g in zip(self._multipliers, layouts, strict=True)]
        self._scale = torch.ones(len(layouts), rows, device=device)
        self._low = torch.zeros(len(layouts), 1, device=device)
        self._opening = _by_start(tuple(map(tuple, layouts)), device)

    def open(self, column: int, current: Tensor) -> None:
        for size, members in self._opening.get(column, {}).items():
            options, groups = members.options, members.groups
            taken = None if self.leader is None else self.leader._multipliers[options, groups]
            multiplier, codes = scales.fit_squared_scales(
                current[:size, options], self.importance[column : column + size], members.bits, taken
            )
            self._scale[options] = exl2.group_scales(codes, multiplier).float()
            self._low[options] = members.low
            self._multipliers[options, groups] = multiplier
            self._codes[options, groups] = codes

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        levels = (weights / self._scale).round_().clamp_(self._low, -1 - self._low)
        return levels.mul_(self._scale).half().float()  # rounded once, as the kernels round the product

    def kernel(self, start: int, end: int) -> Kernel:
        if for_triton(self._scale):
            from exlq.numerics.triton_sweep import Steps
            from exlq.numerics.triton_sweep import round_columns as round_on_gpu

            units = torch.zeros(end - start, dtype=torch.int64, device=self._scale.device)
            least = self._low.squeeze(-1)
            return partial(round_on_gpu, Steps(self._scale[None], None, units, least, -1 - least))
        from exlq.numerics.compiled import round_columns

        scale, low = self._scale.contiguous(), self._low.squeeze(-1).contiguous()
        return partial(round_columns, scale.numpy(), low.numpy())

    def of_rows(self, rows: Tensor) -> Exl2Grid:
        part = Exl2Grid(self.layouts, self.importance, len(rows), self.leader)
        part.codes = [codes[:, rows] for codes in self.codes]
        part.multipliers = self.multipliers
        return part


def levels_of(values: Tensor, codes: Tensor, multiplier: Tensor, groups: Sequence[Group]) -> Tensor:
    """Unsigned levels (in, out) uint8 of stored values (in, out) float32, both in packed order."""
    levels = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    for group, scale in zip(groups, exl2.group_scales(codes, multiplier).float(), strict=True):
        rows = slice(group.start, group.stop)
        levels[rows] = (values[rows] / scale).round() + float(1 << (group.bits - 1))
    return levels


@lru_cache(maxsize=64)
def _by_start(layouts: tuple[tuple[Group, ...], ...], device: torch.device) -> Opening:
    """Column → size → the groups that begin there and are fitted together."""
    opening: dict[int, dict[int, list[tuple[int, int, int]]]] = {}
    for option, groups in enumerate(layouts):
        for index, group in enumerate(groups):
            alike = opening.setdefault(group.start, {}).setdefault(group.size, [])
            alike.append((option, index, group.bits))
    return {
        start: {size: Members.of(alike, device) for size, alike in by_size.items()}
        for start, by_size in opening.items()
    }
