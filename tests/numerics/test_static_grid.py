"""Grids with scales chosen beforehand: nearest by brute force, alike compiled and plain, in any order."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from exlq.numerics import hessian, rounding
from exlq.numerics.float_grid import FloatGrid
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded, sweep
from exlq.numerics.static_grid import Affine, StaticGrid
from tests.numerics.helpers import correlated_hessian, damped, heavy_tailed, one_column_at_a_time

IN, OUT = 192, 40
TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
KINDS = ("symmetric", "offset", "table", "wide", "one run")


def affine(kind: str, seed: int = 0) -> Affine:
    """A grid that reaches about as far as `heavy_tailed` weights do; every eleventh scale is zero."""
    generator = torch.Generator().manual_seed(seed)
    run = {"one run": IN, "wide": 96}.get(kind, 32)
    scale = 0.01 * (0.5 + torch.rand(IN // run, OUT, generator=generator))
    scale *= torch.randint(0, 2, scale.shape, generator=generator) * 2 - 1  # ggml's scales have either sign
    scale.view(-1)[5::11] = 0
    none = torch.zeros_like(scale)
    if kind == "offset":
        return Affine(scale.abs(), 0.05 + 0.02 * torch.rand(scale.shape, generator=generator), 0, 15)
    if kind == "table":
        return Affine(scale / 16, none, 0, 15, TABLE)
    return Affine(scale, none, -8, 7)


def meanings(grid: Affine) -> list[int]:
    return list(grid.table or range(grid.low, grid.high + 1))


def value_table(grid: Affine, channel: int) -> Tensor:
    """(levels, out) float64: all that a channel's weights can become."""
    unit = channel // (IN // len(grid.scale))
    step, shift = grid.scale[unit].double(), grid.offset[unit].double()
    return torch.tensor(meanings(grid), dtype=torch.float64)[:, None] * step - shift


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Factor]:
    """Hessian, weight (in, out) in processing order, factor in act-order."""
    of = correlated_hessian(IN, seed)
    factor = hessian.factor(of)
    return of, heavy_tailed(IN, OUT, seed=seed + 1)[factor.perm], factor


def share_alike(one: Tensor, other: Tensor) -> float:
    return ((one.double() - other.double()).abs() < 1e-6).double().mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_becomes_the_nearest_value_there_is(kind: str) -> None:
    _, weight, factor = problem()
    weight *= 3  # some are clipped
    option = affine(kind)
    grid = StaticGrid([option], factor.perm)
    for column in range(0, IN, 7):
        found = grid.nearest(column, weight[column][None])[0].double()
        values = value_table(option, int(factor.perm[column]))
        best = (values - weight[column].double()).abs().amin(0)
        assert ((found - weight[column].double()).abs() <= best + 1e-7).all()
        assert ((values - found).abs().amin(0) < 1e-7).all(), "one of the values there are"


def test_compiled_and_plain_columns_are_the_same_bit_for_bit() -> None:
    """Halves between two levels, zero scales and weights beyond the ends among them."""
    _, weight, factor = problem()
    options = [affine(kind, seed) for seed, kind in enumerate(KINDS)]
    grid = StaticGrid(options, factor.perm)
    columns = slice(32, 64)
    values = 2 * weight[columns].unsqueeze(1).repeat(1, len(options), 1)
    for i, option in enumerate(options):
        table = value_table(option, int(factor.perm[40]))
        values[8, i] = ((table[3] + table[4]) / 2).float()
    wanted = torch.stack([grid.nearest(32 + i, column) for i, column in enumerate(values)])
    errors, energy = torch.empty_like(values), torch.zeros(len(options), OUT)
    none, ones = torch.zeros(32, 32), torch.ones(32)
    before = values.clone()
    arrays = (values, errors, weight[columns].contiguous(), none, ones, energy)
    grid.kernel(32, 64)(*(x.numpy() for x in arrays))
    assert torch.equal(values, wanted)
    assert torch.equal(errors, weight[columns].unsqueeze(1) - wanted)
    torch.testing.assert_close(energy, (before - wanted).square().sum(0))


