"""A few columns of the rounding sweep in one launch: on GPUs what `exlq.numerics.compiled` is on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from exlq.numerics.triton_grid import EXACT, ROWS, nearest, on_device_of


class Steps(NamedTuple):
    """Grids scale · level - offset of several options; without offset, scale · level rounded to float16."""

    scale: Tensor  # (units, options, out) float32
    offset: Tensor | None  # alike
    units: Tensor  # (columns,) int64, which of the first dimension holds for each column
    low: Tensor  # (options,) float32
    high: Tensor  # (options,) float32, below `low` where levels stand for numbers of the table
    table: Tensor | None = None  # (options, 16) float32


def round_columns(
    steps: Steps,
    values: Tensor,
    errors: Tensor,
    weights: Tensor,
    feedback: Tensor,
    pivots: Tensor,
    energy: Tensor,
) -> None:
    """Rounds columns one after the other, each taking over the errors of those before.

    Args:
        values: (columns, options, out) weights to be rounded, and then their values; `errors` alike.
        weights: (columns, out) as they were before the sweep.
        feedback: (columns, columns), of which the part above the diagonal is used; pivots: (columns,).
        energy: (options, out), added to.

    All are float32 and contiguous; a column of `values` holds fewer than 2³¹ / columns weights.
    """
    columns, options, out = values.shape
    launch = round_kernel[(triton.cdiv(out, ROWS), options)]
    with on_device_of(values):
        launch(
            *(values, errors, weights, feedback, pivots, energy, steps.scale),
            steps.scale if steps.offset is None else steps.offset,
            *(steps.units, steps.low, steps.high),
            steps.low if steps.table is None else steps.table,
            *(columns, options, out),
            COLUMNS=triton.next_power_of_2(columns),
            ROWS=ROWS,
            FLOAT16=steps.offset is None,
            **EXACT,
        )


def _round_kernel(
    values: tl.tensor,
    errors: tl.tensor,
    weights: tl.tensor,
    feedback: tl.tensor,
    pivots: tl.tensor,
    energy: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    units: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    table: tl.tensor,
    columns: tl.tensor,
    options: tl.tensor,
    out: tl.tensor,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    FLOAT16: tl.constexpr,
) -> None:
    """One option and 32 rows; their errors so far stay in registers."""
    row, option = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    real = row < out
    place = option * out + row
    least, most, numbers = tl.load(low + option), tl.load(high + option), table + option * 16
    earlier = tl.arange(0, COLUMNS)
    missed = tl.zeros((COLUMNS, ROWS), tl.float32)
    spent = tl.load(energy + place, mask=real, other=0.0)
    for column in range(columns):
        own = column * options * out + place
        share = tl.load(feedback + earlier * columns + column, mask=earlier < column, other=0.0)
        aim = tl.load(values + own, mask=real, other=0.0) + tl.sum(share[:, None] * missed, 0)
        held = tl.load(units + column) * options * out + place
        step = tl.load(scale + held, mask=real, other=1.0)
        shift = tl.zeros_like(step)
        if not FLOAT16:
            shift = tl.load(offset + held, mask=real, other=0.0)
        value = nearest(aim, step, shift, least, most, numbers, FLOAT16)
        error = tl.load(weights + column * out + row, mask=real, other=0.0) - value
        missed = tl.where(earlier[:, None] == column, error[None, :], missed)
        spent += tl.load(pivots + column) * (aim - value) * (aim - value)
        tl.store(values + own, value, mask=real)
        tl.store(errors + own, error, mask=real)
    tl.store(energy + place, spent, mask=real)


round_kernel = triton.jit(_round_kernel)
