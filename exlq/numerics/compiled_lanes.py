"""One sub-block of many rows at a time, compiled by numba: lane r of every array belongs to row r.

A weight is scale · q - shift, where q is a level, or the entry of a table at the level. Weights are
(size, lanes) and the importance of their squared errors is (size,), the same for all rows. Loops over
lanes touch few arrays each: what they write could overlap what they read, and the compiler gives up
where it has too many pairs to tell apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)
MARGIN = np.float32(1 / 32)
TINY = np.float32(1e-30)
HUGE = np.float32(3e38)
LARGEST_HALF = np.float32(65504)
SMALLEST_NORMAL = np.float32(2**-14)  # of float16
TWO_24 = np.float32(2**24)
SHIFT = np.int32(13)  # bits of float32's fraction that float16 lacks
HALF_STEP, ODD, KEPT = np.int32((1 << 12) - 1), np.int32(1), np.int32(-1 << 13)
TABLE = 16  # entries of a table
LANES = 128  # rows of a tile
LINE = 16  # float32 in a line of the cache


class Levels(NamedTuple):
    """Integers from `low` to `high`, or the values of a rising `table` of sixteen unless it is empty."""

    low: np.float32
    high: np.float32
    table: Floats
    shifts: int  # 0: the shift is always zero; 1: it is zero or more; 2: any


def compiled(function: Any, cache: bool = False) -> Any:
    """The function as machine code, on request kept in a cache where one can be written."""
    settings: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan", "nsz"}}
    try:
        return njit(function, cache=cache, **settings)
    except RuntimeError:  # numba finds no directory for the cache
        return njit(function, **settings)


@compiled
def zeros(rows: int) -> Floats:
    """(rows, LANES) beginning where a line of the cache does: what straddles two takes half as long again."""
    whole = np.zeros(rows * LANES + LINE, np.float32)
    start = (-(whole.ctypes.data // 4)) % LINE
    return whole[start : start + rows * LANES].reshape((rows, LANES))


@compiled
def to_half(values: Floats, upward: bool) -> None:
    """Rounds to the nearest finite float16, ties to even, in place; what is not zero stays so.

    `upward`, subnormal magnitudes are rounded up but for the least excess: integers that multiply a
    rounded step can make up for one that is too large, not for one that is too small.
    """
    bits = values.view(np.int32)
    for lane in range(len(values)):
        value = min(max(values[lane], -LARGEST_HALF), LARGEST_HALF)
        values[lane] = value
        if abs(value) < SMALLEST_NORMAL:
            steps = abs(value) * TWO_24
            whole = np.ceil(steps - MARGIN) if upward else np.rint(steps)
            whole = max(whole, ONE) if value != ZERO else ZERO
            values[lane] = np.copysign(whole / TWO_24, value)
        else:
            bits[lane] = (bits[lane] + HALF_STEP + ((bits[lane] >> SHIFT) & ODD)) & KEPT


@compiled
def inverses(scale: Floats, out: Floats) -> None:
    """1 / scale, or zero where there is none."""
    for lane in range(len(scale)):
        out[lane] = ONE / scale[lane] if abs(scale[lane]) > TINY else ZERO


@compiled
def errors(
    x: Floats, h: Floats, scale: Floats, shift: Floats, levels: Levels, inverse: Floats, out: Floats
) -> None:
    """Σ h (x - value)² of every lane after plain rounding, into `out`; `inverse` is overwritten."""
    inverses(scale, inverse)
    out[:] = ZERO
    low, high, table = levels.low, levels.high, levels.table
    for i in range(len(x)):
        row, factor = x[i], h[i]
        if len(table) == 0:
            for lane in range(len(out)):
                wanted = row[lane] + shift[lane]
                q = min(max(np.rint(wanted * inverse[lane]), low), high)
                residual = wanted - q * scale[lane]
                out[lane] += factor * residual * residual
        else:
            for lane in range(len(out)):
                wanted = row[lane] + shift[lane]
                position, q = wanted * inverse[lane], table[0]
                for k in range(1, TABLE):  # as many as known when this is compiled: it is unrolled
                    q = table[k] if position > HALF * (table[k] + table[k - 1]) else q
                residual = wanted - q * scale[lane]
                out[lane] += factor * residual * residual


@compiled
def moments(
    x: Floats, h: Floats, scale: Floats, shift: Floats, levels: Levels, inverse: Floats, sums: Floats
) -> None:
    """Σ h e², Σ h e q, Σ h e, Σ h q², Σ h q of every lane into `sums` (5, lanes), e = x - value.

    Residuals and not weights, so that little is lost where errors are small. `inverse` is overwritten.
    """
    inverses(scale, inverse)
    sums[:] = ZERO
    low, high, table = levels.low, levels.high, levels.table
    for i in range(len(x)):
        row, factor = x[i], h[i]
        if len(table) == 0:
            for lane in range(len(scale)):
                wanted = row[lane] + shift[lane]
                q = min(max(np.rint(wanted * inverse[lane]), low), high)
                residual = wanted - q * scale[lane]
                weighted, heavy = factor * residual, factor * q
                sums[0, lane] += weighted * residual
                sums[1, lane] += weighted * q
                sums[2, lane] += weighted
                sums[3, lane] += heavy * q
                sums[4, lane] += heavy
        else:
            for lane in range(len(scale)):
                wanted = row[lane] + shift[lane]
                position, q = wanted * inverse[lane], table[0]
                for k in range(1, TABLE):
                    q = table[k] if position > HALF * (table[k] + table[k - 1]) else q
                residual = wanted - q * scale[lane]
                weighted, heavy = factor * residual, factor * q
                sums[0, lane] += weighted * residual
                sums[1, lane] += weighted * q
                sums[2, lane] += weighted
                sums[3, lane] += heavy * q
                sums[4, lane] += heavy


@compiled
def refine(sums: Floats, total: np.float32, shifts: int, scale: Floats, shift: Floats, out: Floats) -> None:
    """Least squares of scale and shift with the levels held, in place; the error they leave into `out`.

    `sums` are the moments at `scale` and `shift`, `total` is Σ h.
    """
    for lane in range(len(scale)):
        error, slope, bias = sums[0, lane], sums[1, lane], sums[2, lane]
        squares, mean = sums[3, lane], sums[4, lane] / total if shifts else ZERO
        spread = squares - mean * sums[4, lane]
        usable = spread > TINY
        step = (slope - mean * bias) / spread if usable else ZERO
        rise = bias / total - step * mean if shifts else ZERO
        left = error - step * slope - rise * bias
        moved = shift[lane] - rise
        if shifts == 1 and moved < ZERO:
            back, moved = shift[lane], ZERO
            slope -= back * sums[4, lane]
            step = slope / squares if squares > TINY else ZERO
            left = error - back * (bias + bias - back * total) - step * slope
        scale[lane] += step
        shift[lane] = moved
        out[lane] = max(left, ZERO)


@compiled
def extremes(x: Floats, shifts: int, base: Floats, bottom: Floats) -> None:
    """Without shifts: the weight of largest magnitude into `base`. With: the range, and its lower end.

    The range includes zero where shifts cannot be negative.
    """
    if shifts == 0:
        base[:] = ZERO
        bottom[:] = ZERO
        for i in range(len(x)):
            for lane in range(len(base)):
                base[lane] = x[i, lane] if abs(x[i, lane]) > abs(base[lane]) else base[lane]
        return
    base[:] = ZERO if shifts == 1 else -HUGE
    bottom[:] = ZERO if shifts == 1 else HUGE
    for i in range(len(x)):
        for lane in range(len(base)):
            base[lane] = max(base[lane], x[i, lane])
        for lane in range(len(base)):
            bottom[lane] = min(bottom[lane], x[i, lane])
    for lane in range(len(base)):
        base[lane] -= bottom[lane]
