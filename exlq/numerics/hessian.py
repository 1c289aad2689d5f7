"""The Hessian of one linear input and the factor that the rounding sweep works from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.numerics.precision import widest

DAMPING = 0.01  # of the diagonal's mean; ExLlamaV2 has 0.12, which is too much for a float64 factor
RETRIES = 6  # each takes ten times the damping
PLENTY = 4  # tokens for each input channel, from which on a Hessian is taken as it is


@dataclass
class HessianSum:
    """The running sum of x xᵀ over tokens, float32, on the device it was made on."""

    total: Tensor
    n_tokens: int = 0

    @classmethod
    def zeros(cls, in_features: int, device: torch.device) -> HessianSum:
        return cls(torch.zeros(in_features, in_features, device=device))

    def add(self, x: Tensor) -> None:
        """Adds tokens x, (..., in_features)."""
        tokens = x.reshape(-1, x.shape[-1]).float()
        self.total.addmm_(tokens.T, tokens)
        self.n_tokens += len(tokens)

    def mean(self) -> Tensor:
        """H = E[x xᵀ], (in_features, in_features) float32, in the sum's own memory: nothing is added after.

        Raises:
            HessianError: if no token was added, or a value is not finite.
        """
        if self.n_tokens == 0:
            raise HessianError("no token reached this input: use more calibration rows")
        hessian = self.total.div_(self.n_tokens)
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


class Factor(NamedTuple):
    """H + ridge·I = (I + M) D (I + M)ᵀ with M strictly upper triangular, in processing order.

    Rounding column c leaves an error that costs `pivots[c]` times its square; `feedback[:c, c]` says
    how much of the earlier columns' errors column c takes over (LDLQ).
    """

    perm: Tensor  # (in_features,) int64: the input channel processed at each step
    feedback: Tensor  # (in_features, in_features) float32, M
    pivots: Tensor  # (in_features,) float32, diagonal of D
    ridge: float  # what was added to the diagonal
    hessian: Tensor | None = None  # H itself, in the model's order; None where errors are not handed on
    raised: int = 0  # how often the damping was multiplied by ten
    dead: int = 0  # channels that are zero in every token: their weights are rounded by themselves

    def without_feedback(self) -> Factor:
        """The factor of H's diagonal alone: every weight is rounded by itself."""
        return self._replace(feedback=torch.zeros_like(self.feedback), pivots=self.diagonal(), hessian=None)

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
    return Factor(*moved, ridge, given, raised, int((diagonal == 0).sum()))


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
