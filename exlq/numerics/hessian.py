"""The Hessian of one linear input and the factor that the rounding sweep works from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.numerics.precision import widest

DAMPING = 0.01  # of the diagonal's mean; ExLlamaV2 has 0.12, which is too much for a float64 factor
RUN_DAMPING = 1e-6  # the same for a run of a Hessian that is damped already
CUTTING = Lock()
RETRIES = 6  # each takes ten times the damping
TILE = 1024  # channels; of a sum of many tiles little more than half is computed
PLENTY = 4  # tokens for each input channel, from which on a Hessian is taken as it is


@dataclass
class HessianSum:
    """The running sum of x xᵀ over tokens, float32, on the device it was made on.

    The sum is symmetric: left of a tile on the diagonal nothing is computed before `mean`.
    """

    total: Tensor
    n_tokens: int = 0

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> HessianSum:
        return cls(torch.zeros(in_features, in_features, device=device))

    def add(self, x: Tensor) -> None:
        """Adds tokens x, (..., in_features)."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        for rows in self._tiles():
            self.total[rows, rows.start :].addmm_(tokens[:, rows].T, tokens[:, rows.start :])
        self.n_tokens += len(tokens)

    def _tiles(self) -> Iterator[slice]:
        """Runs of channels: of the sum, only what lies right of each run's beginning is kept up."""
        for start in range(0, len(self.total), TILE):
            yield slice(start, min(start + TILE, len(self.total)))

    def mean(self) -> Tensor:
        """H = E[x xᵀ], (in_features, in_features) float32, in the sum's own memory: nothing is added after.

        Raises:
            HessianError: if no token was added, or a value is not finite.
        """
        if self.n_tokens == 0:
            raise HessianError("no token reached this input: use more calibration rows")
        hessian = self.total.div_(self.n_tokens)
        for rows in self._tiles():
            hessian[rows.stop :, rows] = hessian[rows, rows.stop :].T
        bad = ~hessian.diagonal().isfinite()
        if bad.any():
            channel = int(bad.nonzero()[0])
            raise HessianError(
                f"{int(bad.sum())} of {len(bad)} input channels are not finite, first {channel}"
            )
        return hessian

    def calibrated(self) -> Tensor:
        """`mean`, shrunk towards its diagonal where the tokens are few: what is to be rounded by.

        Raises:
            HessianError: as `mean`.
        """
        hessian = self.mean()
        if share := shrinkage(self.n_tokens, len(hessian)):
            diagonal = hessian.diagonal().clone()
            hessian.mul_(1 - share).diagonal().copy_(diagonal)
        return hessian


def shrinkage(n_tokens: int, in_features: int) -> float:
    """How much of a Hessian's entries off the diagonal is taken away: from a half for no tokens to nothing.

    Few tokens show correlations of channels that others do not have, and rounding would rely on them. On the
    bundled model's inputs, with an eighth to twice as many tokens as channels, this lowers the error on other
    tokens by 10 to 50 %; docs/reliability.md has the figures.

    Source: the target of Ledoit and Wolf, J. Multivariate Anal. 88 (2004), the share our own.
    """
    return max(0.0, 1 - n_tokens / (PLENTY * in_features)) / 2


class Run(NamedTuple):
    """Some neighbouring channels' own part of a damped Hessian."""

    channels: slice
    own: Tensor  # (run, run) H_BB
    inverse: Tensor  # (run, run)
    factor: Factor


class Curvature:
    """H + ridge·I for descents, and what they cut out of it, made once for all rows and options.

    Args:
        hessian: (in_features, in_features) float32 in the model's order, without the ridge.
        perm: (in_features,) int64, the processing order.
    """

    def __init__(self, hessian: Tensor, perm: Tensor, ridge: float) -> None:
        self.natural, self.ridge = hessian, ridge
        self._perm = perm
        self._ordered: Tensor | None = None
        self._known: dict[bool, dict[tuple[int, int], Run]] = {False: {}, True: {}}

    def ordered(self) -> Tensor:
        """The Hessian, without the ridge, in processing order."""
        with CUTTING:
            if self._ordered is None:
                self._ordered = self.natural[self._perm[:, None], self._perm]
        return self._ordered

    def runs(self, sizes: Iterable[int], ordered: bool) -> list[Run]:
        """Runs of so many channels each, in processing order or in the model's."""
        hessian = self.ordered() if ordered else self.natural
        with CUTTING:
            return runs_of(hessian, sizes, self.ridge, self._known[ordered])


def runs_of(
    hessian: Tensor,
    sizes: Iterable[int],
    ridge: float = 0.0,
    known: dict[tuple[int, int], Run] | None = None,
) -> list[Run]:
    """The runs of so many channels each of a Hessian, (in, in) float32, with `ridge` on its diagonal.

    What is in `known`, by ends, is taken from there, and what is not is put there.
    """
    known = {} if known is None else known
    found, start = [], 0
    for size in sizes:
        ends = (start, start + size)
        if ends not in known:
            channels = slice(*ends)
            known[ends] = _run(hessian[channels, channels], channels, ridge)
        found.append(known[ends])
        start += size
    return found


