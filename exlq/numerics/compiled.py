"""Inner loops compiled for the CPU by numba, each beside a plain form in torch that gives the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]
ROWS_AT_ONCE = 512
ONE = np.float32(1)
TWO_24 = np.float32(2**24)
SMALLEST_NORMAL = np.float32(2**-14)  # of float16
SHIFT = np.int32(13)  # bits of float32's fraction that float16 lacks
HALF_STEP, ODD, KEPT = np.int32((1 << 12) - 1), np.int32(1), np.int32(-1 << 13)


def _rounding_errors(weights: Floats, scales: Floats, importance: Floats, half: Floats, out: Floats) -> None:
    """Σ_s importance[s] · (clip(round(w / scale), -half, half - 1) · scale - w)², w = weights[s], into `out`.

    Weights are (size, groups, rows), scales and `out` (probes, groups, rows), `half` (groups,).
    """
    size, groups, rows = weights.shape
    inverse = np.empty(rows, np.float32)
    for probe in range(len(scales)):
        for group in range(groups):
            scale, total = scales[probe, group], out[probe, group]
            low, high = -half[group], half[group] - ONE
            for row in range(rows):
                inverse[row] = ONE / scale[row]
                total[row] = 0
            for channel in range(size):
                weight, factor = weights[channel, group], importance[channel]
                for row in range(rows):
                    level = min(max(np.rint(weight[row] * inverse[row]), low), high)
                    error = level * scale[row] - weight[row]
                    total[row] += factor * error * error


def _first_minimum(values: Floats, out: NDArray[np.int64]) -> None:
    """The index of the least of each column of `values`, (n, columns), the first of equals, into `out`."""
    best = values[0].copy()
    out[:] = 0
    for index in range(1, len(values)):
        row = values[index]
        for column in range(len(best)):
            if row[column] < best[column]:
                best[column] = row[column]
                out[column] = index


def _round_columns(
    scale: Floats,
    low: Floats,
    values: Floats,
    errors: Floats,
    weights: Floats,
    feedback: Floats,
    pivots: Floats,
    energy: Floats,
) -> None:
    """A few columns of the rounding sweep, one after the other, on grids fp16(level · scale).

    Args:
        scale: (options, out); low: (options,), the lowest levels.
        values: (columns, options, out) weights to be rounded, and then their values; `errors` alike.
        weights: (columns, out) as they were before the sweep.
        feedback: (columns, columns), of which the part above the diagonal is used; pivots: (columns,).
        energy: (options, out), added to.
    """
    columns, options, out = values.shape
    target, value = np.empty(ROWS_AT_ONCE, np.float32), np.empty(ROWS_AT_ONCE, np.float32)
    bits = value.view(np.int32)
    for option in range(options):
        least, most = low[option], -ONE - low[option]
        for start in range(0, out, ROWS_AT_ONCE):
            rows = slice(start, min(start + ROWS_AT_ONCE, out))
            steps, spent = scale[option, rows], energy[option, rows]
            for column in range(columns):
                held, error = values[column, option, rows], errors[column, option, rows]
                source, pivot = weights[column, rows], pivots[column]
                n = len(held)
                for row in range(n):
                    target[row] = held[row]
                for earlier in range(column):
                    factor, handed_on = feedback[earlier, column], errors[earlier, option, rows]
                    for row in range(n):
                        target[row] += factor * handed_on[row]
                for row in range(n):
                    value[row] = min(max(np.rint(target[row] / steps[row]), least), most) * steps[row]
                to_float16(value[:n], bits[:n])
                for row in range(n):
                    residual = target[row] - value[row]
                    spent[row] += pivot * residual * residual
                    error[row] = source[row] - value[row]
                    held[row] = value[row]


def _to_float16(value: Floats, bits: NDArray[np.int32]) -> None:
    """To float16, nearest even: 13 bits fewer, or steps of 2⁻²⁴ if subnormal; `bits` are those of `value`."""
    for row in range(len(value)):
        subnormal = np.rint(value[row] * TWO_24) / TWO_24
        tiny = abs(value[row]) < SMALLEST_NORMAL
        bits[row] = (bits[row] + HALF_STEP + ((bits[row] >> SHIFT) & ODD)) & KEPT
        value[row] = subnormal if tiny else value[row]


def compiled(function: Any, **changes: Any) -> Any:
    """The function as machine code, kept in a cache where one can be written."""
    settings: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan"}} | changes
    try:
        return njit(function, cache=True, **settings)
    except RuntimeError:  # numba finds no directory for the cache
        return njit(function, **settings)


to_float16 = compiled(_to_float16)
round_columns = compiled(_round_columns)
rounding_errors = compiled(_rounding_errors)
first_minimum = compiled(_first_minimum)
