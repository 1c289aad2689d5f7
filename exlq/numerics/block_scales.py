"""Scales of stored blocks that leave little weighted squared error, and plain rounding to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from exlq.numerics.threads import in_parallel, one_thread

if TYPE_CHECKING:
    from exlq.numerics.compiled_blocks import Effort
    from exlq.numerics.compiled_tiles import Plan

LEAST_IMPORTANCE = 1e-6  # of the mean: where errors cost nothing at all, any scale would be as good


@dataclass(frozen=True)
class Blocks:
    """How blocks of `size` weights are stored: step · s · q - base · m.

    q is an integer from `low` to `high`, or one of the sixteen rising numbers of `table`. `scales` and `mins`
    are the ranges of the integers s and m of every sub-block, both ends included. Without `mins` there is
    no base; only a `signed` one may be negative.
    """

    size: int
    sub_block: int
    low: int
    high: int
    scales: tuple[int, int] = (1, 1)
    mins: tuple[int, int] | None = None
    signed: bool = False
    table: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert len(self.table) in (0, 16), self.table
        assert self.size % self.sub_block == 0, self


@dataclass(frozen=True)
class Search:
    """What is tried; see `exlq.numerics.compiled_blocks.Effort`, whose fields these are."""

    candidates: tuple[tuple[float, float], ...]
    scale_targets: tuple[float, ...] = (1.0,)
    min_targets: tuple[float, ...] = (1.0,)
    starts: tuple[tuple[float, float], ...] = ((1.0, 1.0),)
    scale_window: tuple[int, ...] = (0,)
    min_window: tuple[int, ...] = (0,)
    sweeps: int = 1
    rounds: int = 1


class BlockFit(NamedTuple):
    """Stored numbers of every block; a weight is step · s · q - base · m."""

    levels: Tensor  # (rows, in_features) int8, q or its place in the table
    steps: Tensor  # (rows, blocks) float16
    bases: Tensor  # (rows, blocks) float16
    scales: Tensor  # (rows, sub_blocks) int8
    mins: Tensor  # (rows, sub_blocks) int8


def fit_blocks(
    weight: Tensor, importance: Tensor | None, blocks: Blocks, searches: Sequence[Search]
) -> BlockFit:
    """Scales that leave little Σ importance · (weight - value)², and the levels of plain rounding.

    No block is left with more error than its zeros would leave. The result does not depend on the
    number of threads, nor on the other rows.

    Args:
        weight: (rows, in_features) float32, finite, on the CPU; rows are whole blocks.
        importance: (in_features,), zero or more, not all zero; None where all count the same.
        searches: one, or two of which the better outcome is kept, block by block.
    """
    from exlq.numerics import compiled_lanes, compiled_tiles

    rows, in_features = weight.shape
    n_blocks, n_subs = in_features // blocks.size, in_features // blocks.sub_block
    found = BlockFit(
        levels=torch.empty(rows, in_features, dtype=torch.int8),
        steps=torch.empty(rows, n_blocks),
        bases=torch.empty(rows, n_blocks),
        scales=torch.empty(rows, n_subs, dtype=torch.int8),
        mins=torch.empty(rows, n_subs, dtype=torch.int8),
    )
    values, factors, plan = (
        weight.contiguous().numpy(),
        _factors(importance, in_features),
        _plan(blocks, searches),
    )
    arrays = [tensor.numpy() for tensor in found]

    def fit_tile(start: int) -> None:
        tile = slice(start, start + compiled_lanes.LANES)
        out = compiled_tiles.Stored(*(array[tile] for array in arrays))
        compiled_tiles.fit_rows(values[tile], factors.numpy(), plan, out)

    in_parallel(fit_tile, range(0, rows, compiled_lanes.LANES), weight.device)
    with one_thread():
        return found._replace(steps=found.steps.half(), bases=found.bases.half())


def _factors(importance: Tensor | None, in_features: int) -> Tensor:
    """(in_features,) float32 of mean one, all above zero."""
    if importance is None:
        return torch.ones(in_features)
    wide = importance.double()
    return (wide / wide.mean()).clamp_min(LEAST_IMPORTANCE).float()


def _plan(blocks: Blocks, searches: Sequence[Search]) -> Plan:
    from exlq.numerics.compiled_blocks import Ranges
    from exlq.numerics.compiled_lanes import Levels
    from exlq.numerics.compiled_tiles import Plan

    shifts = 0 if blocks.mins is None else 1 + blocks.signed
    table = np.array(blocks.table, np.float32)
    levels = Levels(np.float32(blocks.low), np.float32(blocks.high), table, shifts)
    ranges = Ranges(*(np.float32(end) for end in (*blocks.scales, *(blocks.mins or (0, 0)))))
    efforts = _effort(searches[0]), _effort(searches[-1])
    return Plan(blocks.size, levels, ranges, efforts, len(searches))


def _effort(search: Search) -> Effort:
    from exlq.numerics.compiled_blocks import Effort

    return Effort(
        candidates=np.array(search.candidates, np.float32),
        sweeps=search.sweeps,
        scale_targets=np.array(search.scale_targets, np.float32),
        min_targets=np.array(search.min_targets, np.float32),
        starts=np.array(search.starts, np.float32),
        scale_window=np.array(search.scale_window, np.float32),
        min_window=np.array(search.min_window, np.float32),
        rounds=search.rounds,
    )
