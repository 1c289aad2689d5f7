"""Made inputs and the slow rounding loop, against which the fast one is held."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.numerics.hessian import Factor


def correlated_tokens(n_tokens: int, in_features: int, seed: int) -> Tensor:
    """(n_tokens, in_features) float32: channels of very different sizes, strongly mixed."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, in_features, generator=generator)
    hidden *= 10 ** torch.linspace(0.5, -1, in_features)
    mix = torch.linalg.qr(torch.randn(in_features, in_features, generator=generator))[0]
    sizes = torch.randn(in_features, generator=generator).mul(0.7).exp()
    return hidden.mm(mix).mul(sizes)


def correlated_hessian(in_features: int, seed: int) -> Tensor:
    """(in_features, in_features) float32 mean of x xᵀ over four tokens a channel."""
    tokens = correlated_tokens(4 * in_features, in_features, seed)
    return tokens.T @ tokens / len(tokens)


def heavy_tailed(*shape: int, seed: int, scale: float = 0.02) -> Tensor:
    """Student-t values with five degrees of freedom, float32."""
    generator = torch.Generator().manual_seed(seed)
    squares = torch.randn(5, *shape, generator=generator).square().mean(0)
    return torch.randn(*shape, generator=generator) / squares.sqrt() * scale


def damped(hessian: Tensor, factor: Factor) -> Tensor:
    """H + ridge·I in processing order, float64."""
    ordered = hessian[factor.perm][:, factor.perm].double()
    return ordered + factor.ridge * torch.eye(len(ordered), dtype=torch.float64)


def inverse_upper(hessian: Tensor) -> Tensor:
    """GPTQ's U with UᵀU = H⁻¹, upper triangular, float64; `hessian` is float64."""
    lower: Tensor = torch.linalg.cholesky(torch.linalg.inv(hessian))
    return lower.T


class Slow(NamedTuple):
    """What the slow loop leaves, in processing order."""

    values: Tensor  # (in, out) float64
    current: dict[int, Tensor]  # start of a group → (in - start, out) weights as they stood then


def one_column_at_a_time(
    weight: Tensor,
    hessian: Tensor,
    starts: Collection[int],
    choose: Callable[[int, Tensor], None],
    nearest: Callable[[int, Tensor], Tensor],
) -> Slow:
    """GPTQ as it is published: the error of a column, by U's diagonal, pushed to all later columns at once.

    Args:
        weight: (in, out) in processing order.
        hessian: (in, in) float64 with its ridge, in the same order.
        starts: columns at which `choose` gets the column and the weights from there on, (in - column, out):
            the original ones and the earlier columns' errors by their own shares, none in between foreseen.
        nearest: column and weights (out,) float64 to stored values (out,).

    Source: GPTQ, arXiv:2210.17323, algorithm 1, with a block of one column.
    """
    upper = inverse_upper(hessian)
    shares = torch.linalg.inv(upper) * upper.diagonal()  # (I + M), each column by its diagonal
    original, work = weight.double(), weight.double().clone()
    values, current = torch.zeros_like(work), {}
    for column in range(len(work)):
        if column in starts:
            done = original[:column] - values[:column]
            current[column] = original[column:] + shares[:column, column:].T @ done
            choose(column, current[column])
        values[column] = nearest(column, work[column])
        error = (work[column] - values[column]) / upper[column, column]
        work[column + 1 :] -= upper[column, column + 1 :].unsqueeze(-1) * error
    return Slow(values, current)


def energy_of(error: Tensor, hessian: Tensor) -> Tensor:
    """(out,) eᵀHe of every column of `error` (in, out), float64."""
    exact = error.double()
    return (hessian.double() @ exact * exact).sum(0)
