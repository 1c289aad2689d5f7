"""The multiple-choice knapsack solved to proven optimality.

A dynamic programme over the items keeps the undominated (bits, loss) of their partial sums and
drops every sum from which no answer under a ceiling can come, by Lagrangian bounds of the items
left. The ceiling starts at the relaxation's optimum and rises until an answer appears under it;
that answer is the optimum, and few sums were ever alive. (Bounding partial sums in this way is
after Dyer, Riha and Walker 1995, "A hybrid dynamic programming/branch-and-bound algorithm for the
multiple-choice knapsack problem", J. Comput. Appl. Math. 58.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from exlq.allocation import lagrange
from exlq.allocation.problem import Problem, Solution

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Partial sums kept at once, in all, and at least; dropping one above these is no longer a proof.
MAX_STATES, MAX_ALL_STATES, MIN_STATES = 1 << 17, 1 << 22, 1 << 12
CEILING_DOUBLINGS = 24
LOSS_DIGITS = 62  # two losses of at most 62 binary digits add up within int64
# Bounds at multipliers around the relaxation's own see partial sums that spent too much or too little.
MULTIPLIERS = (1.0, 0.0, 0.5, 0.75, 0.9, 0.97, 0.99, 0.997, 1.003, 1.01, 1.03, 1.1, 1.3, 2.0, 4.0)


@dataclass(frozen=True)
class _Table:
    """Every choice still possible, flat: item i owns entries `start[i]` to `start[i + 1]`.

    `bits` count from the item's fewest in units of their common divisor; `loss` is rounded
    down to units that int64 can sum; `choice` is the index the caller knows.
    """

    bits: Ints
    loss: Ints
    choice: Ints
    start: Ints

    @property
    def n_items(self) -> int:
        return len(self.start) - 1

    def kept(self, keep: NDArray[np.bool_]) -> _Table:
        start = np.concatenate([[0], np.cumsum(keep)])[self.start]
        return _Table(self.bits[keep], self.loss[keep], self.choice[keep], start)


class _Level(NamedTuple):
    """Partial sums after one more item: its entry in the table, and the sum it was added to."""

    entry: Ints
    parent: Ints


class _Found(NamedTuple):
    choice: list[int] | None  # None when no answer lies under the ceiling
    loss: int
    complete: bool  # False when partial sums were dropped for their number alone


def solve(problem: Problem, budget_bits: int) -> Solution:
    """The choice of least loss within the budget; of those, fewest bits, then lowest indices in item order.

    Losses are compared as integers: rounded down to 2**-61 of the answer's own loss where they
    have more digits, which is finer than a float holds the sum. Where losses are all but a
    straight line in the bits, partial sums can be too many to keep; then the best answer met is
    returned with the bound proven until then.
    """
    incumbent = lagrange.fill(problem, budget_bits)
    relaxed = lagrange.relax(problem, budget_bits)
    most = problem.total_loss(incumbent)
    shift = max(0, most.bit_length() - LOSS_DIGITS)
    divisor = _common_divisor(problem)
    table = _table(problem, divisor, shift, most)
    spare = (budget_bits - sum(map(min, problem.bits))) // divisor
    slopes = np.array(MULTIPLIERS) * float(relaxed.slope * divisor / (1 << shift))

    bound = relaxed.bound
    for ceiling in _ceilings(relaxed.bound, most, shift, table.n_items):
        found = _search(table, spare, ceiling, slopes)
        if found.choice is not None:
            if found.complete:
                return Solution(found.choice, max(bound, found.loss << shift))
            return Solution(min(incumbent, found.choice, key=lambda c: _rank(problem, c)), bound)
        if not found.complete:
            return Solution(incumbent, bound)
        bound = max(bound, (ceiling + 1) << shift)
    raise AssertionError("the incumbent lies under the last ceiling")


def _rank(problem: Problem, choice: list[int]) -> tuple[int, int, list[int]]:
    return problem.total_loss(choice), problem.total_bits(choice), choice


def _ceilings(low: int, high: int, shift: int, n_items: int) -> Iterator[int]:
    """Rising ceilings in shifted units, the last one not below the incumbent's rounded loss."""
    base = (low >> shift) - (n_items if shift else 0)  # rounding down takes less than 1 from each item
    gap = (high >> shift) - base
    yield from sorted({base + (gap >> doublings) for doublings in range(CEILING_DOUBLINGS + 1)})


def _common_divisor(problem: Problem) -> int:
    return math.gcd(*(b - min(bits) for bits in problem.bits for b in bits)) or 1


