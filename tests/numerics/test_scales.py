"""The search for EXL2's scales against ExLlamaV2's own way of choosing them and against trying every code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exlq.numerics import kernels, scales
from tests.numerics.helpers import heavy_tailed

BITS = [2, 3, 4, 5, 6, 8]


def spread_importance(size: int, seed: int) -> Tensor:
    """Falling weights of channels over two orders of magnitude."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 0.3
    return torch.exp(torch.linspace(0, -4.6, size) + noise)


def stored(weights: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Values a file gives back: `weights` (size, out) at `scale` (out,) float16, in float64."""
    half = 2 ** (bits - 1)
    levels = (weights.double() / scale.double()).round().nan_to_num().clamp(-half, half - 1)
    product = levels.numpy().astype(np.float16) * scale.numpy()
    return torch.from_numpy(product.astype(np.float64))


def scale_of(code: Tensor, multiplier: Tensor) -> Tensor:
    """fp16((code + 1)² m), rounded by numpy."""
    squares = (code.numpy().astype(np.int32) + 1).astype(np.float16) ** 2
    return torch.from_numpy(squares * multiplier.numpy())


def error_of(weights: Tensor, codes: Tensor, multiplier: Tensor, importance: Tensor, bits: int) -> Tensor:
    """(out,) weighted squared error of one group, (size, out), in float64."""
    values = stored(weights, scale_of(codes, multiplier), bits)
    return ((values - weights.double()).square() * importance.double().unsqueeze(-1)).sum(0)


def errors_of(weights: Tensor, codes: Tensor, multiplier: Tensor, importance: Tensor, bits: int) -> Tensor:
    """(groups, out) of `error_of`."""
    groups = range(weights.shape[1])
    return torch.stack([error_of(weights[:, g], codes[g], multiplier[g], importance, bits) for g in groups])


def reference_search(weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes from the largest weights, then the best of 97 multipliers by unweighted |error|^3.5.

    `weights` is one group, (size, out). Gives codes (out,) and the float16 multiplier.
    """
    largest = (weights.abs().amax(0) + 1e-12) / ((2**bits - 1) / 2)
    top = largest.max()
    root = (16 * (largest / top).sqrt()).round().clamp(1, 16)
    ideal = (root / 16).square() * top
    half = 2 ** (bits - 1)

    def cost(factor: float) -> float:
        scale = ideal * factor
        values = (weights / scale).round().clamp(-half, half - 1) * scale
        return float((values - weights).abs().pow(3.5).sum())

    best = min(np.linspace(0.7, 1.2, 97).tolist(), key=cost)
    multiplier = torch.tensor((float(top) * best,)).half().float().div(256).half()[0]
    return (root - 1).byte(), multiplier


def best_codes(weights: Tensor, multiplier: Tensor, importance: Tensor, bits: int) -> Tensor:
    """(out,) least error of one group over all 16 codes."""
    tried = [
        error_of(weights, torch.full(weights.shape[1:], code), multiplier, importance, bits)
        for code in range(16)
    ]
    return torch.stack(tried).amin(0)


def fitted(
    weights: Tensor, importance: Tensor, bits: int, multiplier: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The search with as many bits in every group."""
    return scales.fit_squared_scales(weights, importance, [bits] * weights.shape[1], multiplier)


def test_groups_of_unlike_bits_are_fitted_as_each_alone() -> None:
    weights = heavy_tailed(64, 3 * 20, seed=31).reshape(64, 3, 20)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(32))
    multiplier, codes = scales.fit_squared_scales(weights, importance, [2, 4, 6])
    for g, bits in enumerate((2, 4, 6)):
        alone = fitted(weights[:, g : g + 1], importance, bits)
        assert multiplier[g] == alone[0]
        assert torch.equal(codes[g], alone[1][0])


def test_the_compiled_search_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernels.COMPILED
    weights = heavy_tailed(64, 3 * 200, seed=33).reshape(64, 3, 200)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(34))
    probes = 0.01 + 0.02 * torch.rand(5, 3, 200, generator=torch.Generator().manual_seed(35))
    half = torch.tensor([[2.0], [8.0], [32.0]])
    compiled = scales.errors_at(probes, weights, importance, half)
    found = scales.fit_squared_scales(weights, importance, [2, 4, 6])
    monkeypatch.setattr(scales, "COMPILED", False)
    assert torch.allclose(scales.errors_at(probes, weights, importance, half), compiled, rtol=1e-4)
    plain = scales.fit_squared_scales(weights, importance, [2, 4, 6])
    assert torch.equal(plain[0], found[0])
    same = (plain[1] == found[1]).float().mean().item()
    assert same > 0.99, f"{same:.2%} of codes agree; near-ties in float32 explain at most 1 %"


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("bits", BITS)
def test_the_weighted_error_is_below_the_references(bits: int, size: int, weighted: bool) -> None:
    weights = heavy_tailed(size, 24, 48, seed=bits)
    importance = spread_importance(size, seed=1) if weighted else torch.ones(size)
    multiplier, codes = fitted(weights, importance, bits)
    found = errors_of(weights, codes, multiplier, importance, bits).sum()
    pairs = [reference_search(weights[:, g], bits) for g in range(24)]
    reference = errors_of(
        weights, torch.stack([c for c, _ in pairs]), torch.stack([m for _, m in pairs]), importance, bits
    ).sum()
    assert found < reference, f"{found / reference:.4f} of the reference's error"


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_nearly_the_best_of_all_sixteen(bits: int, given: bool) -> None:
    weights, importance = heavy_tailed(64, 6, 96, seed=20 + bits), spread_importance(64, seed=2)
    wanted = torch.linspace(1, 3, 6).mul(0.05 / 2**bits / 256).half() if given else None
    multiplier, codes = fitted(weights, importance, bits, wanted)
    found = errors_of(weights, codes, multiplier, importance, bits)
    best = torch.stack([best_codes(weights[:, g], multiplier[g], importance, bits) for g in range(6)])
    assert found.sum() < 1.02 * best.sum(), f"{found.sum() / best.sum():.4f} of the least error"


@pytest.mark.parametrize(("bits", "bound"), [(2, 1.02), (3, 1.03), (4, 1.03), (5, 1.05), (6, 1.08), (8, 1.1)])
def test_multipliers_are_nearly_the_best_of_all(bits: int, bound: float) -> None:
    weights, importance = heavy_tailed(32, 4, 64, seed=30 + bits), spread_importance(32, seed=3)
    multiplier, codes = fitted(weights, importance, bits)
    found = errors_of(weights, codes, multiplier, importance, bits).sum()
    least = 0.0
    for g in range(4):
        tried = (multiplier[g].float() * torch.linspace(0.6, 1.6, 51)).half()
        least += min(float(best_codes(weights[:, g], m, importance, bits).sum()) for m in tried)
    assert found < bound * least, f"{found / least:.4f} of the least error"


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_very_different_sizes_use_the_range_of_codes(bits: int) -> None:
    sizes = torch.linspace(1 / 17, 1, 200).square()
    weights, importance = heavy_tailed(32, 1, 200, seed=40 + bits).clamp(-0.05, 0.05) * sizes, torch.ones(32)
    multiplier, codes = fitted(weights, importance, bits)
    assert set(range(15)) <= set(codes.flatten().tolist())
    found = errors_of(weights, codes, multiplier, importance, bits)
    best = best_codes(weights[:, 0], multiplier[0], importance, bits)
    assert found.sum() < 1.03 * best.sum(), f"{found.sum() / best.sum():.4f} of the least error"


def test_a_given_multiplier_is_taken_over() -> None:
    weights, importance = heavy_tailed(32, 3, 40, seed=5), spread_importance(32, seed=4)
    wanted = torch.tensor([2e-5, 1e-4, 6e-5]).half()
    multiplier, codes = fitted(weights, importance, 4, wanted)
    assert torch.equal(multiplier, wanted)
    _, free = fitted(weights, importance, 4)
    assert not torch.equal(codes, free)


def test_groups_do_not_see_each_other() -> None:
    weights, importance = heavy_tailed(32, 5, 64, seed=6), spread_importance(32, seed=5)
    together = fitted(weights, importance, 3)
    for g in range(5):
        alone = fitted(weights[:, g : g + 1], importance, 3)
        assert torch.equal(alone[0], together[0][g : g + 1])
        assert torch.equal(alone[1], together[1][g : g + 1])


@pytest.mark.parametrize("factor", [2.0**-24, 2.0**20])
def test_only_the_ratios_of_importances_count(factor: float) -> None:
    weights, importance = heavy_tailed(32, 5, 64, seed=7), spread_importance(32, seed=6)
    plain = fitted(weights, importance, 4)
    scaled = fitted(weights, importance * factor, 4)
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1], scaled[1])


def test_a_channel_that_does_not_matter_does_not_move_the_scales() -> None:
    weights, importance = heavy_tailed(32, 3, 48, seed=8), torch.ones(32)
    importance[7] = 0
    weights[7] = weights.abs().amax(0) * 0.9
    codes = fitted(weights, importance, 4)[1]
    weights[7] *= -1
    assert torch.equal(fitted(weights, importance, 4)[1], codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1.0, 1e4])
def test_weights_of_any_size_get_scales_that_hold_them(scale: float, bits: int) -> None:
    weights = heavy_tailed(32, 2, 32, seed=9, scale=1.0).clamp(-4, 4) * scale
    multiplier, codes = fitted(weights, torch.ones(32), bits)
    assert multiplier.dtype == torch.float16
    assert codes.dtype == torch.uint8
    assert (multiplier > 0).all()
    assert codes.max() < 16
    error = errors_of(weights, codes, multiplier, torch.ones(32), bits).sum()
    bound = 0.2 * weights.double().square().sum() + weights.numel() * (2.0**-25) ** 2  # half a quantum
    assert error.isfinite()
    assert error < bound


@pytest.mark.parametrize("bits", BITS)
def test_zero_groups_and_zero_rows_stay_zero(bits: int) -> None:
    weights = heavy_tailed(32, 3, 16, seed=10)
    weights[:, 1] = 0
    weights[:, 2, 5] = 0
    multiplier, codes = fitted(weights, torch.ones(32), bits)
    assert (multiplier > 0).all()
    for g in range(3):
        scale = scale_of(codes[g], multiplier[g])
        assert (scale > 0).all()
        assert scale.isfinite().all()
        assert (stored(weights[:, g], scale, bits)[weights[:, g] == 0] == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sign", [1, -1])
def test_constant_rows_are_held_to_their_scales_precision(bits: int, sign: int) -> None:
    weights = sign * torch.linspace(0.01, 0.05, 20).expand(32, 1, 20).contiguous()
    multiplier, codes = fitted(weights, torch.ones(32), bits)
    scale = scale_of(codes[0], multiplier[0])
    assert ((stored(weights[:, 0], scale, bits) - weights[:, 0]).abs() <= scale / 2 + 1e-6).all()


def test_the_arguments_are_left_alone() -> None:
    weights, importance = heavy_tailed(32, 2, 16, seed=11), spread_importance(32, seed=7)
    before = weights.clone(), importance.clone()
    fitted(weights, importance, 3)
    assert torch.equal(weights, before[0])
    assert torch.equal(importance, before[1])
