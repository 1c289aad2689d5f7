"""Inner loops over grids step · level - offset, compiled as those of `exlq.numerics.compiled`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exlq.numerics.compiled import ONE, ROWS_AT_ONCE, Floats, compiled, to_float16

HALF = np.float32(0.5)
LANES = 64  # rows side by side in a search


def _round_affine_columns(
    scale: Floats,
    offset: Floats,
    units: NDArray[np.int64],
    low: Floats,
    high: Floats,
    table: Floats,
    values: Floats,
    errors: Floats,
    weights: Floats,
    feedback: Floats,
    pivots: Floats,
    energy: Floats,
) -> None:
    """A few columns of the rounding sweep, one after the other, on grids scale · level - offset.

    Args:
        scale, offset: (units, options, out).
        units: (columns,), which of the first dimension holds for each column.
        low, high: (options,), the ends of the levels.
        table: (options, 16), what levels stand for where an option's `low` is above its `high`.
        values, errors, weights, feedback, pivots, energy: as in `compiled.round_columns`.
    """
    columns, options, out = values.shape
    aim = np.empty(ROWS_AT_ONCE, np.float32)
    for option in range(options):
        for start in range(0, out, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, out))
            spent = energy[option, rows]
            for column in range(columns):
                held, error = values[column, option, rows], errors[column, option, rows]
                step, shift = scale[units[column], option, rows], offset[units[column], option, rows]
                source, pivot = weights[column, rows], pivots[column]
                n = len(held)
                for row in range(n):
                    aim[row] = held[row]
                for earlier in range(column):
                    factor, handed_on = feedback[earlier, column], errors[earlier, option, rows]
                    for row in range(n):
                        aim[row] += factor * handed_on[row]
                nearest(aim, step, shift, low[option], high[option], False, table[option], held)
                for row in range(n):
                    residual = aim[row] - held[row]
                    spent[row] += pivot * residual * residual
                    error[row] = source[row] - held[row]


def _best_candidates(
    low: np.float32,
    high: np.float32,
    float16: bool,
    table: Floats,
    step: Floats,
    offset: Floats,
    target: Floats,
    feedback: Floats,
    pivots: Floats,
    cost: Floats,
    values: Floats,
    picked: NDArray[np.int64],
) -> None:
    """The best of several scales for a run of channels, each with its levels rounded in sequence.

    Args:
        low, high, float16, table: as in `_nearest`.
        step, offset: (candidates, rows).
        target: (columns, rows); feedback, pivots: of the columns.
        cost: (rows,), what is to be beaten; lowered to what is reached.
        values: (columns, rows), written where a candidate is better, and `picked`, (rows,), with its index.
    """
    columns, rows = target.shape
    aim, spent = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    error, value = np.empty((columns, LANES), np.float32), np.empty((columns, LANES), np.float32)
    for start in range(0, rows, LANES):
        n = min(LANES, rows - start)
        for candidate in range(len(step)):
            steps, shifts = step[candidate, start : start + n], offset[candidate, start : start + n]
            spent[:] = 0
            for column in range(columns):
                wanted, own, missed = target[column, start : start + n], value[column, :n], error[column]
                for lane in range(n):
                    aim[lane] = wanted[lane]
                for earlier in range(column):
                    factor, handed_on = feedback[earlier, column], error[earlier]
                    for lane in range(n):
                        aim[lane] += factor * handed_on[lane]
                nearest(aim, steps, shifts, low, high, float16, table, own)
                pivot = pivots[column]
                for lane in range(n):
                    residual = aim[lane] - own[lane]
                    spent[lane] += pivot * residual * residual
                    missed[lane] = wanted[lane] - own[lane]
            for lane in range(n):
                if spent[lane] < cost[start + lane]:
                    cost[start + lane] = spent[lane]
                    picked[start + lane] = candidate
                    for column in range(columns):
                        values[column, start + lane] = value[column, lane]


def _nearest(
    aim: Floats,
    step: Floats,
    shift: Floats,
    low: np.float32,
    high: np.float32,
    float16: bool,
    table: Floats,
    found: Floats,
) -> None:
    """The values step · level - shift nearest to `aim`, into `found`, (n,), rounded to float16 if wanted.

    Levels are integers from `low` to `high`, or where `low` is above `high` the numbers of `table`, (16,).
    """
    if low <= high:
        for i in range(len(found)):
            divisor = step[i] if step[i] != 0 else ONE
            level = min(max(np.rint((aim[i] + shift[i]) / divisor), low), high)
            found[i] = scaled(step[i], level, shift[i])
        if float16:
            to_float16(found, found.view(np.int32))
        return
    for i in range(len(found)):
        divisor = step[i] if step[i] != 0 else ONE
        place, index = (aim[i] + shift[i]) / divisor, 0
        for upper in range(1, 16):
            index += place > (table[upper - 1] + table[upper]) * HALF
        found[i] = scaled(step[i], table[index], shift[i])


def _scaled(step: np.float32, level: np.float32, shift: np.float32) -> np.float32:
    """Rounded after the product and again after the difference, as ggml has it."""
    difference: np.float32 = step * level - shift
    return difference


scaled = compiled(_scaled, fastmath=False)
nearest = compiled(_nearest)
round_affine_columns = compiled(_round_affine_columns)
best_candidates = compiled(_best_candidates)
