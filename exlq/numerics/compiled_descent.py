"""One run's step of `exlq.numerics.descent`, compiled as the loops of `exlq.numerics.compiled`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from exlq.numerics.compiled import Floats, compiled
from exlq.numerics.compiled_affine import best_candidates


def _improve(
    low: np.float32,
    high: np.float32,
    float16: bool,
    table: Floats,
    step: Floats,
    offset: Floats,
    own: Floats,
    inverse: Floats,
    feedback: Floats,
    pivots: Floats,
    order: NDArray[np.int64],
    weight: Floats,
    values: Floats,
    error: Floats,
    slope: Floats,
    kept: np.float32,
    picked: NDArray[np.int64],
    change: Floats,
) -> None:
    """Gives one run of channels its best candidate.

    Args:
        low, high, float16, table, step, offset: the candidates, as in `compiled_affine.best_candidates`.
        own, inverse: (run, run), of the damped Hessian; feedback, pivots, order: of its factor.
        weight, values, error, slope: (run, rows); values and error are changed.
        kept: of a row's cost, what a candidate has to be below.
        picked: (rows,), set to the candidate, 0 where none is good enough.
        change: (run, rows), set to how much the errors change.
    """
    run, rows = weight.shape
    target, missed = np.empty((run, rows), np.float32), np.empty((run, rows), np.float32)
    cost = np.zeros(rows, np.float32)
    _aim(own, inverse, weight, values, error, slope, target, missed, change, cost)
    for row in range(rows):
        cost[row] *= kept
        picked[row] = -1
    for place in range(run):
        missed[place] = target[order[place]]
    best_candidates(low, high, float16, table, step, offset, missed, feedback, pivots, cost, target, picked)
    for place in range(run):
        channel = order[place]
        for row in range(rows):
            better = target[place, row] if picked[row] >= 0 else values[channel, row]
            change[channel, row] = values[channel, row] - better
            error[channel, row] += change[channel, row]
            values[channel, row] = better
    for row in range(rows):
        picked[row] = max(picked[row], 0)


def _aimed(
    own: Floats,
    inverse: Floats,
    weight: Floats,
    values: Floats,
    error: Floats,
    slope: Floats,
    target: Floats,
    missed: Floats,
    spare: Floats,
    cost: Floats,
) -> None:
    """What would be best for a run if it needed no rounding, into `target`; what it costs more now."""
    run, rows = weight.shape
    _product(own, error, missed)
    for channel in range(run):
        for row in range(rows):
            missed[channel, row] = slope[channel, row] - missed[channel, row]
    _product(inverse, missed, target)
    for channel in range(run):
        for row in range(rows):
            target[channel, row] += weight[channel, row]
            missed[channel, row] = target[channel, row] - values[channel, row]
    _product(own, missed, spare)
    for channel in range(run):
        for row in range(rows):
            cost[row] += missed[channel, row] * spare[channel, row]


def _product_into(matrix: Floats, columns: Floats, out: Floats) -> None:
    """matrix @ columns, (n, n) and (n, rows), for an n so small that a library's call costs as much."""
    for row in range(len(matrix)):
        total = out[row]
        total[:] = 0
        for inner in range(len(matrix)):
            factor, other = matrix[row, inner], columns[inner]
            for lane in range(len(total)):
                total[lane] += factor * other[lane]


_product = compiled(_product_into)
_aim = compiled(_aimed)
improve = compiled(_improve)
