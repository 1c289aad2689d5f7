"""One choice per item within a budget of bits at the least total loss: numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from exlq.allocation import exact, lagrange
from exlq.allocation.lagrange import frontier
from exlq.allocation.problem import Choice, Item, Problem, Solution, fold
from exlq.errors import TargetError
from exlq.types import Allocation

__all__ = ["SOLVERS", "Choice", "Item", "frontier", "reachable_range", "solve"]


def solve(items: Sequence[Item], budget_bits: int, solver: str = "exact") -> Allocation:
    """One choice per item with Σ bits ≤ budget_bits and the least Σ loss, counted in exact integers.

    Of choices with equal loss the one of fewer bits is taken, of those the one with lower
    choice indices in the order of the items. A budget above the largest sum gives the least
    loss there is. Tied items take the same index.

    Raises:
        TargetError: if the budget is below the fewest bits, naming the reachable range; or if
            the solver is unknown.
        MeasurementError: if the items cannot be folded.
    """
    if solver not in SOLVERS:
        raise TargetError(f"unknown solver {solver!r}; choose one of {', '.join(SOLVERS)}")
    problem = fold(items)
    low, high = _range(problem)
    if budget_bits < low:
        raise TargetError(
            f"a budget of {budget_bits} bits is out of reach; from {low} to {high} bits can be met"
        )
    found = SOLVERS[solver](problem, min(budget_bits, high))
    index = {key: j for keys, j in zip(problem.keys, found.choice, strict=True) for key in keys}
    choice = {item.key: index[item.key] for item in items}
    chosen = [item.choices[choice[item.key]] for item in items]
    total_bits = sum(c.bits for c in chosen)
    assert total_bits <= budget_bits, f"{solver} spent {total_bits} of {budget_bits} bits"
    loss = math.fsum(c.loss for c in chosen)
    proven = found.bound >= problem.total_loss(found.choice)
    return Allocation(
        choice, total_bits, loss, loss if proven else min(loss, problem.as_lower_loss(found.bound))
    )


def reachable_range(items: Sequence[Item]) -> tuple[int, int]:
    """Fewest and most bits in all, tied items taking the same choice."""
    return _range(fold(items))


def _range(problem: Problem) -> tuple[int, int]:
    return sum(map(min, problem.bits)), sum(map(max, problem.bits))


SOLVERS: Mapping[str, Callable[[Problem, int], Solution]] = {
    "exact": exact.solve,  # proven optimum
    "lagrange": lagrange.solve,  # instant, for previews: the gap says how far it may be off
}
