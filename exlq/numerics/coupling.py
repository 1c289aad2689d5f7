"""Errors handed on between output rows, as the sweep hands them on between input channels.

With G = E[g gᵀ] over the gradients at a linear's outputs, an error E of its weight costs ½ tr(G E H Eᵀ).
What H is to the channels of a row, G is to the rows. In the factors of `exlq.numerics.hessian`,
G + ridge·I = (I + M) D (I + M)ᵀ, the cost is Σ D_i u_i H u_iᵀ with u_i = e_i + Σ_{k<i} M_ki e_k: a row that
comes later is rounded with the errors of earlier rows added to its weights. Rows are taken a group at a
time, for one sweep rounds many; inside a group the sum is exact as if none of it were rounded yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.numerics.hessian import Factor, factor

RUN = 1024  # neighbouring rows coupled with one another
GROUPS = 8  # sweeps of one matrix; four times as many gain 1 to 2 % more
DAMPING = 0.3  # of G's mean diagonal: of 8192 tokens' gradients, which are few


@dataclass
class CouplingSum:
    """The running sum of g gᵀ over tokens, for runs of at most 1024 neighbouring outputs."""

    totals: list[Tensor]  # (run, run) float32 each
    n_tokens: int = 0

    @classmethod
    def zeros(cls, out_features: int, device: torch.device) -> CouplingSum:
        sizes = [len(rows) for rows in torch.split(torch.arange(out_features), RUN)]
        return cls([torch.zeros(size, size, device=device) for size in sizes])

    def add(self, gradient: Tensor) -> None:
        """Adds the gradients of tokens, (..., out_features)."""
        tokens = gradient.flatten(0, -2).float()
        self.n_tokens += len(tokens)
        for total, part in zip(self.totals, torch.split(tokens, RUN, -1), strict=True):
            total.addmm_(part.T, part)

    def over(self, n_tokens: int) -> CouplingSum:
        """The same sums as those of so many tokens: the gradients of the others are zero."""
        return CouplingSum(self.totals, n_tokens)

    def couples(self, n_tokens: int) -> bool:
        """Whether all tokens, or as many as a run has outputs, were added: fewer tell little of it."""
        return self.n_tokens == n_tokens or self.n_tokens >= max(len(total) for total in self.totals)

    def fisher(self) -> Tensor:
        """(out_features,) float32, the mean squared gradients."""
        return torch.cat([total.diagonal() / self.n_tokens for total in self.totals]).cpu()

    def stored(self) -> dict[str, Tensor]:
        """By run: the correlations of its outputs, (run, run) float16, and their sizes, (run,) float32."""
        found = {}
        for index, total in enumerate(self.totals):
            sizes = (total.diagonal() / self.n_tokens).sqrt().cpu()
            roots = torch.where(sizes > 0, sizes, 1.0).to(total) * self.n_tokens**0.5
            found[f"{index}.correlation"] = (total / roots / roots[:, None]).half().cpu()
            found[f"{index}.size"] = sizes
        return found


class Coupling:
    """How the rows of one matrix are rounded one group after the other."""

    def __init__(self, factors: list[Factor], mean: float) -> None:
        self._factors = factors
        self._scale = mean
        sizes = [len(each.perm) for each in factors]
        self._starts = [sum(sizes[:index]) for index in range(len(sizes))]

    @classmethod
    def of(cls, stored: Mapping[str, Tensor], device: torch.device) -> Coupling | None:
        """From what `CouplingSum.stored` gave; None where no output has a gradient worth the name."""
        factors, sizes = [], [stored[f"{index}.size"] for index in range(len(stored) // 2)]
        mean = float(torch.cat(sizes).double().square().mean())
        if not mean > 0:
            return None
        for index, size in enumerate(sizes):
            size = (size.double() / mean**0.5).float()
            second = stored[f"{index}.correlation"].float() * size * size[:, None]
            try:
                factors.append(factor(second.to(device), DAMPING))
            except HessianError:
                return None
        return cls(factors, mean)

    @property
    def out_features(self) -> int:
        return self._starts[-1] + len(self._factors[-1].perm)

    def steps(self) -> Iterator[Step]:
        """The groups of rows in the order of their rounding."""
        for index in range(GROUPS):
            parts = [
                part
                for each, start in zip(self._factors, self._starts, strict=True)
                if (part := _part(each, start, index)) is not None
            ]
            if parts:
                yield Step(torch.cat([part.rows for part in parts]), parts)

    @cached_property
    def costs(self) -> Tensor:
        """(out_features,) what is left of each output's Fisher information once later rows make up for it."""
        found = torch.empty(self.out_features)
        for step in self.steps():
            found[step.rows.cpu()] = torch.cat([part.costs for part in step.parts]).cpu()
        return found * self._scale


@dataclass(frozen=True)
class Part:
    """The rows of one run that are rounded together."""

    rows: Tensor  # (n,) int64 output rows of the matrix
    earlier: Tensor  # (k,) int64, those of the run that are rounded before
    push: Tensor  # (n, k) how much of their errors is added to the weights of `rows`
    costs: Tensor  # (n,) what an error of each costs, all later ones answering


@dataclass(frozen=True)
class Step:
    """Rows, (n,) int64, that one sweep rounds."""

    rows: Tensor
    parts: list[Part]

    def handed_on(self, errors: Tensor) -> Tensor:
        """(n, in_features) what to add to the weights of `rows`.

        Args:
            errors: (out_features, in_features), weight minus stored value of the rows of earlier steps.
        """
        return torch.cat([part.push @ errors[part.earlier] for part in self.parts])


def _part(each: Factor, start: int, index: int) -> Part | None:
    """Group `index` of a run that begins at output `start`."""
    size = len(each.perm)
    begin, end = size * index // GROUPS, size * (index + 1) // GROUPS
    if begin == end:
        return None
    own = each.feedback[begin:end, begin:end] + torch.eye(end - begin, device=each.feedback.device)
    passed = each.feedback[:begin, begin:end].T
    push = torch.linalg.solve_triangular(own.T, passed, upper=False, unitriangular=True)
    costs = own.square() @ each.pivots[begin:end] - each.ridge
    return Part(each.perm[begin:end] + start, each.perm[:begin] + start, push, costs.clamp_min(0))