def test_a_compiled_sweep_and_a_plain_one_give_the_same_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, factor = problem(seed=2)
    options = [affine(kind, seed) for seed, kind in enumerate(KINDS)]

    def run() -> Rounded:
        return sweep(weight, factor, StaticGrid(options, factor.perm), len(options))

    compiled = run()
    monkeypatch.setattr(rounding, "COMPILED", False)
    plain = run()
    assert share_alike(compiled.values, plain.values) >= 0.999
    torch.testing.assert_close(compiled.energy, plain.energy, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_in_act_order_gives_the_levels_of_the_published_loop(kind: str) -> None:
    of, weight, factor = problem(seed=4)
    assert factor.perm.tolist() != sorted(factor.perm.tolist())
    option = affine(kind)

    def nearest(column: int, weights: Tensor) -> Tensor:
        values = value_table(option, int(factor.perm[column]))
        return values.gather(0, (values - weights).abs().argmin(0)[None])[0]

    slow = one_column_at_a_time(weight, damped(of, factor), (), lambda _column, _current: None, nearest)
    rounded = sweep(weight, factor, StaticGrid([option], factor.perm), 1)
    share = share_alike(rounded.values[:, 0], slow.values)
    assert share > 0.995, f"{share:.2%} of the levels agree"


def test_options_with_runs_of_different_lengths_are_rounded_alike_alone_and_together() -> None:
    _, weight, factor = problem(seed=6)
    options = [affine(kind, seed) for seed, kind in enumerate(KINDS)]
    together = sweep(weight, factor, StaticGrid(options, factor.perm), len(options))
    for i, option in enumerate(options):
        alone = sweep(weight, factor, StaticGrid([option], factor.perm), 1)
        assert share_alike(alone.values[:, 0], together.values[:, i]) >= 0.995


@pytest.mark.parametrize("kind", KINDS)
def test_levels_give_their_values_back(kind: str) -> None:
    option, generator = affine(kind), torch.Generator().manual_seed(3)
    levels = torch.randint(option.low, option.high + 1, (IN, OUT), generator=generator)
    scale, offset = (x.repeat_interleave(IN // len(x), 0) for x in (option.scale, option.offset))
    meaning = torch.tensor(meanings(option)).float()
    found = option.levels(scale * meaning[levels - option.low] - offset)
    assert torch.equal(found[scale != 0].long(), levels[scale != 0])
    assert bool(((found >= option.low) & (found <= option.high)).all()), "whatever a scale of zero leaves"


def grids(of: Factor) -> Sequence[StaticGrid | FloatGrid]:
    return (StaticGrid([affine("symmetric")], of.perm), FloatGrid(torch.bfloat16, IN))


@pytest.mark.parametrize("which", [0, 1])
def test_without_feedback_every_weight_is_rounded_by_itself(which: int) -> None:
    of, weight, factor = problem(seed=8)
    grid = grids(factor)[which]
    plain = torch.stack([grid.nearest(column, row[None])[0] for column, row in enumerate(weight)])
    rounded = sweep(weight, factor.without_feedback(), grid, 1)
    assert torch.equal(rounded.values[:, 0], plain)
    diagonal = damped(of, factor).diagonal()
    wanted = ((weight - plain).double().square() * diagonal[:, None]).sum(0)
    torch.testing.assert_close(rounded.energy[0].double(), wanted, rtol=1e-4, atol=0)
    with_feedback = sweep(weight, factor, grids(factor)[which], 1)
    assert factor.energies(with_feedback.errors).sum() < factor.energies(rounded.errors).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float_grid_rounds_to_the_dtype_and_hands_errors_on(dtype: torch.dtype) -> None:
    of, weight, factor = problem(seed=9)
    rounded = sweep(weight, factor, FloatGrid(dtype, IN), 1)
    assert torch.equal(rounded.values.to(dtype).float(), rounded.values)

    def nearest(_column: int, weights: Tensor) -> Tensor:
        return weights.to(dtype).double()

    slow = one_column_at_a_time(weight, damped(of, factor), (), lambda _column, _current: None, nearest)
    share = (rounded.values[:, 0] == slow.values).double().mean()
    assert share > 0.98, "sums in float32 come near a half of float16's small steps now and then"