def _table(problem: Problem, divisor: int, shift: int, most: int) -> _Table:
    """Undominated choices by rising bits, without those that alone lose more than `most`."""
    rows = [
        [j for j in lagrange.undominated(bits, losses) if losses[j] <= most]
        for bits, losses in zip(problem.bits, problem.losses, strict=True)
    ]
    flat = [(i, j) for i, row in enumerate(rows) for j in row]
    fewest = [min(bits) for bits in problem.bits]
    return _Table(
        bits=np.array([(problem.bits[i][j] - fewest[i]) // divisor for i, j in flat], dtype=np.int64),
        loss=np.array([problem.losses[i][j] >> shift for i, j in flat], dtype=np.int64),
        choice=np.array([j for _, j in flat], dtype=np.int64),
        start=np.cumsum([0, *map(len, rows)]),
    )


def _search(table: _Table, spare: int, ceiling: int, slopes: Floats) -> _Found:
    """The best answer of loss at most `ceiling`: last item first, so that equal sums keep low indices."""
    tolerance = (table.n_items + 8) * 2.0**-51 * (ceiling + 2.0 * slopes * spare)
    limits = ceiling + slopes * spare + tolerance  # (multipliers,)
    for _ in range(2):
        table, possible = _reduce(table, limits, slopes)
        if not possible:
            return _Found(None, 0, True)
    before = _sums_before(table, slopes)  # (multipliers, items)
    fewest = np.cumsum(table.bits[table.start[:-1]])  # ascending bits: the first entry is the smallest

    bits, loss = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    levels: list[_Level] = []
    complete, left = True, MAX_ALL_STATES
    for item in reversed(range(table.n_items)):
        entries = np.arange(table.start[item], table.start[item + 1])
        most_bits = spare - (int(fewest[item - 1]) if item else 0)
        entry, parent = _extend(bits, loss, table, entries, most_bits, limits - before[:, item], slopes)
        bits, loss = bits[parent] + table.bits[entry], loss[parent] + table.loss[entry]
        room = max(MIN_STATES, min(MAX_STATES, left))
        if len(bits) > room:
            complete = False
            keep = np.sort(np.argsort(loss + slopes[0] * bits, kind="stable")[:room])
            bits, loss, entry, parent = bits[keep], loss[keep], entry[keep], parent[keep]
        levels.append(_Level(entry, parent))
        left -= len(entry)
    if not len(loss) or int(loss[-1]) > ceiling:
        return _Found(None, 0, complete)
    return _Found(_trace(levels, table), int(loss[-1]), complete)


def _reduce(table: _Table, limits: Floats, slopes: Floats) -> tuple[_Table, bool]:
    """The table without choices that no answer within the limits holds; False if an item has none left."""
    keep = np.ones(len(table.bits), dtype=bool)
    for slope, limit in zip(slopes, limits, strict=True):
        cost = table.loss + slope * table.bits
        least = np.minimum.reduceat(cost, table.start[:-1])
        keep &= cost - np.repeat(least, np.diff(table.start)) <= limit - least.sum()
    reduced = table.kept(keep)
    return reduced, bool((np.diff(reduced.start) > 0).all())


def _sums_before(table: _Table, slopes: Floats) -> Floats:
    """(multipliers, items): the least cost of all items before each one."""
    cost = table.loss + slopes[:, None] * table.bits  # (multipliers, entries)
    least = np.minimum.reduceat(cost, table.start[:-1], axis=1)  # (multipliers, items)
    sums = np.cumsum(least, axis=1)
    return np.concatenate([np.zeros((len(slopes), 1)), sums[:, :-1]], axis=1)


def _extend(
    bits: Ints, loss: Ints, table: _Table, entries: Ints, most_bits: int, limits: Floats, slopes: Floats
) -> tuple[Ints, Ints]:
    """(entry, parent) of the undominated sums with one more item, by rising bits and falling loss."""
    kept: list[tuple[Ints, Ints, Ints, Ints]] = []
    for entry in entries:
        more_bits, more_loss = bits + table.bits[entry], loss + table.loss[entry]
        parent = np.flatnonzero(more_bits <= most_bits)
        for slope, limit in zip(slopes, limits, strict=True):
            parent = parent[more_loss[parent] + slope * more_bits[parent] <= limit]
        kept.append((more_bits[parent], more_loss[parent], np.full(len(parent), entry), parent))
    all_bits, all_loss, entry, parent = (np.concatenate(column) for column in zip(*kept, strict=True))
    order = np.lexsort((table.choice[entry], all_loss, all_bits))
    lowest = np.minimum.accumulate(all_loss[order])
    better = np.ones(len(order), dtype=bool)
    better[1:] = all_loss[order][1:] < lowest[:-1]
    return entry[order][better], parent[order][better]


def _trace(levels: Sequence[_Level], table: _Table) -> list[int]:
    """The choices behind the last, least-loss sum, in item order."""
    at = len(levels[-1].entry) - 1
    choice = []
    for level in reversed(levels):  # the first item was added last
        choice.append(int(table.choice[level.entry[at]]))
        at = int(level.parent[at])
    return choice
