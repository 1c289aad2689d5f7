"""Hessians and their factor against float64 arithmetic and GPTQ's own factor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.numerics import hessian
from exlq.numerics.hessian import Factor, HessianSum
from tests.numerics.helpers import correlated_hessian, correlated_tokens, damped, inverse_upper

CPU = torch.device("cpu")


def rebuilt(factor: Factor) -> Tensor:
    """(I + M) D (I + M)ᵀ in float64, in processing order."""
    unit = factor.feedback.double() + torch.eye(len(factor.perm), dtype=torch.float64)
    return unit * factor.pivots.double() @ unit.T


def assert_rebuilds(factor: Factor, of: Tensor) -> None:
    expected = damped(of, factor)
    assert (rebuilt(factor) - expected).abs().max() < 2e-6 * expected.diagonal().max()
    assert torch.equal(factor.feedback, factor.feedback.triu(1))
    assert (factor.pivots > 0).all()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("in_features", [1, 32, 192])
def test_a_factor_rebuilds_the_damped_hessian(in_features: int, act_order: bool) -> None:
    of = correlated_hessian(in_features, seed=in_features)
    before = of.clone()
    factor = hessian.factor(of, damping=0.02, act_order=act_order)
    assert_rebuilds(factor, of)
    assert factor.ridge == pytest.approx(0.02 * of.diagonal().double().mean().item())
    assert torch.equal(of, before)


def test_channels_are_processed_by_falling_diagonal_or_as_they_stand() -> None:
    of = correlated_hessian(64, seed=3)
    assert (of.diagonal()[hessian.factor(of).perm].diff() <= 0).all()
    assert hessian.factor(of, act_order=False).perm.tolist() == list(range(64))
    assert hessian.factor(torch.eye(48)).perm.tolist() == list(range(48)), "ties must keep their order"


@pytest.mark.parametrize("act_order", [True, False])
def test_the_factor_is_the_inverse_of_gptqs(act_order: bool) -> None:
    of = correlated_hessian(160, seed=4)
    factor = hessian.factor(of, act_order=act_order)
    upper = inverse_upper(damped(of, factor))
    torch.testing.assert_close(factor.pivots.double(), upper.diagonal() ** -2, rtol=1e-6, atol=0)
    expected = torch.linalg.inv(upper) * upper.diagonal() - torch.eye(160, dtype=torch.float64)
    assert (factor.feedback.double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_fewer_tokens_than_channels_still_factor() -> None:
    tokens = correlated_tokens(20, 96, seed=5)
    of = tokens.T @ tokens / 20
    factor = hessian.factor(of)
    assert_rebuilds(factor, of)
    assert factor.ridge == pytest.approx(0.01 * of.diagonal().mean().item())


def test_channels_that_are_never_used_come_last_and_cost_the_ridge() -> None:
    tokens = correlated_tokens(300, 64, seed=6)
    tokens[:, ::4] = 0
    of = tokens.T @ tokens / 300
    factor = hessian.factor(of)
    assert_rebuilds(factor, of)
    assert sorted(factor.perm[-16:].tolist()) == list(range(0, 64, 4))
    torch.testing.assert_close(factor.pivots[-16:], torch.full((16,), factor.ridge))


def test_a_zero_hessian_counts_all_errors_alike() -> None:
    factor = hessian.factor(torch.zeros(40, 40))
    assert (factor.ridge, factor.feedback.abs().max().item()) == (1.0, 0.0)
    assert torch.equal(factor.pivots, torch.ones(40))


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**-40, 2.0**40])
def test_the_scale_of_a_hessian_does_not_matter(scale: float) -> None:
    of = correlated_hessian(64, seed=7)
    plain, scaled = hessian.factor(of), hessian.factor(of * scale)
    assert torch.equal(plain.perm, scaled.perm)
    assert torch.equal(plain.feedback, scaled.feedback)
    assert torch.equal(plain.pivots * scale, scaled.pivots)


@pytest.mark.parametrize(("lowest", "tenfold"), [(0.0, 0), (-0.05, 1), (-0.5, 2), (-70.0, 4), (-999.0, 5)])
def test_damping_is_raised_tenfold_until_the_hessian_factors(lowest: float, tenfold: int) -> None:
    """`lowest` is the smallest eigenvalue, the mean of the diagonal is 1, the damping 0.01 at first."""
    of = torch.eye(8)
    of[0, 1] = of[1, 0] = 1 - lowest
    factor = hessian.factor(of)
    assert factor.ridge == pytest.approx(0.01 * 10**tenfold)
    assert_rebuilds(factor, of)


def test_a_hessian_no_damping_helps_is_refused() -> None:
    of = torch.eye(8)
    of[0, 1] = of[1, 0] = 2000
    with pytest.raises(HessianError, match="not positive definite"):
        hessian.factor(of)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [(3, 3), (3, 5)])
@pytest.mark.parametrize("act_order", [True, False])
def test_a_hessian_that_is_not_finite_is_refused(bad: float, where: tuple[int, int], act_order: bool) -> None:
    of = correlated_hessian(16, seed=8)
    of[where] = of[where[::-1]] = bad
    with pytest.raises(HessianError):
        hessian.factor(of, act_order=act_order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_the_mean_over_all_tokens_of_all_pieces(dtype: torch.dtype) -> None:
    tokens = correlated_tokens(210, 48, seed=9).to(dtype)
    total = HessianSum.zeros(48, CPU)
    total.add(tokens[:120].reshape(4, 30, 48))
    total.add(tokens[120:])
    total.add(tokens[:0])
    exact = tokens.double().T @ tokens.double() / 210
    assert total.n_tokens == 210
    assert (total.mean().double() - exact).abs().max() < 1e-6 * exact.abs().max()
    assert total.mean().dtype == torch.float32


@pytest.mark.parametrize("tile", [5, 8, 24, 100])
def test_a_sum_in_tiles_is_the_whole_product(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr(hessian, "TILE", tile)
    tokens = correlated_tokens(200, 24, seed=3)
    total = HessianSum.zeros(24, torch.device("cpu"))
    for part in torch.split(tokens, 64):
        total.add(part)
    wanted = tokens.double().T @ tokens.double() / len(tokens)
    torch.testing.assert_close(total.mean().double(), wanted, rtol=1e-5, atol=1e-6)


def test_an_input_no_token_reached_is_refused() -> None:
    with pytest.raises(HessianError, match="no token"):
        HessianSum.zeros(8, CPU).mean()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_activations_that_are_not_finite_or_overflow_name_their_channel(bad: float) -> None:
    tokens = correlated_tokens(10, 8, seed=10)
    tokens[4, 5] = bad
    total = HessianSum.zeros(8, CPU)
    total.add(tokens)
    with pytest.raises(HessianError, match="1 of 8 input channels are not finite, first 5"):
        total.mean()


def test_energies_are_the_quadratic_forms_of_columns() -> None:
    of = correlated_hessian(24, seed=11)
    error = torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(12))
    before = error.clone()
    found = hessian.energies(error, of)
    exact = [
        [
            sum(
                float(error[i, a, b]) * float(of[i, j]) * float(error[j, a, b])
                for i in range(24)
                for j in range(24)
            )
            for b in range(5)
        ]
        for a in range(3)
    ]
    torch.testing.assert_close(found, torch.tensor(exact), rtol=1e-5, atol=0)
    assert torch.equal(error, before)


@pytest.mark.parametrize("act_order", [True, False])
def test_a_factors_energies_are_those_of_the_hessian_without_its_ridge(act_order: bool) -> None:
    of = correlated_hessian(96, seed=13)
    factor = hessian.factor(of, act_order=act_order)
    error = torch.randn(96, 3, 5, generator=torch.Generator().manual_seed(14))
    before = error.clone()
    ordered = of[factor.perm][:, factor.perm].double()
    exact = torch.einsum("iab,ij,jab->ab", error.double(), ordered, error.double())
    torch.testing.assert_close(factor.energies(error).double(), exact, rtol=1e-4, atol=0)
    assert torch.equal(error, before)


def test_a_factor_knows_the_damped_diagonal_and_can_be_reduced_to_it() -> None:
    of = correlated_hessian(96, seed=15)
    factor = hessian.factor(of)
    diagonal = damped(of, factor).diagonal()
    torch.testing.assert_close(factor.diagonal().double(), diagonal, rtol=1e-5, atol=0)
    reduced = factor.without_feedback()
    assert torch.equal(reduced.perm, factor.perm)
    assert not reduced.feedback.any()
    torch.testing.assert_close(reduced.pivots.double(), diagonal, rtol=1e-5, atol=0)
    assert factor.feedback.any(), "the factor itself is left alone"


@pytest.mark.parametrize(
    ("n_tokens", "share"), [(0, 0.5), (64, 0.375), (128, 0.25), (255, 1 / 512), (256, 0), (10**6, 0)]
)
def test_off_the_diagonal_half_is_taken_away_at_most_and_nothing_from_four_tokens_a_channel(
    n_tokens: int, share: float
) -> None:
    assert hessian.shrinkage(n_tokens, 64) == share


@pytest.mark.parametrize("n_tokens", [40, 255, 256, 700])
def test_a_calibrated_hessian_is_the_mean_but_for_what_is_off_its_diagonal(n_tokens: int) -> None:
    tokens = correlated_tokens(n_tokens, 64, seed=20)
    plain, shrunk = HessianSum.zeros(64, CPU), HessianSum.zeros(64, CPU)
    plain.add(tokens)
    shrunk.add(tokens)
    mean, found = plain.mean(), shrunk.calibrated()
    kept = 1 - hessian.shrinkage(n_tokens, 64)
    assert torch.equal(found.diagonal(), mean.diagonal())
    assert torch.equal(found - found.diagonal().diag(), (mean * kept) - (mean * kept).diagonal().diag())
    assert torch.equal(found, mean) == (n_tokens >= 4 * 64)


@pytest.mark.parametrize("per_channel", [0.125, 0.5])
def test_with_fewer_tokens_than_channels_shrinking_lowers_the_error_on_others(per_channel: float) -> None:
    """GPTQ by the slow loop on made tokens, the error on 4096 others.

    The inputs of a trained model gain beyond that, tests/pipeline/test_shrinkage.py.
    """
    ratios = []
    for seed in range(4):
        tokens = correlated_tokens(4096 + int(per_channel * 96), 96, seed=30 + seed)
        others, seen = tokens[:4096], tokens[4096:]
        weight = torch.randn(24, 96, generator=torch.Generator().manual_seed(seed))
        errors = []
        for shrinks in (False, True):
            total = HessianSum.zeros(96, CPU)
            total.add(seen)
            factor = hessian.factor(total.calibrated() if shrinks else total.mean())
            errors.append(rounded_error(weight, factor, others))
        ratios.append(errors[1] / errors[0])
    assert sum(ratios) / len(ratios) < 0.97, ratios
    assert max(ratios) < 1.02, ratios


def rounded_error(weight: Tensor, factor: Factor, others: Tensor) -> float:
    """Mean squared error of the outputs for `others`, of weights rounded to steps of 0.75 in sequence."""
    original = weight[:, factor.perm].double()
    values, feedback = torch.zeros_like(original), factor.feedback.double()
    for column in range(original.shape[1]):
        handed_on = (original[:, :column] - values[:, :column]) @ feedback[:column, column]
        values[:, column] = ((original[:, column] + handed_on) / 0.75).round() * 0.75
    errors = others[:, factor.perm].double() @ (original - values).T
    return float(errors.square().mean())
