"""The rounding sweep: columns rounded one after the other, each taking over the errors of those before.

Column c is rounded at  t_c = w_c + Σ_{k<c} (w_k - q_k) M_kc  (LDLQ, identical to GPTQ). The sum is
made of matrix products: the columns are halved again and again, and when the left half is done its
errors are pushed into the right half at once. The columns where groups of every option begin are the
places to cut; what lies between two cuts, a leaf, is walked 32 columns at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from exlq.numerics.hessian import Factor
from exlq.numerics.kernels import COMPILED, for_triton
from exlq.numerics.threads import one_thread

STEP = 32  # columns rounded between two pushes inside a leaf; group starts are multiples of it


Kernel = Callable[..., Any]


class Grid(Protocol):
    """What a batch of rows may be rounded to, chosen group by group as the sweep gets there."""

    edges: Sequence[int]
    """Columns, rising, where all groups before are closed; without 0 and the end."""

    def open(self, column: int, current: Tensor) -> None:
        """Chooses the grids of the groups that begin at `column`.

        `current`, (columns, options, out), holds the weights from `column` to the next edge with all
        earlier errors taken over. Not to be modified or kept.
        """
        ...

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        """The stored values nearest to `weights`, (options, out), in `column` of an open group."""
        ...

    def of_rows(self, rows: Tensor) -> Grid:
        """The finished grid of some of the output rows, by their places (n,) int64."""
        ...

    def kernel(self, start: int, end: int) -> Kernel | None:
        """A compiled loop over columns `start` to `end`, all in groups that are open; None for `nearest`.

        Asked for where numba is there on the CPU, or Triton on a GPU. It takes, as arrays on the CPU, the
        columns' values (columns, options, out), errors (alike), weights (columns, out), feedback (columns,
        columns), pivots (columns,) and the energy (options, out) that it adds to.
        """
        ...


class Rounded(NamedTuple):
    """Outcome of a sweep, in processing order."""

    values: Tensor  # (in, options, out) float32, exactly what the file will give back
    errors: Tensor  # (in, options, out) float32, weights minus values
    energy: Tensor  # (options, out) float32, eᵀ(H + ridge·I)e of every output row


def sweep(weight: Tensor, factor: Factor, grid: Grid, n_options: int) -> Rounded:
    """Rounds one matrix by several options at once.

    Args:
        weight: (in_features, out) float32, rows in processing order (`weight.T[factor.perm]`).
            Not modified.
        factor: of the Hessian of the input, in the same order.
        grid: for `n_options` options.

    Source: GPTQ, arXiv:2210.17323; LDLQ: QuIP, arXiv:2307.13304.
    """
    state = _Sweep(weight, factor, grid, n_options)
    state.run(0, len(weight))
    return Rounded(state.values, state.errors, state.energy)


class _Sweep:
    """The working arrays of one sweep. `values` holds weights still to be rounded, then their values."""

    def __init__(self, weight: Tensor, factor: Factor, grid: Grid, n_options: int) -> None:
        self.weight, self.factor, self.grid = weight, factor, grid
        self.values = weight.unsqueeze(1).repeat(1, n_options, 1)
        self.errors = torch.empty_like(self.values)
        self.energy = torch.zeros_like(self.values[0])

    @cached_property
    def pivots(self) -> list[float]:
        """The factor's, for the plain loop."""
        found: list[float] = self.factor.pivots.tolist()
        return found

    def run(self, start: int, stop: int) -> None:
        """Rounds columns `start` to `stop`, on which everything before has been pushed."""
        middle = self._cut(start, stop)
        if middle is None:
            with one_thread():
                self._leaf(start, stop)
            return
        self.run(start, middle)
        self._push(start, middle, stop)
        self.run(middle, stop)

    def _cut(self, start: int, stop: int) -> int | None:
        """The edge nearest to the middle, if any lies between."""
        inside = [edge for edge in self.grid.edges if start < edge < stop]
        return min(inside, key=lambda edge: abs(2 * edge - start - stop)) if inside else None

    def _push(self, start: int, middle: int, stop: int) -> None:
        """Hands the errors of columns `start` to `middle` on to columns `middle` to `stop`."""
        feedback = self.factor.feedback[start:middle, middle:stop]
        self.values[middle:stop].flatten(1).addmm_(feedback.T, self.errors[start:middle].flatten(1))

    def _leaf(self, start: int, stop: int) -> None:
        for column in range(start, stop, STEP):
            end = min(column + STEP, stop)
            self.grid.open(column, self.values[column:stop])
            self._columns(column, end)
            if end < stop:
                self._push(column, end, stop)

    def _columns(self, start: int, end: int) -> None:
        """Rounds a few columns one after the other."""
        on_gpu = for_triton(self.values)
        compiled = on_gpu or (self.values.device.type == "cpu" and COMPILED)
        kernel = self.grid.kernel(start, end) if compiled else None
        if kernel is None:
            for column in range(start, end):
                self._round(start, column)
            return
        columns = slice(start, end)
        feedback = self.factor.feedback[columns, columns].contiguous()
        own = (self.values[columns], self.errors[columns], self.weight[columns])
        tensors = (*own, feedback, self.factor.pivots[columns], self.energy)
        kernel(*(tensors if on_gpu else (x.numpy() for x in tensors)))

    def _round(self, start: int, column: int) -> None:
        """Rounds one column, after pulling the errors of columns `start` to `column` into it."""
        target = self.values[column]
        if column > start:
            feedback = self.factor.feedback[start:column, column]
            target.flatten().addmv_(self.errors[start:column].flatten(1).T, feedback)
        value = self.grid.nearest(column, target)
        residual = target.sub_(value)
        self.energy.addcmul_(residual, residual, value=self.pivots[column])
        torch.sub(self.weight[column], value, out=self.errors[column])
        target.copy_(value)
