"""Inner loops compiled for the CPU by numba, each beside a plain form in torch that gives the same."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def _rounding_errors(weights: Floats, scales: Floats, importance: Floats, half: Floats, out: Floats) -> None:
    """Σ_s importance[s] · (clip(round(w / scale), -half, half - 1) · scale - w)², w = weights[s], into `out`.

    Weights are (size, groups, rows), scales and `out` (probes, groups, rows), `half` (groups,).
    """
    size, groups, rows = weights.shape
    inverse = np.empty(rows, np.float32)
    for probe in range(len(scales)):
        for group in range(groups):
            scale, total = scales[probe, group], out[probe, group]
            low, high = -half[group], half[group] - np.float32(1)
            for row in range(rows):
                inverse[row] = np.float32(1) / scale[row]
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


def _compile(function: Any) -> Any:
    """The function as machine code, kept in a cache where one can be written."""
    settings: Any = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "nnan"}}
    try:
        return njit(function, cache=True, **settings)
    except RuntimeError:  # numba finds no directory for the cache
        return njit(function, **settings)


rounding_errors = _compile(_rounding_errors)
first_minimum = _compile(_first_minimum)
