"""Simulated annealing of an allocation as ExLlamaV2 does it, seeded: an opponent for the exact solver.

The constants are those of exllamav2 0.3.2: the temperature falls from 2 to 1e-4 by a factor of 0.995,
with 1000 proposals at each; the sum of error**p is lowered in 240 runs: 80 over p from 1.5 to 3.5, 80
around the p whose run had the lowest largest error, 80 at the best p of these, of which the lowest sum
wins; then the slots in turn take their next option while that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HOTTEST, COLDEST, COOLING = 2.0, 1e-4, 0.995
PROPOSALS = 1000  # at each temperature
RUNS = 80  # of each of the three rounds
POWERS = (1.5, 3.5)
WINDOW = 0.075  # about the power of the first round


def anneal(options: Sequence[Sequence[tuple[float, float]]], budget: float, seed: int) -> list[int]:
    """The index of one option per slot, of at most `budget` bits in all.

    Args:
        options: of each slot, (bits, error); the first are those of the fewest bits, as the walk starts
            there, and what is left of the budget is spent in their order.

    Raises:
        ValueError: if the first options take more than the budget.
    """
    least = sum(slot[0][0] for slot in options)
    if least > budget:
        raise ValueError(f"the first options take {least:g} bits, {budget:g} are given; give more")
    bits = _table(options, 0, np.inf)
    errors = _table(options, 1, 1.0)
    counts = np.array([len(slot) for slot in options], np.int64)
    generator = np.random.default_rng(seed)

    def run(power: float) -> tuple[Ints, float, float]:
        """The choice of one run; its largest error and its sum of errors to the power."""
        start = int(generator.integers(1, 1 << 62))
        choice = _walk(bits, errors**power, counts, float(budget), np.uint64(start))
        found = np.take_along_axis(errors, choice[:, None], 1)[:, 0]
        return choice, float(found.max()), float((found**power).sum())

    power = _flattest(run, np.linspace(*POWERS, RUNS))
    power = _flattest(run, np.linspace(power - WINDOW, power + WINDOW, RUNS))
    best = min((run(power) for _ in range(RUNS)), key=lambda result: result[2])[0]
    return _filled(options, best.tolist(), budget)


def _table(options: Sequence[Sequence[tuple[float, float]]], column: int, fill: float) -> Floats:
    """(slots, most options) of one of the two figures."""
    table = np.full((len(options), max(map(len, options))), fill)
    for row, slot in zip(table, options, strict=True):
        row[: len(slot)] = [option[column] for option in slot]
    return table


def _flattest(run: Callable[[float], tuple[Ints, float, float]], powers: Floats) -> float:
    """The power whose run has the lowest largest error."""
    return float(min(powers, key=lambda power: run(float(power))[1]))


def _filled(options: Sequence[Sequence[tuple[float, float]]], choice: list[int], budget: float) -> list[int]:
    """The slots in turn take their next option, again and again, while it fits."""
    choice = list(choice)
    spent = sum(slot[index][0] for slot, index in zip(options, choice, strict=True))
    moved = True
    while moved:
        moved = False
        for slot, listed in enumerate(options):
            index = choice[slot]
            if index + 1 < len(listed) and spent - listed[index][0] + listed[index + 1][0] <= budget:
                spent += listed[index + 1][0] - listed[index][0]
                choice[slot], moved = index + 1, True
    return choice


@njit(cache=True)
def _walk(bits: Floats, costs: Floats, counts: Ints, budget: float, state: np.uint64) -> Ints:
    """Where one run ends. `state`, not 0, is that of a xorshift generator (Marsaglia 2003: 13, 7, 17)."""
    choice = np.zeros(len(counts), np.int64)
    spent = bits[:, 0].sum()
    temperature = HOTTEST
    low, unit = np.uint64((1 << 32) - 1), 1.0 / (1 << 53)
    while temperature > COLDEST:
        for _ in range(PROPOSALS):
            state ^= state << np.uint64(13)
            state ^= state >> np.uint64(7)
            state ^= state << np.uint64(17)
            # Two draws of 32 bits each, scaled without division.
            slot = np.int64(((state >> np.uint64(32)) * np.uint64(len(counts))) >> np.uint64(32))
            option = np.int64(((state & low) * np.uint64(counts[slot])) >> np.uint64(32))
            held = choice[slot]
            more_bits = bits[slot, option] - bits[slot, held]
            if spent + more_bits > budget:
                continue
            rise = (costs[slot, option] - costs[slot, held]) / temperature
            if rise > 0:
                state ^= state << np.uint64(13)
                state ^= state >> np.uint64(7)
                state ^= state << np.uint64(17)
                chance = (state >> np.uint64(11)) * unit
                if chance > 1 - rise and chance >= np.exp(-rise):  # 1 - x ≤ exp(-x) spares most of the latter
                    continue
            choice[slot] = option
            spent += more_bits
        temperature *= COOLING
    return choice