def _run(own: Tensor, channels: slice, ridge: float) -> Run:
    """A run from its part of the Hessian; made on the CPU, where small matrices are factored at once."""
    device, own = own.device, own.cpu().clone()
    own.diagonal().add_(ridge)
    factor, inverse = _factor(own, RUN_DAMPING, act_order=True), torch.linalg.inv(own.double()).float()
    perm, feedback, pivots = (x.contiguous().to(device) for x in factor[:3])
    moved = factor._replace(perm=perm, feedback=feedback, pivots=pivots, curvature=None)
    return Run(channels, own.to(device), inverse.contiguous().to(device), moved)


class Factor(NamedTuple):
    """H + ridge·I = (I + M) D (I + M)ᵀ with M strictly upper triangular, in processing order.

    Rounding column c leaves an error that costs `pivots[c]` times its square; `feedback[:c, c]` says
    how much of the earlier columns' errors column c takes over (LDLQ).
    """

    perm: Tensor  # (in_features,) int64: the input channel processed at each step
    feedback: Tensor  # (in_features, in_features) float32, M
    pivots: Tensor  # (in_features,) float32, diagonal of D
    ridge: float  # what was added to the diagonal
    curvature: Curvature | None = None  # what a descent walks on; None where errors are not handed on
    raised: int = 0  # how often the damping was multiplied by ten
    dead: int = 0  # channels that are zero in every token: their weights are rounded by themselves

    def without_feedback(self) -> Factor:
        """The factor of H's diagonal alone: every weight is rounded by itself."""
        return self._replace(feedback=torch.zeros_like(self.feedback), pivots=self.diagonal(), curvature=None)

    def diagonal(self) -> Tensor:
        """(in_features,) the diagonal of H + ridge·I, in processing order."""
        return self.pivots + self.feedback.square() @ self.pivots

    def energies(self, vectors: Tensor) -> Tensor:
        """vᵀHv of every column of `vectors`, (in_features, ...) in processing order."""
        flat = vectors.reshape(len(vectors), -1)
        passed = (flat + self.feedback.T @ flat).square_()  # of (I + M)ᵀ v
        found = self.pivots @ passed - self.ridge * flat.square().sum(0)
        return found.clamp_min_(0).reshape(vectors.shape[1:])


def factor(hessian: Tensor, damping: float = DAMPING, act_order: bool = True) -> Factor:
    """One reverse Cholesky factorization in float64.

    GPTQ's Cholesky factor U of the inverse, (H + λI)⁻¹ = UᵀU, is the inverse of (I + M)√D: the levels
    are the same, without inverting anything.

    Args:
        hessian: (in_features, in_features) float32, the mean of x xᵀ. Not modified.
        damping: added to the diagonal, as a fraction of its mean. Where the sum is still not
            positive definite, ten times as much, up to six times.
        act_order: channels in order of falling diagonal, instead of as they stand.

    Raises:
        HessianError: if no damping makes it positive definite.

    Source: GPTQ, arXiv:2210.17323, section 3.3; LDLQ: QuIP, arXiv:2307.13304, section 3.
    """
    return _factor(hessian, damping, act_order)


def _factor(hessian: Tensor, damping: float, act_order: bool) -> Factor:
    device, given = hessian.device, hessian
    hessian = hessian.cpu() if widest(device) != torch.float64 else hessian
    diagonal = hessian.diagonal()
    perm = torch.arange(len(diagonal), device=diagonal.device)
    if act_order:
        perm = torch.argsort(diagonal, descending=True, stable=True)
    mean = float(diagonal.double().mean())
    if not math.isfinite(mean):
        raise HessianError("its diagonal is not finite: the activations are broken")
    ridge = damping * mean if mean > 0 else 1.0
    backwards = perm.flip(0)
    lower, ridge, raised = _cholesky(lambda: hessian[backwards[:, None], backwards].double(), ridge)
    roots = lower.diagonal().clone()
    unit = lower.div_(roots).float()
    del lower  # half of the memory this function takes
    unit.diagonal().zero_()
    pivots = roots.square().flip(0).float()
    moved = (perm.to(device), unit.flip(0, 1).to(device), pivots.to(device))
    curvature = Curvature(given, moved[0], ridge)
    return Factor(*moved, ridge, curvature, raised, int((diagonal == 0).sum()))


def _cholesky(made: Callable[[], Tensor], ridge: float) -> tuple[Tensor, float, int]:
    """The Cholesky factor of hessian + ridge·I, the ridge that it took, and how often that was raised.

    Args:
        made: gives the symmetric (n, n) hessian, anew at each call. Its memory becomes the factor's: read
            column by column it is laid out as LAPACK has it, so that nothing is copied.
    """
    for raised in range(RETRIES):
        lower = made().mT
        lower.diagonal().add_(ridge)
        failed = torch.zeros((), dtype=torch.int32, device=lower.device)
        torch.linalg.cholesky_ex(lower, out=(lower, failed))
        if not failed:
            return lower, ridge, raised
        ridge *= 10
    raise HessianError(f"not positive definite with {ridge / 10:.3g} on the diagonal: activations are broken")


def energies(error: Tensor, hessian: Tensor) -> Tensor:
    """eᵀ H e of every column of `error`.

    Args:
        error: (in_features, ...) in the channel order of `hessian`.
    """
    flat = error.reshape(len(error), -1)
    return (hessian @ flat).mul_(flat).sum(0).reshape(error.shape[1:])
