"""The convex relaxation of the knapsack: instant, near the optimum, with a certified bound.

Each item's undominated choices have a lower convex hull. Walking all hulls together, steepest
step first, gives the linear relaxation's optimum for every budget (Sinha and Zoltners 1979, "The
multiple-choice knapsack problem", Operations Research 27).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from exlq.allocation.problem import Item, Problem, Solution, fold


class Step(NamedTuple):
    """Moving one item to the next choice on its hull: bits added, loss removed (exact units)."""

    item: int
    choice: int
    bits: int
    gain: int


@dataclass(frozen=True)
class Relaxation:
    """The last whole step of the walk that fits the budget.

    `slope` is the loss a further bit would save, in exact units; 0 when every item already has
    its least loss. `bound` is the relaxation's optimum, rounded up to whole units.
    """

    choice: tuple[int, ...]
    slope: Fraction
    bound: int


def relax(problem: Problem, budget_bits: int) -> Relaxation:
    """The relaxation at a budget that is at least the sum of the items' fewest bits."""
    choice = cheapest(problem)
    spare = budget_bits - problem.total_bits(choice)
    loss = problem.total_loss(choice)
    for step in walk(problem):
        if step.bits > spare:
            slope = Fraction(step.gain, step.bits)
            return Relaxation(tuple(choice), slope, -((slope * spare - loss).__floor__()))
        choice[step.item] = step.choice
        spare -= step.bits
        loss -= step.gain
    return Relaxation(tuple(choice), Fraction(0), loss)


def solve(problem: Problem, budget_bits: int) -> Solution:
    """A good choice per item and the relaxation's bound; the preview solver."""
    return Solution(fill(problem, budget_bits), relax(problem, budget_bits).bound)


def fill(problem: Problem, budget_bits: int) -> list[int]:
    """Take every step of the walk that still fits, then any choice that still lowers the loss."""
    choice = cheapest(problem)
    spare = budget_bits - problem.total_bits(choice)
    for step in walk(problem):
        bits = problem.bits[step.item]
        extra = bits[step.choice] - bits[choice[step.item]]
        if extra <= spare:
            choice[step.item] = step.choice
            spare -= extra
    for item, (bits, losses) in enumerate(zip(problem.bits, problem.losses, strict=True)):
        most = bits[choice[item]] + spare
        best = min((losses[j], bits[j], j) for j in range(len(bits)) if bits[j] <= most)[2]
        spare = most - bits[best]
        choice[item] = best
    return choice


def frontier(items: Sequence[Item]) -> list[tuple[int, float]]:
    """(total bits, total loss) at every step of the walk, fewest bits first.

    Each point is an optimum for its own bits; between them the relaxation is a straight line.
    """
    problem = fold(items)
    choice = cheapest(problem)
    bits, loss = problem.total_bits(choice), problem.total_loss(choice)
    points = [(bits, problem.as_loss(loss))]
    for step in walk(problem):
        bits, loss = bits + step.bits, loss - step.gain
        points.append((bits, problem.as_loss(loss)))
    return points


def cheapest(problem: Problem) -> list[int]:
    """The choice of fewest bits per item; of these the least loss, then the lowest index."""
    return [undominated(*pair)[0] for pair in zip(problem.bits, problem.losses, strict=True)]


def walk(problem: Problem) -> list[Step]:
    """Every hull's steps, most loss saved per bit first; equal slopes in the order of the items."""
    steps = [
        step
        for item, (bits, losses) in enumerate(zip(problem.bits, problem.losses, strict=True))
        for step in _hull_steps(item, bits, losses)
    ]
    return sorted(steps, key=lambda step: Fraction(-step.gain, step.bits))


def undominated(bits: Sequence[int], losses: Sequence[int]) -> list[int]:
    """Choices that no other beats in bits and loss, by rising bits; of equal ones the lowest index."""
    kept: list[int] = []
    for index in sorted(range(len(bits)), key=lambda j: (bits[j], losses[j], j)):
        if not kept or losses[index] < losses[kept[-1]]:
            kept.append(index)
    return kept


def _hull_steps(item: int, bits: Sequence[int], losses: Sequence[int]) -> Iterator[Step]:
    hull: list[int] = []
    for index in undominated(bits, losses):
        while len(hull) > 1 and not _is_convex(bits, losses, hull[-2], hull[-1], index):
            hull.pop()
        hull.append(index)
    for before, after in itertools.pairwise(hull):
        yield Step(item, after, bits[after] - bits[before], losses[before] - losses[after])


def _is_convex(bits: Sequence[int], losses: Sequence[int], a: int, b: int, c: int) -> bool:
    """Whether b lies strictly below the line from a to c, bits rising from a to b to c."""
    return (losses[a] - losses[b]) * (bits[c] - bits[b]) > (losses[b] - losses[c]) * (bits[b] - bits[a])
