"""Block coordinate descent on a rounded matrix: a run of channels and its scale, all others as they are.

With the error e of a row, the cost is J = e H eᵀ, H damped. For the channels B of one run, all else fixed,
J = (q* - q) H_BB (q* - q)ᵀ + const with q* = w_B + r H_BB⁻¹ and r = (e H)_B - e_B H_BB. Each of a few
scales near the present one is tried with its levels rounded in sequence under H_BB; the best takes the
run's place, if J falls. H e is kept up to date by products of whole stretches of runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from exlq.numerics.hessian import Factor, Run
from exlq.numerics.kernels import COMPILED, for_triton
from exlq.numerics.static_grid import NO_TABLE
from exlq.numerics.threads import one_thread

STRETCH = 256  # channels between two pushes to all others
ROWS_AT_ONCE, ROWS_AT_ONCE_GPU = 512, 16384
LEAST_GAIN = 1e-4  # of a run's cost, to be worth a change


class Lattice(NamedTuple):
    """Values step · level - offset of one run, for several candidates; or step · table[level] - offset.

    With `float16`, values are rounded to that type, and there are no offsets.
    """

    step: Tensor  # (candidates, rows) float32, the present one first
    offset: Tensor  # (candidates, rows) float32
    low: int
    high: int
    table: tuple[int, ...] | None = None
    float16: bool = False


class Moves(Protocol):
    """The scales of some rows, which `descend` may change."""

    def candidates(self, index: int) -> Lattice:
        """The scales that run `index` may take, the present ones first."""
        ...

    def take(self, index: int, picked: Tensor) -> None:
        """Makes candidate `picked[row]`, (rows,) int64, each row's scale."""
        ...


def row_parts(rows: int, device: torch.device) -> list[slice]:
    """Rows to be walked together: as many as the CPU's caches hold, or as keep a GPU busy."""
    at_once = ROWS_AT_ONCE if device.type == "cpu" else ROWS_AT_ONCE_GPU
    return [slice(start, start + at_once) for start in range(0, rows, at_once)]


