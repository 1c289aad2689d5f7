"""What the linears before have done to a linear's input, made up for by its weights.

Let x be a linear's input in the base model and x̃ what its quantized prefix gives. Wanted is W x, so W
itself is no longer the best that could be applied to x̃: W + C (H + ridge·I)⁻¹ is, with H = E[x̃ x̃ᵀ] and
C = E[y x̃ᵀ], y = W (x - x̃). A linear whose output is added to the residual stream can make up for the
stream's own drift r - r̃ as well: y = W (x - x̃) + r - r̃. How much of it holds on other tokens is learned
from some that have no part in C: the correction is scaled by the factor that fits these best, 1 at most.

Source: Qronos, arXiv:2505.11695, and GPTAQ, arXiv:2504.02692 (the mismatch of inputs); LoaQ,
arXiv:2509.06297 (the residual stream); CoreQ, arXiv:2602.05902 (a coefficient found for every layer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from exlq.numerics.hessian import Factor

JUDGED_DTYPE = torch.bfloat16  # of what is kept of the tokens that judge; they give one number


class DriftSum:
    """Sums over tokens for one linear input; `residual` is the stream's width, where that is followed."""

    def __init__(self, in_features: int, residual: int | None, device: torch.device) -> None:
        self._inputs = torch.zeros(in_features, in_features, device=device)  # (x - x̃) x̃ᵀ
        self._stream = None if residual is None else torch.zeros(residual, in_features, device=device)
        self._n_tokens = 0
        self._heldout: list[tuple[Tensor | None, ...]] = []

    def add(self, x: Tensor, quantized: Tensor, stream: Tensor | None, heldout: bool) -> None:
        """Adds tokens.

        Args:
            x, quantized: (..., in_features), in the base model and after the quantized prefix.
            stream: (..., residual), the stream's value in the base model minus that in the quantized one.
            heldout: whether these are to judge the correction instead of making it. They are kept.
        """
        there = quantized.flatten(0, -2)
        missed = x.flatten(0, -2) - there
        flat = None if stream is None else stream.flatten(0, -2)
        if heldout:
            kept = (each if each is None else each.to(JUDGED_DTYPE) for each in (missed, there, flat))
            self._heldout.append(tuple(kept))
            return
        self._n_tokens += len(there)
        self._inputs.addmm_(missed.T, there)
        if self._stream is not None:
            assert flat is not None
            self._stream.addmm_(flat.T, there)

    def corrected(self, weight: Tensor, factor: Factor) -> Tensor:
        """What to round instead of `weight`, both (out_features, in_features) float32.

        `factor` is that of the Hessian of the quantized inputs.
        """
        wanted = weight @ self._inputs
        if self._stream is not None:
            wanted += self._stream
        if not wanted.any() or not self._n_tokens:
            return weight
        correction = _solved(wanted.div_(self._n_tokens), factor)
        return weight + self._coefficient(weight, correction) * correction

    def _coefficient(self, weight: Tensor, correction: Tensor) -> float:
        """How much of the correction is best on the held-out tokens, from 0 to 1."""
        agreement = energy = 0.0
        for each in self._heldout:
            missed, there, stream = (None if part is None else part.float() for part in each)
            assert missed is not None
            assert there is not None
            wanted = missed @ weight.T
            if self._stream is not None:
                assert stream is not None
                wanted += stream
            made = there @ correction.T
            agreement += float((wanted * made).sum())
            energy += float(made.square().sum())
        return min(1.0, max(0.0, agreement / energy)) if energy > 0 else 0.0


def _solved(wanted: Tensor, factor: Factor) -> Tensor:
    """`wanted` (H + ridge·I)⁻¹, in the model's channel order; `wanted` is (out_features, in_features)."""
    unit = factor.feedback + torch.eye(len(factor.perm), device=factor.feedback.device)
    solved: Tensor = torch.linalg.solve_triangular(
        unit.T, wanted[:, factor.perm], upper=False, unitriangular=True, left=False
    )
    solved = torch.linalg.solve_triangular(
        unit, solved / factor.pivots, upper=True, unitriangular=True, left=False
    )
    return solved[:, factor.perm.argsort()]
