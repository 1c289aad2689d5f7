"""The scale search against slow grids in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from exlq.numerics.block_scales import BlockFit, Blocks, Search, fit_blocks
from exlq.numerics.compiled_lanes import LANES, to_half

TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
WINDOW = (0, -1, 1)
THREES = tuple((target, place) for target in (2.4, 2.8, 3.0, 3.3, 3.8, 4.4) for place in (0.0, 0.5, 1.0))
STEPS = Blocks(32, 32, -8, 7)
SIGNED = Blocks(32, 32, 0, 15, mins=(1, 1), signed=True)
TABLED = Blocks(32, 32, 0, 15, table=TABLE)
PAIRED = Blocks(64, 16, 0, 3, scales=(0, 15), mins=(0, 15))
SCALED = Blocks(64, 16, -4, 3, scales=(-32, 31))
ALL = {"steps": STEPS, "signed": SIGNED, "tabled": TABLED, "paired": PAIRED, "scaled": SCALED}


def numbers(blocks: Blocks) -> tuple[float, ...]:
    return blocks.table or tuple(range(blocks.low, blocks.high + 1))


def thorough(blocks: Blocks) -> Search:
    """Many starts, as far as the parameters of `blocks` have a use for them."""
    top = max(numbers(blocks))
    factors = [0.7 + 0.03 * i for i in range(40)]
    if blocks.mins is None:
        starts = tuple((sign * top * factor, 0.0) for factor in factors for sign in (-1.0, 1.0))
    else:
        starts = tuple((top * factor, place) for factor in factors for place in (0.0, 0.25, 0.5, 0.75, 1.0))
    if blocks.scales == (1, 1):
        return Search(starts, sweeps=3)
    targets = tuple(blocks.scales[1] * factor for factor in (0.8, 0.85, 0.9, 0.95, 1.0, 1.05))
    signed = (*targets, *(-target for target in targets)) if blocks.mins is None else targets
    return Search(starts, signed, targets, scale_window=WINDOW, min_window=WINDOW, sweeps=3, rounds=3)


def values(blocks: Blocks, found: BlockFit) -> Tensor:
    """(rows, in_features) float64 that the stored numbers stand for."""
    n_subs = blocks.size // blocks.sub_block
    scale = found.steps.double().repeat_interleave(n_subs, -1) * found.scales.double()
    shift = found.bases.double().repeat_interleave(n_subs, -1) * found.mins.double()
    levels = found.levels.double()
    if blocks.table:
        levels = torch.tensor(blocks.table, dtype=torch.float64)[found.levels.long()]
    parts = torch.unflatten(levels, -1, (-1, blocks.sub_block))  # (rows, sub_blocks, weights)
    whole: Tensor = (scale.unsqueeze(-1) * parts - shift.unsqueeze(-1)).flatten(1)
    return whole


def weighted_error(weight: Tensor, other: Tensor, importance: Tensor) -> float:
    return ((weight.double() - other).square() * importance.double()).sum().item()


def least_error(x: Tensor, h: Tensor, blocks: Blocks) -> float:
    """Of one sub-block, over a fine grid of scales and shifts that need not be storable."""
    x, h = x.double(), h.double()
    q = torch.tensor(numbers(blocks), dtype=torch.float64)
    if blocks.mins is None:
        scales = (
            torch.cat([sign * torch.linspace(0.3, 2.0, 4000) for sign in (-1, 1)]) * x.abs().max() / q.max()
        )
        shifts = torch.zeros(1, dtype=torch.float64)
    else:
        scales = torch.linspace(0.2, 1.3, 160).double() * (x.max() - x.min()) / q.max()
        shifts = torch.linspace(-1.2 if blocks.signed else 0.0, 1.2, 400).double() * x.abs().max()
    best = float("inf")
    for shift in shifts:
        grid = scales[:, None].double() * q - shift  # (scales, levels)
        gaps = (grid[:, :, None] - x).abs().amin(1)  # (scales, weights)
        best = min(best, (gaps.square() @ h).min().item())
    return best


@pytest.mark.parametrize("name", ALL)
def test_the_error_is_near_the_least_that_free_scales_leave(name: str) -> None:
    """A bound from below: sub-blocks whose scales are rounded to nothing and shared with nobody."""
    blocks, random = ALL[name], torch.Generator().manual_seed(0)
    weight = torch.randn(3, blocks.size, generator=random)
    importance = torch.randn(blocks.size, generator=random).exp()
    fitted = fit_blocks(weight, importance, blocks, [thorough(blocks)])
    found = weighted_error(weight, values(blocks, fitted), importance)
    parts = [part for row in weight for part in torch.split(row, blocks.sub_block)]
    factors = torch.split(importance, blocks.sub_block) * len(weight)
    bound = sum(least_error(x, h, blocks) for x, h in zip(parts, factors, strict=True))
    shared = 1.25 if blocks.scales != (1, 1) else 1.01  # what integer scales cost at the most
    assert found <= shared * bound, f"{name}: {found / bound:.4f} times the bound"


def test_integer_scales_and_mins_are_near_the_best_of_all_pairs() -> None:
    """With the found step and base, all 256 pairs of every sub-block are tried in float64."""
    random = torch.Generator().manual_seed(1)
    weight, importance = torch.randn(40, 64, generator=random), torch.randn(64, generator=random).exp()
    found = fit_blocks(weight, importance, PAIRED, [thorough(PAIRED)])
    error = weighted_error(weight, values(PAIRED, found), importance)
    x, h = weight.double().view(40, 4, 1, 1, 16), importance.double().view(4, 1, 1, 16)
    integers, q = torch.arange(16.0).double(), torch.arange(4.0).double()
    scale = found.steps.double().view(-1, 1, 1, 1, 1) * integers.view(-1, 1, 1)
    shift = found.bases.double().view(-1, 1, 1, 1, 1) * integers.view(-1, 1)
    level = ((x + shift) / scale.clamp_min(1e-30)).round().clamp(0, q.max().item())
    each = ((level * scale - shift - x).square() * h).sum(-1).flatten(2).amin(-1)  # (rows, sub-blocks)
    assert error <= 1.03 * each.sum().item(), f"{error / each.sum().item():.4f}"


@pytest.mark.parametrize("name", ALL)
def test_neither_threads_nor_other_rows_change_a_row(name: str) -> None:
    blocks, random = ALL[name], torch.Generator().manual_seed(2)
    weight = torch.randn(2 * LANES + 13, 2 * blocks.size, generator=random)
    importance, search = torch.rand(2 * blocks.size, generator=random), thorough(blocks)
    one = fit_blocks(weight, importance, blocks, [search])
    part = fit_blocks(weight[5:70], importance, blocks, [search])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three = fit_blocks(weight, importance, blocks, [search])
    finally:
        torch.set_num_threads(threads)
    for whole, again, some in zip(one, three, part, strict=True):
        assert torch.equal(whole, again)
        assert torch.equal(whole[5:70], some)


@pytest.mark.parametrize("name", ALL)
def test_a_second_search_never_makes_a_block_worse(name: str) -> None:
    blocks, random = ALL[name], torch.Generator().manual_seed(3)
    weight, importance = torch.randn(50, blocks.size, generator=random), torch.ones(blocks.size)
    good, poor = thorough(blocks), Search(((9.0, 0.0),), sweeps=0, rounds=0)

    def error(*searches: Search) -> Tensor:
        stored = values(blocks, fit_blocks(weight, importance, blocks, searches))
        return (stored - weight).square().sum(-1)

    assert (error(good, poor) <= error(good) * (1 + 1e-5)).all()
    assert (error(poor, good) <= error(poor) * (1 + 1e-5)).all()


@pytest.mark.parametrize("power", [-100, -3, 90])
def test_the_unit_of_the_importance_does_not_matter(power: int) -> None:
    random = torch.Generator().manual_seed(4)
    weight, importance = torch.randn(9, 64, generator=random), torch.rand(64, generator=random)
    found, other = (
        fit_blocks(weight, factors, PAIRED, [thorough(PAIRED)])
        for factors in (importance, importance.double() * 2.0**power)
    )
    assert all(torch.equal(one, another) for one, another in zip(found, other, strict=True))


def test_halves_are_rounded_as_torch_rounds_them() -> None:
    random = torch.Generator().manual_seed(5)
    exponents = torch.linspace(-26, 15.9, 20000)
    numbers = torch.randn(20000, generator=random).sign() * torch.exp2(exponents)
    wanted = numbers.half().float()
    rounded = numbers.numpy().copy()
    to_half(rounded, False)
    lost = (wanted == 0).numpy()
    assert np.array_equal(rounded[~lost], wanted.numpy()[~lost])
    assert (np.abs(rounded[lost]) == 2.0**-24).all()
    to_half(rounded := np.array([1e9, -1e9, 0.0], np.float32), False)
    assert rounded.tolist() == [65504.0, -65504.0, 0.0]


def test_subnormal_halves_are_rounded_up_where_integers_multiply_them() -> None:
    numbers = np.array([1.02, 1.3, 7.5, -2.6], np.float32) * np.float32(2**-24)
    to_half(numbers, True)
    assert (numbers * 2**24).tolist() == [1.0, 2.0, 8.0, -3.0]