def descend(
    weight: Tensor,
    values: Tensor,
    hessian: Tensor,
    runs: list[Run],
    moves: Moves,
    rounds: int,
    ridge: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Walks over all runs `rounds` times; what it leaves costs no more than what it found.

    Args:
        weight: (in_features, rows) float32 in the model's order; `values`, alike, as rounded so far.
        hessian: (in_features, in_features) float32, to be damped by `ridge`.
        runs: of that Hessian, damped.
        moves: the scales that `values` were rounded to.

    Returns:
        values (in_features, rows), and (rows,) their cost e H eᵀ.

    Source: coordinate descent on levels: QuantEase, arXiv:2309.01885; scales and levels of a run together
    are our own.
    """
    values, error = values.clone(), weight - values
    slope = torch.addmm(error, hessian, error, beta=ridge)  # (in_features, rows)
    for _ in range(rounds):
        for members in _stretches(runs):
            stretch = slice(runs[members[0]].channels.start, runs[members[-1]].channels.stop)
            before = error[stretch].clone()
            own = hessian[stretch, stretch].clone()
            own.diagonal().add_(ridge)
            local = slope[stretch]  # changed in place while the stretch is walked
            kept = local.clone()
            with one_thread():
                for index in members:
                    _improve(index, runs[index], weight, values, error, local, stretch.start, own, moves)
            changed = error[stretch] - before
            slope[stretch] = kept.add_(changed, alpha=ridge)
            slope.addmm_(hessian[:, stretch], changed)
    return values, (error * slope).sum(0)


def _stretches(runs: list[Run]) -> Iterator[range]:
    """Runs of about `STRETCH` channels together."""
    first = 0
    for index, run in enumerate(runs):
        if run.channels.stop - runs[first].channels.start >= STRETCH or index == len(runs) - 1:
            yield range(first, index + 1)
            first = index + 1


def _improve(
    index: int,
    run: Run,
    weight: Tensor,
    values: Tensor,
    error: Tensor,
    local: Tensor,
    start: int,
    own: Tensor,
    moves: Moves,
) -> None:
    """Gives one run its best candidate; `local` is the slope of the stretch beginning at channel `start`."""
    if for_triton(weight):
        from exlq.numerics.triton_descent import improve

        lattice = moves.candidates(index)
        table = _table(lattice.table or NO_TABLE, weight.device)
        kept = 1 - LEAST_GAIN
        moves.take(index, improve(run, lattice, table, weight, values, error, local, start, own, kept))
        return
    channels = run.channels
    inner = slice(channels.start - start, channels.stop - start)
    parts = weight[channels], values[channels], error[channels], local[inner]
    if weight.device.type == "cpu" and COMPILED:
        picked, change = _improved(run, moves.candidates(index), *parts)
    else:
        picked, change = _improved_plainly(run, moves.candidates(index), *parts)
    local.addmm_(own[:, inner], change)
    moves.take(index, picked)


def _improved(
    run: Run, lattice: Lattice, weight: Tensor, values: Tensor, error: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """What `_improved_plainly` gives, on the CPU."""
    from exlq.numerics.compiled_descent import improve

    picked, change = torch.empty(weight.shape[1], dtype=torch.int64), torch.empty_like(weight)
    ends = (lattice.low, lattice.high) if lattice.table is None else (1, 0)
    table, factor = _table(lattice.table or NO_TABLE, weight.device), run.factor
    given = (table, lattice.step, lattice.offset, run.own, run.inverse, factor.feedback, factor.pivots)
    held = (factor.perm, weight, values, error, slope)
    improve(
        *map(np.float32, ends),
        lattice.float16,
        *(x.numpy() for x in (*given, *held)),
        np.float32(1 - LEAST_GAIN),
        *(picked.numpy(), change.numpy()),
    )
    return picked, change


def _improved_plainly(
    run: Run, lattice: Lattice, weight: Tensor, values: Tensor, error: Tensor, slope: Tensor
) -> tuple[Tensor, Tensor]:
    """Gives one run its best candidate.

    Args:
        weight, values, error, slope: (run, rows) of the run's channels; values and error are changed.

    Returns:
        (rows,) the candidate, 0 where none is good enough; (run, rows) the change of the error.
    """
    target = weight + run.inverse @ (slope - run.own @ error)
    missed = target - values
    cost = (missed * (run.own @ missed)).sum(0)
    order = run.factor.perm
    best, picked = _best(target[order], lattice, run.factor, cost * (1 - LEAST_GAIN))
    better = torch.where(picked >= 0, best[order.argsort()], values)
    change = values - better
    values.copy_(better)
    error.add_(change)
    return picked.clamp_min(0), change


@lru_cache(maxsize=64)
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """(16,) float32."""
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _best(target: Tensor, lattice: Lattice, factor: Factor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Values (run, rows) of the best candidate below `cost`, (rows,), in the factor's order, and its index.

    Where no candidate is, the index is -1 and the values mean nothing.
    """
    step, offset, low, high, *_ = lattice
    table = _table(lattice.table or NO_TABLE, target.device)
    errors, values = torch.zeros(2, len(target), *step.shape, device=target.device)
    spent = torch.zeros_like(step)
    divisor = torch.where(step == 0, 1.0, step)
    for column, wanted in enumerate(target):
        passed = torch.tensordot(factor.feedback[:column, column], errors[:column], 1)
        aim = wanted + passed  # (candidates, rows)
        levels = (aim + offset) / divisor
        if lattice.table is None:
            levels = levels.round().clamp(low, high)
        else:
            levels = table[torch.bucketize(levels, (table[1:] + table[:-1]) / 2)]
        values[column] = step * levels - offset
        if lattice.float16:
            values[column] = values[column].half().float()
        errors[column] = wanted - values[column]
        spent += factor.pivots[column] * (aim - values[column]).square()
    least, picked = spent.min(0)
    chosen = values.gather(1, picked.expand(len(target), 1, -1))[:, 0]
    return chosen, torch.where(least < cost, picked, -1)
