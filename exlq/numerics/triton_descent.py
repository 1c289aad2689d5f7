"""One run's step of `exlq.numerics.descent` in one launch on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlq.numerics.triton_grid import EXACT, ROWS, nearest, on_device_of

if TYPE_CHECKING:
    from exlq.numerics.descent import Lattice
    from exlq.numerics.hessian import Run


def improve(
    run: Run,
    lattice: Lattice,
    table: Tensor,
    weight: Tensor,
    values: Tensor,
    error: Tensor,
    local: Tensor,
    start: int,
    own: Tensor,
    kept: float,
) -> Tensor:
    """Gives one run its best candidate; (rows,) int64, which that is, 0 where none is good enough.

    Args:
        table: (16,) float32, the lattice's or anything.
        weight, values, error: (in_features, rows), the latter two changed in place.
        local: (stretch, rows), the slope of the stretch beginning at channel `start`, changed in place.
        own: (stretch, stretch), the Hessian of the stretch; rows may lie apart.
        kept: of a run's cost, what a candidate has to be below.

    All but `own` are contiguous float32.
    """
    size, rows = len(run.own), weight.shape[1]
    picked = torch.empty(rows, dtype=torch.int64, device=weight.device)
    least, most = (lattice.low, lattice.high) if lattice.table is None else (1, 0)
    first, inner = run.channels.start, run.channels.start - start
    factor = run.factor
    arrays = (weight[first:], values[first:], error[first:], local, local[inner:], own[:, inner:])
    with on_device_of(weight):
        improve_kernel[(triton.cdiv(rows, ROWS),)](
            *arrays,
            *(run.own, run.inverse.contiguous(), factor.feedback, factor.pivots, factor.perm),
            *(lattice.step.contiguous(), lattice.offset.contiguous(), table, picked),
            *(float(least), float(most), kept),
            *(len(lattice.step), size, len(local), own.stride(0), *factor.feedback.stride(), rows),
            RUN=triton.next_power_of_2(size),
            ROWS=ROWS,
            FLOAT16=lattice.float16,
            **EXACT,
        )
    return picked


def _row_of(tile: tl.tensor, index: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """(rows,) row `wanted` of a tile; `index` numbers its rows, (run,)."""
    return tl.sum(tl.where((index == wanted)[:, None], tile, 0.0), 0)


def _times(matrix: tl.tensor, tile: tl.tensor, index: tl.tensor, size: tl.tensor) -> tl.tensor:
    """The (size, size) matrix at `matrix` times a tile, (run, rows)."""
    found = tl.zeros_like(tile)
    for inner in range(size):
        column = tl.load(matrix + index * size + inner, mask=index < size, other=0.0)
        found += column[:, None] * row_of(tile, index, inner)[None, :]
    return found


# fmt: off
def _improve_kernel(
    weight: tl.tensor, values: tl.tensor, error: tl.tensor,
    slope: tl.tensor, slope_inner: tl.tensor, whole_inner: tl.tensor,
    own: tl.tensor, inverse: tl.tensor, feedback: tl.tensor,
    pivots: tl.tensor, perm: tl.tensor, steps: tl.tensor,
    offsets: tl.tensor, table: tl.tensor, picked: tl.tensor,
    low: tl.tensor, high: tl.tensor, kept: tl.tensor,
    candidates: tl.tensor, size: tl.tensor, stretch: tl.tensor,
    stride: tl.tensor, feedback_row: tl.tensor, feedback_column: tl.tensor,
    rows: tl.tensor, RUN: tl.constexpr, ROWS: tl.constexpr,
    FLOAT16: tl.constexpr,
) -> None:
    # fmt: on
    """32 rows. All candidates are rounded and then, once more, each row's best one."""
    row, index = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, RUN)
    real = row < rows
    mask = (index < size)[:, None] & real[None, :]
    place = (index * rows)[:, None] + row[None, :]
    present = tl.load(values + place, mask=mask, other=0.0)
    missed = tl.load(error + place, mask=mask, other=0.0)
    rest = tl.load(slope_inner + place, mask=mask, other=0.0) - times(own, missed, index, size)
    target = tl.load(weight + place, mask=mask, other=0.0) + times(inverse, rest, index, size)
    missed = target - present
    least = tl.sum(missed * times(own, missed, index, size), 0) * kept
    best = tl.zeros((ROWS,), tl.int32) - 1
    taken = present
    for trial in range(candidates + 1):
        mine = tl.where(trial < candidates, trial, tl.maximum(best, 0)) * rows + row
        step = tl.load(steps + mine, mask=real, other=1.0)
        shift = tl.load(offsets + mine, mask=real, other=0.0)
        spent = tl.zeros((ROWS,), tl.float32)
        missed = tl.zeros((RUN, ROWS), tl.float32)
        for column in range(size):
            channel = tl.load(perm + column).to(tl.int32)
            wanted = row_of(target, index, channel)
            shares = feedback + index * feedback_row + column * feedback_column
            share = tl.load(shares, mask=index < column, other=0.0)
            aim = wanted + tl.sum(share[:, None] * missed, 0)
            value = nearest(aim, step, shift, low, high, table, FLOAT16)
            spent += tl.load(pivots + column) * (aim - value) * (aim - value)
            missed = tl.where((index == column)[:, None], (wanted - value)[None, :], missed)
            if trial == candidates:
                taken = tl.where((index == channel)[:, None], value[None, :], taken)
        better = (spent < least) & (trial < candidates)
        best = tl.where(better, trial, best)
        least = tl.where(better, spent, least)
    taken = tl.where((best >= 0)[None, :] & mask, taken, present)
    change = present - taken  # of the error
    missed = tl.load(error + place, mask=mask, other=0.0)
    tl.debug_barrier()
    tl.store(values + place, taken, mask=mask)
    tl.store(error + place, missed + change, mask=mask)
    for channel in range(stretch):
        share = tl.load(whole_inner + channel * stride + index, mask=index < size, other=0.0)
        at = slope + channel * rows + row
        moved = tl.load(at, mask=real, other=0.0) + tl.sum(share[:, None] * change, 0)
        tl.store(at, moved, mask=real)
    tl.store(picked + row, tl.maximum(best, 0).to(tl.int64), mask=real)


row_of = triton.jit(_row_of)
times = triton.jit(_times)
improve_kernel = triton.jit(_improve_kernel)
