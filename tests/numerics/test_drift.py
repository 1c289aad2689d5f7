"""Corrections for drifted inputs, against least squares in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exlq.numerics import hessian
from exlq.numerics.drift import DriftSum
from exlq.numerics.hessian import HessianSum

CPU = torch.device("cpu")
IN, OUT, TOKENS = 48, 24, 4000


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1))


def drifted(seed: int, tokens: int = TOKENS) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the base, of a quantized prefix, and what the residual stream has lost."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(IN, IN, generator=torch.Generator().manual_seed(0)) / 7
    x = torch.randn(tokens, IN, generator=generator) @ mixing
    there = x + 0.3 * x.roll(1, 1) + 0.1 * torch.randn(tokens, IN, generator=generator)
    return x, there, x[:, :OUT] * 0.5


def summed(residual: bool, judging: tuple[Tensor, Tensor, Tensor]) -> tuple[DriftSum, hessian.Factor]:
    drift, total = DriftSum(IN, OUT if residual else None, CPU), HessianSum.zeros(IN, CPU)
    x, there, stream = drifted(2)
    for part in range(0, TOKENS, 1000):
        rows = slice(part, part + 1000)
        drift.add(x[rows], there[rows], stream[rows] if residual else None, False)
    drift.add(judging[0], judging[1], judging[2] if residual else None, True)
    total.add(there)
    return drift, hessian.factor(total.mean(), damping=1e-4)


@pytest.mark.parametrize("residual", [False, True])
def test_it_is_least_squares_on_the_drifted_inputs(weight: Tensor, residual: bool) -> None:
    drift, factor = summed(residual, drifted(3))
    x, there, stream = drifted(2)
    wanted = x.double() @ weight.double().T + (stream if residual else 0)
    best = torch.linalg.lstsq(there.double(), wanted).solution.T.float()
    found = drift.corrected(weight, factor)
    assert (found - best).norm() < 0.05 * (best - weight).norm()


def test_it_helps_on_other_tokens(weight: Tensor) -> None:
    drift, factor = summed(True, drifted(3))
    found = drift.corrected(weight, factor)
    x, there, stream = drifted(4)
    wanted = x @ weight.T + stream
    assert (wanted - there @ found.T).norm() < 0.6 * (wanted - there @ weight.T).norm()


def test_a_correction_that_held_out_tokens_contradict_is_not_made(weight: Tensor) -> None:
    x, there, stream = drifted(3)
    against = (2 * there - x, there, -stream)
    drift, factor = summed(True, against)
    assert torch.equal(drift.corrected(weight, factor), weight)


def test_a_correction_that_holds_by_half_is_made_by_half(weight: Tensor) -> None:
    x, there, _ = drifted(3)
    whole, factor = summed(False, (x, there, there))
    half, _ = summed(False, ((x + there) / 2, there, there))
    made = half.corrected(weight, factor) - weight
    assert (made - (whole.corrected(weight, factor) - weight) / 2).norm() < 0.02 * made.norm()


def test_inputs_that_have_not_drifted_change_nothing(weight: Tensor) -> None:
    drift, total = DriftSum(IN, None, CPU), HessianSum.zeros(IN, CPU)
    x, *_ = drifted(2)
    drift.add(x, x, None, False)
    drift.add(x, x, None, True)
    total.add(x)
    assert drift.corrected(weight, hessian.factor(total.mean())) is weight


def test_without_held_out_tokens_nothing_is_corrected(weight: Tensor) -> None:
    drift, total = DriftSum(IN, None, CPU), HessianSum.zeros(IN, CPU)
    x, there, _ = drifted(2)
    drift.add(x, there, None, False)
    total.add(there)
    assert torch.equal(drift.corrected(weight, hessian.factor(total.mean())), weight)
