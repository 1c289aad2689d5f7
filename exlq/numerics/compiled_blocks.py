"""The search for the scales of whole blocks, compiled by numba; lanes as in `compiled_lanes`.

A weight is step · s · q - base · m with integers s and m for every sub-block, step and base float16 for
every block.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exlq.numerics.compiled_lanes import (
    HUGE,
    LANES,
    TINY,
    ZERO,
    Floats,
    Levels,
    compiled,
    errors,
    extremes,
    inverses,
    moments,
    refine,
    zeros,
)

Integers = NDArray[np.int8]


class Ranges(NamedTuple):
    """Integers that s and m may be, both ends included."""

    scale_low: np.float32
    scale_high: np.float32
    min_low: np.float32
    min_high: np.float32


class Effort(NamedTuple):
    """What is tried.

    candidates: (n, 2) starts of a sub-block. The first number is the level that its largest weight, or
        the top of its range, is put on; the second where the grid lies: 0 begins with the range, 1 ends
        with it.
    sweeps: of rounding and least squares from the best start.
    scale_targets: integers that the largest scale of a block is put on, of which one is chosen;
        `min_targets` alike.
    starts: (n, 2) factors on the step and base found so.
    scale_window, min_window: added to the nearest integers.
    rounds: of least squares for step and base with all integers held.
    """

    candidates: Floats
    sweeps: int
    scale_targets: Floats
    min_targets: Floats
    starts: Floats
    scale_window: Floats
    min_window: Floats
    rounds: int


class Found(NamedTuple):
    """The best of each sub-block with scale and shift free, (sub_blocks, lanes)."""

    scale: Floats
    shift: Floats
    bend: Floats  # of the error, over the scale
    weight: Floats  # of the error, over the shift
    mean: Floats  # weighted mean of q, by which the best shift grows with the scale


class State(NamedTuple):
    """Stored numbers of one block of every row and the error they leave, all as floats."""

    step: Floats  # (lanes,)
    base: Floats
    scales: Floats  # (sub_blocks, lanes)
    mins: Floats
    error: Floats  # (lanes,)


@compiled
def new_state(subs: int) -> State:
    lanes = zeros(3)
    return State(lanes[0], lanes[1], zeros(subs), zeros(subs), lanes[2])


@compiled
def search_sub_block(
    x: Floats, h: Floats, levels: Levels, effort: Effort, found: Found, sub: int, work: Floats
) -> None:
    """The least error over scale and shift, from several starts, into row `sub` of `found`."""
    top, bottom, scale, shift, error, least = work[4], work[5], work[6], work[7], work[8], work[9]
    sums, total = work[10:15], h.sum()
    best_scale, best_shift = found.scale[sub], found.shift[sub]
    least[:] = HUGE
    extremes(x, levels.shifts, top, bottom)
    for attempt in range(len(effort.candidates) + effort.sweeps):
        if attempt < len(effort.candidates):
            target, place = effort.candidates[attempt, 0], effort.candidates[attempt, 1]
            for lane in range(LANES):
                scale[lane] = top[lane] / target
                over = scale[lane] * levels.high - top[lane]
                shift[lane] = place * over - bottom[lane] if levels.shifts else ZERO
            if levels.shifts == 1:
                for lane in range(LANES):
                    shift[lane] = max(shift[lane], ZERO)
        else:
            scale[:] = best_scale
            shift[:] = best_shift
        moments(x, h, scale, shift, levels, work[0], sums)
        refine(sums, total, levels.shifts, scale, shift, error)
        for lane in range(LANES):
            if error[lane] < least[lane]:
                least[lane] = error[lane]
                best_scale[lane] = scale[lane]
                best_shift[lane] = shift[lane]
                found.mean[sub, lane] = sums[4, lane] / total if levels.shifts else ZERO
                found.bend[sub, lane] = sums[3, lane] - sums[4, lane] * found.mean[sub, lane]
    found.weight[sub] = total


@compiled
def common_factor(
    wanted: Floats, weight: Floats, targets: Floats, low: np.float32, high: np.float32, out: Floats
) -> None:
    """The factor of integers from `low` to `high` that leaves least of `wanted`, (subs, lanes)."""
    for lane in range(LANES):
        largest, least = ZERO, HUGE
        for sub in range(len(wanted)):
            if abs(wanted[sub, lane]) > abs(largest):
                largest = wanted[sub, lane]
        out[lane] = ZERO
        if abs(largest) < TINY:
            continue
        for target in targets:
            inverse, above, below = target / largest, ZERO, ZERO
            for sub in range(len(wanted)):
                integer = min(max(np.rint(wanted[sub, lane] * inverse), low), high)
                above += weight[sub, lane] * wanted[sub, lane] * integer
                below += weight[sub, lane] * integer * integer
            factor = above / below if below > ZERO else largest / target
            left = ZERO
            for sub in range(len(wanted)):
                integer = min(max(np.rint(wanted[sub, lane] * inverse), low), high)
                gap = wanted[sub, lane] - factor * integer
                left += weight[sub, lane] * gap * gap
            if left < least:
                least = left
                out[lane] = factor


@compiled
def choose_integers(
    x: Floats,
    h: Floats,
    levels: Levels,
    ranges: Ranges,
    effort: Effort,
    found: Found,
    sub: int,
    state: State,
    work: Floats,
) -> None:
    """The s and m around the best free scale and shift that leave the least error, under the state's step.

    Fills row `sub` of the state's integers and adds to its error.
    """
    by_step, by_base, scale, shift, error, least = work[4], work[5], work[6], work[7], work[8], work[9]
    s, m, centre = work[10], work[11], work[12]
    inverses(state.step, by_step)
    inverses(state.base, by_base)
    least[:] = HUGE
    for away in effort.scale_window:
        for lane in range(LANES):
            integer = np.rint(found.scale[sub, lane] * by_step[lane]) + away
            s[lane] = min(max(integer, ranges.scale_low), ranges.scale_high)
            scale[lane] = s[lane] * state.step[lane]
        for lane in range(LANES):
            grown = (scale[lane] - found.scale[sub, lane]) * found.mean[sub, lane]
            centre[lane] = np.rint((found.shift[sub, lane] + grown) * by_base[lane])
        for aside in effort.min_window:
            for lane in range(LANES):
                m[lane] = min(max(centre[lane] + aside, ranges.min_low), ranges.min_high)
                shift[lane] = m[lane] * state.base[lane]
            errors(x, h, scale, shift, levels, work[0], error)
            for lane in range(LANES):
                if error[lane] < least[lane]:
                    least[lane] = error[lane]
                    state.scales[sub, lane] = s[lane]
                    state.mins[sub, lane] = m[lane]
    for lane in range(LANES):
        state.error[lane] += least[lane]


@compiled
def keep_better(best: State, other: State) -> None:
    for lane in range(LANES):
        if other.error[lane] < best.error[lane]:
            best.error[lane], best.step[lane] = other.error[lane], other.step[lane]
            best.base[lane] = other.base[lane]
            for sub in range(len(best.scales)):
                best.scales[sub, lane] = other.scales[sub, lane]
                best.mins[sub, lane] = other.mins[sub, lane]


@compiled
def refit(x: Floats, h: Floats, levels: Levels, best: State, trial: State, work: Floats) -> None:
    """Least squares of step and base with the integers of `best` held, into `trial`."""
    scale, shift, sums, normal = work[4], work[5], work[10:15], work[15:20]
    size = len(x) // len(best.scales)
    normal[:] = ZERO
    for sub in range(len(best.scales)):
        part, s, m = slice(sub * size, (sub + 1) * size), best.scales[sub], best.mins[sub]
        total = h[part].sum()
        for lane in range(LANES):
            scale[lane] = s[lane] * best.step[lane]
            shift[lane] = m[lane] * best.base[lane]
        moments(x[part], h[part], scale, shift, levels, work[0], sums)
        for lane in range(LANES):
            normal[0, lane] += s[lane] * s[lane] * sums[3, lane]
            normal[1, lane] += s[lane] * m[lane] * sums[4, lane]
            normal[2, lane] += m[lane] * m[lane] * total
            normal[3, lane] += s[lane] * sums[1, lane]
            normal[4, lane] += m[lane] * sums[2, lane]
    for lane in range(LANES):
        a, b, c = normal[0, lane], normal[1, lane], normal[2, lane]
        up, down = normal[3, lane], normal[4, lane]
        spread = a * c - b * b
        both = spread > np.float32(1e-6) * a * c and levels.shifts
        alone = up / a if a > TINY else ZERO
        base = best.base[lane] + ((b * up - a * down) / spread if both else ZERO)
        trial.step[lane] = best.step[lane] + ((c * up - b * down) / spread if both else alone)
        trial.base[lane] = max(base, ZERO) if levels.shifts == 1 else base
