"""Blocks of a tile of rows, one after the other, compiled by numba: search, round, store."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from exlq.numerics import compiled_blocks, compiled_lanes
from exlq.numerics.compiled_blocks import (
    Effort,
    Found,
    Integers,
    Ranges,
    State,
    choose_integers,
    common_factor,
    keep_better,
    new_state,
    refit,
    search_sub_block,
)
from exlq.numerics.compiled_lanes import (
    HALF,
    HUGE,
    LANES,
    TABLE,
    ZERO,
    Floats,
    Levels,
    compiled,
    extremes,
    inverses,
    to_half,
    zeros,
)

STREAMS = 8  # rows read or written side by side: caches hold no more of them where rows are long


class Plan(NamedTuple):
    """What to do with every block."""

    size: int  # weights of a block
    levels: Levels
    ranges: Ranges
    efforts: tuple[Effort, Effort]  # one after the other; the better is kept, block by block
    tried: int  # of the two


class Stored(NamedTuple):
    """What is written, for the rows of the tile; steps and bases are float32 that float16 can hold."""

    levels: Integers  # (rows, in_features)
    steps: Floats  # (rows, blocks)
    bases: Floats  # (rows, blocks)
    scales: Integers  # (rows, sub_blocks)
    mins: Integers  # (rows, sub_blocks)


@compiled
def load(weight: Floats, start: int, x: Floats) -> None:
    """Columns from `start` on into x (columns, LANES), one row of the weight to a lane."""
    whole = len(weight) // STREAMS * STREAMS
    for first in range(0, whole, STREAMS):
        for i in range(len(x)):
            for lane in range(first, first + STREAMS):
                x[i, lane] = weight[lane, start + i]
    for lane in range(whole, len(weight)):
        for i in range(len(x)):
            x[i, lane] = weight[lane, start + i]


@compiled
def attempt(
    x: Floats,
    h: Floats,
    levels: Levels,
    ranges: Ranges,
    effort: Effort,
    found: Found,
    trial: State,
    best: State,
    work: Floats,
) -> None:
    """The best integers for the step and base of `trial`; `best` keeps what is better."""
    trial.error[:] = ZERO
    subs = len(trial.scales)
    size = len(x) // subs
    for sub in range(subs):
        part = slice(sub * size, (sub + 1) * size)
        choose_integers(x[part], h[part], levels, ranges, effort, found, sub, trial, work)
    keep_better(best, trial)


@compiled
def plain_start(x: Floats, levels: Levels, trial: State) -> None:
    """The step, and base, that the largest weights fit exactly: best where one is far above the others."""
    table = levels.table
    lowest = levels.low if len(table) == 0 else table[0]
    extremes(x, levels.shifts, trial.step, trial.base)
    for lane in range(LANES):
        trial.step[lane] /= levels.high if levels.shifts else lowest
        trial.base[lane] = -trial.base[lane]
    to_half(trial.step, False)
    to_half(trial.base, False)


@compiled
def search_block(
    x: Floats, h: Floats, levels: Levels, ranges: Ranges, effort: Effort, best: State, work: Floats
) -> None:
    """Everything a block stores but the levels, into `best` where it leaves less error than what is there."""
    subs = len(best.scales)
    size = len(x) // subs
    found = Found(zeros(subs), zeros(subs), zeros(subs), zeros(subs), zeros(subs))
    for sub in range(subs):
        part = slice(sub * size, (sub + 1) * size)
        search_sub_block(x[part], h[part], levels, effort, found, sub, work)
    pair, trial = zeros(2), new_state(subs)
    step, base = pair[0], pair[1]
    common_factor(found.scale, found.bend, effort.scale_targets, ranges.scale_low, ranges.scale_high, step)
    if levels.shifts:
        common_factor(found.shift, found.weight, effort.min_targets, ranges.min_low, ranges.min_high, base)
    if ranges.scale_low == ranges.scale_high:
        plain_start(x, levels, trial)
        attempt(x, h, levels, ranges, effort, found, trial, best, work)
    for start in range(len(effort.starts)):
        for lane in range(LANES):
            trial.step[lane] = step[lane] * effort.starts[start, 0]
            trial.base[lane] = base[lane] * effort.starts[start, 1]
        to_half(trial.step, True)
        to_half(trial.base, True)
        attempt(x, h, levels, ranges, effort, found, trial, best, work)
    for _ in range(effort.rounds):
        refit(x, h, levels, best, trial, work)
        to_half(trial.step, False)
        to_half(trial.base, False)
        attempt(x, h, levels, ranges, effort, found, trial, best, work)


@compiled
def clear_worse_than_zeros(x: Floats, h: Floats, ranges: Ranges, best: State) -> None:
    """Lanes whose zeros would leave less error get a step and base of zero."""
    empty = zeros(1)[0]
    for i in range(len(x)):
        row, factor = x[i], h[i]
        for lane in range(LANES):
            empty[lane] += factor * row[lane] * row[lane]
    for lane in range(LANES):
        if empty[lane] <= best.error[lane]:
            best.step[lane], best.base[lane] = ZERO, ZERO
            for sub in range(len(best.scales)):
                best.scales[sub, lane], best.mins[sub, lane] = ranges.scale_low, ranges.min_low
                best.scales[sub, lane] = max(best.scales[sub, lane], ZERO)


@compiled
def round_block(x: Floats, levels: Levels, best: State, out: Integers, work: Floats) -> None:
    """Plain rounding to the stored scales, into `out` (size, LANES)."""
    scale, shift, inverse = work[4], work[5], work[6]
    size = len(x) // len(best.scales)
    low, high, table = levels.low, levels.high, levels.table
    for i in range(len(x)):
        row, codes = x[i], out[i]
        if i % size == 0:
            for lane in range(LANES):
                scale[lane] = best.scales[i // size, lane] * best.step[lane]
                shift[lane] = best.mins[i // size, lane] * best.base[lane]
            inverses(scale, inverse)
        if len(table) == 0:
            for lane in range(LANES):
                q = np.rint((row[lane] + shift[lane]) * inverse[lane])
                codes[lane] = np.int8(min(max(q, low), high))
        else:
            for lane in range(LANES):
                position, index = row[lane] * inverse[lane], np.int8(0)
                for k in range(1, TABLE):
                    above = position > HALF * (table[k] + table[k - 1])
                    index = np.int8(k) if above else index
                codes[lane] = index


@compiled
def store(codes: Integers, start: int, out: Integers) -> None:
    """Codes (size, LANES) into columns from `start` on of `out` (rows, in_features)."""
    whole = len(out) // STREAMS * STREAMS
    for first in range(0, whole, STREAMS):
        for i in range(len(codes)):
            for lane in range(first, first + STREAMS):
                out[lane, start + i] = codes[i, lane]
    for lane in range(whole, len(out)):
        for i in range(len(codes)):
            out[lane, start + i] = codes[i, lane]


def _entry(sources: int) -> Any:
    """The function below, to be compiled anew whenever `sources` is another number."""

    def fit_rows(weight: Floats, h: Floats, plan: Plan, out: Stored) -> None:
        """Searches and rounds up to LANES rows, (rows, in_features), into `out`."""
        assert sources  # named here, it is part of the key the cache knows this function by
        rows, in_features = weight.shape
        size, levels, ranges = plan.size, plan.levels, plan.ranges
        blocks = in_features // size
        subs = out.scales.shape[1] // blocks
        x, work = zeros(size), zeros(20)
        best, codes = new_state(subs), np.empty((size, LANES), np.int8)
        for block in range(blocks):
            start = block * size
            factors = h[start : start + size]
            load(weight, start, x)
            best.error[:] = HUGE
            for turn in range(plan.tried):
                search_block(x, factors, levels, ranges, plan.efforts[turn], best, work)
            clear_worse_than_zeros(x, factors, ranges, best)
            round_block(x, levels, best, codes, work)
            store(codes, start, out.levels)
            for lane in range(rows):
                out.steps[lane, block] = best.step[lane]
                out.bases[lane, block] = best.base[lane]
                for sub in range(subs):
                    out.scales[lane, block * subs + sub] = np.int8(best.scales[sub, lane])
                    out.mins[lane, block * subs + sub] = np.int8(best.mins[sub, lane])

    return fit_rows


def _checksum() -> int:
    """Of all files whose functions are compiled into one: numba itself looks at the outermost's only."""
    files = (compiled_lanes.__file__, compiled_blocks.__file__, __file__)
    return zlib.crc32(b"".join(Path(file).read_bytes() for file in files)) | 1 << 32


fit_rows = compiled_lanes.compiled(_entry(_checksum()), cache=True)
