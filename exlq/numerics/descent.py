"""Block coordinate descent on a rounded matrix: a run of channels and its scale, all others as they are.

With the error e of a row, the cost is J = e H eᵀ, H damped. For the channels B of one run, all else fixed,
J = (q* - q) H_BB (q* - q)ᵀ + const with q* = w_B + r H_BB⁻¹ and r = (e H)_B - e_B H_BB. Each of a few
scales near the present one is tried with its levels rounded in sequence under H_BB; the best takes the
run's place, if J falls. H e is kept up to date by products of whole stretches of runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from exlq.numerics.hessian import Factor
from exlq.numerics.hessian import factor as factored
from exlq.numerics.scales import COMPILED
from exlq.numerics.static_grid import NO_TABLE

STRETCH = 256  # channels between two pushes to all others
LEAST_GAIN = 1e-4  # of a run's cost, to be worth a change
RIDGE = 1e-6  # of the mean of H_BB's diagonal: H is damped already


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


class Run(NamedTuple):
    """One run's own part of the Hessian."""

    channels: slice
    own: Tensor  # (run, run) H_BB
    inverse: Tensor  # (run, run)
    factor: Factor


def runs_of(hessian: Tensor, sizes: Iterable[int]) -> list[Run]:
    """The runs of so many channels each of a damped Hessian, (in, in) float32."""
    found, start = [], 0
    for size in sizes:
        channels = slice(start, start + size)
        start += size
        own = hessian[channels, channels].contiguous()
        factor = factored(own, RIDGE)
        found.append(Run(channels, own, torch.linalg.inv(own.double()).float(), factor))
    return found


def descend(
    weight: Tensor, values: Tensor, hessian: Tensor, runs: list[Run], moves: Moves, rounds: int
) -> tuple[Tensor, Tensor]:
    """Walks over all runs `rounds` times; what it leaves costs no more than what it found.

    Args:
        weight: (in_features, rows) float32 in the model's order; `values`, alike, as rounded so far.
        hessian: (in_features, in_features) float32, damped.
        runs: of that Hessian.
        moves: the scales that `values` were rounded to.

    Returns:
        values (in_features, rows), and (rows,) their cost e H eᵀ.

    Source: coordinate descent on levels: QuantEase, arXiv:2309.01885; scales and levels of a run together
    are our own.
    """
    values, error = values.clone(), weight - values
    slope = hessian @ error  # (in_features, rows)
    for _ in range(rounds):
        for members in _stretches(runs):
            stretch = slice(runs[members[0]].channels.start, runs[members[-1]].channels.stop)
            before = error[stretch].clone()
            own = hessian[stretch, stretch]
            local = slope[stretch]  # changed in place while the stretch is walked
            kept = local.clone()
            for index in members:
                _improve(index, runs[index], weight, values, error, local, stretch.start, own, moves)
            slope[stretch] = kept
            slope.addmm_(hessian[:, stretch], error[stretch] - before)
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
    channels = run.channels
    inner = slice(channels.start - start, channels.stop - start)
    mine, present = error[channels], values[channels]
    rest = local[inner] - run.own @ mine
    target = weight[channels] + run.inverse @ rest
    missed = target - present
    cost = (missed * (run.own @ missed)).sum(0)
    order = run.factor.perm
    enough = cost * (1 - LEAST_GAIN)
    best, picked = _best(target[order], moves.candidates(index), run.factor, enough)
    better = torch.where(picked >= 0, best[order.argsort()], present)
    change = present - better  # of the error
    values[channels] = better
    error[channels] += change
    local.addmm_(own[:, inner], change)
    moves.take(index, picked.clamp_min(0))


def _best(target: Tensor, lattice: Lattice, factor: Factor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Values (run, rows) of the best candidate below `cost`, (rows,), in the factor's order, and its index.

    Where no candidate is, the index is -1 and the values mean nothing.
    """
    step, offset, low, high, *_ = lattice
    table = torch.tensor(lattice.table or NO_TABLE, dtype=torch.float32, device=target.device)
    if target.device.type == "cpu" and COMPILED:
        from exlq.numerics.compiled_affine import best_candidates

        values, picked = torch.empty_like(target), torch.full(cost.shape, -1)
        ends = (low, high) if lattice.table is None else (1, 0)
        arrays = (table, step, offset, target, factor.feedback, factor.pivots, cost, values, picked)
        best_candidates(*map(np.float32, ends), lattice.float16, *(x.numpy() for x in arrays))
        return values, picked
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
