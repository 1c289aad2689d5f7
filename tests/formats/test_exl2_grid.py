"""EXL2 scales inside the sweep: many options at once against the slow loop with one option at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from exlq.formats import exl2
from exlq.formats.exl2_grid import Exl2Grid, levels_of
from exlq.formats.exl2_options import OPTIONS, groups_of
from exlq.numerics import hessian, kernels, rounding, scales
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded, sweep
from exlq.types import Group
from tests.numerics.helpers import correlated_hessian, damped, heavy_tailed, one_column_at_a_time

OUT = 96


def mixed(*parts: tuple[int, int, int], in_features: int) -> list[Group]:
    """Groups from (rows, bits, group size), the last to the end."""
    groups: list[Group] = []
    start = 0
    for rows, bits, size in [*parts[:-1], (in_features, *parts[-1][1:])]:
        stop = min(start + rows, in_features)
        while start < stop:
            groups.append(Group(start, min(start + size, stop), bits))
            start = groups[-1].stop
    return groups


def problem(in_features: int, seed: int, out: int = OUT) -> tuple[Tensor, Tensor, Factor]:
    """Hessian, weight (in, out) in processing order, factor."""
    of = correlated_hessian(in_features, seed)
    factor = hessian.factor(of)
    return of, heavy_tailed(in_features, out, seed=seed + 1)[factor.perm], factor


def swept(
    weight: Tensor, factor: Factor, layouts: Sequence[Sequence[Group]], leader: Exl2Grid | None = None
) -> tuple[Exl2Grid, Rounded]:
    grid = Exl2Grid(layouts, factor.pivots, weight.shape[1], leader)
    return grid, sweep(weight, factor, grid, len(layouts))


def slow_levels(of: Tensor, weight: Tensor, factor: Factor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Levels (in, out) and scale codes (groups, out) of the slow loop; scales searched on its own weights."""
    by_start = {group.start: group for group in groups}
    levels = torch.zeros(weight.shape, dtype=torch.int64)
    codes, scale, half = [], torch.ones(weight.shape[1]).double(), 0

    def choose(column: int, current: Tensor) -> None:
        nonlocal scale, half
        group = by_start[column]
        shown = current[: group.size].float().unsqueeze(1)
        multiplier, code = scales.fit_squared_scales(shown, factor.pivots[column : group.stop], [group.bits])
        scale, half = ((code[0].int() + 1).square().half() * multiplier).double(), 1 << (group.bits - 1)
        codes.append(code[0])

    def nearest(column: int, weights: Tensor) -> Tensor:
        signed = (weights / scale).round().clamp(-half, half - 1)
        levels[column] = signed.long() + half
        return (signed * scale).half().double()

    one_column_at_a_time(weight, damped(of, factor), by_start, choose, nearest)
    return levels, torch.stack(codes)


def option_groups(in_features: int, *which: int) -> list[list[Group]]:
    return [groups_of(OPTIONS[i].qparams, in_features) for i in which]


@pytest.mark.parametrize(
    ("in_features", "layouts"),
    [
        (416, option_groups(416, 0, 1, 3, 8, 13, 17, 25)),  # groups of 128, 64 and 32 in one batch
        (192, option_groups(192, 2, 6, 7, 12, 20, 26, 28)),
        (192, option_groups(192, 13)),
        (
            416,
            [  # edges in common at 320 alone, then nowhere
                mixed((96, 4, 96), (224, 3, 64), (0, 2, 128), in_features=416),
                mixed((160, 6, 32), (160, 5, 32), (0, 4, 32), in_features=416),
                mixed((320, 8, 128), (0, 3, 64), in_features=416),
            ],
        ),
        (
            416,
            [
                mixed((0, 3, 128), in_features=416),
                mixed((0, 3, 96), in_features=416),
                mixed((0, 4, 160), in_features=416),
            ],
        ),
    ],
    ids=["tail of 416", "tail of 192", "one option", "one edge in common", "no edge in common"],
)
def test_many_options_at_once_have_the_levels_of_the_slow_loop(
    in_features: int, layouts: list[list[Group]]
) -> None:
    of, weight, factor = problem(in_features, seed=in_features)
    grid, rounded = swept(weight, factor, layouts)
    for option, groups in enumerate(layouts):
        expected, codes = slow_levels(of, weight, factor, groups)
        found = levels_of(rounded.values[:, option], grid.codes[option], grid.multipliers[option], groups)
        alike = (found == expected).double().mean().item()
        assert alike > 0.995, f"option {option}: {alike:.3%} of the levels agree"
        assert (grid.codes[option] == codes).double().mean() > 0.995


def test_edges_are_where_groups_of_every_option_begin() -> None:
    layouts = [
        mixed((64, 4, 32), (0, 3, 64), in_features=256),
        mixed((0, 3, 64), in_features=256),
        mixed((128, 3, 128), (0, 2, 32), in_features=256),
    ]
    assert Exl2Grid(layouts, torch.ones(256), 8).edges == [128, 192]
    assert Exl2Grid(layouts[:1], torch.ones(256), 8).edges == [32, 64, 128, 192]
    assert Exl2Grid([mixed((0, 3, 64), in_features=64)], torch.ones(64), 8).edges == []


def test_levels_give_the_values_back_bit_for_bit() -> None:
    _, weight, factor = problem(192, seed=3)
    layouts = option_groups(192, *range(len(OPTIONS)))
    grid, rounded = swept(weight, factor, layouts)
    for option, groups in enumerate(layouts):
        values, codes, multipliers = (
            rounded.values[:, option],
            grid.codes[option],
            grid.multipliers[option],
        )
        levels = levels_of(values, codes, multipliers, groups)
        for group, code, multiplier in zip(groups, codes, multipliers, strict=True):
            rows = slice(group.start, group.stop)
            assert levels[rows].int().max() < 1 << group.bits
            scale = (code.int() + 1).square().half() * multiplier
            signed = levels[rows].int() - (1 << (group.bits - 1))
            assert torch.equal(values[rows], (signed.half() * scale).float())


@pytest.mark.parametrize("scale", [3e-7, 1e-5, 1.0, 3000.0])
def test_levels_survive_scales_at_the_ends_of_float16(scale: float) -> None:
    """Below, neighbouring values are subnormal; above, a product may overflow."""
    _, weight, factor = problem(64, seed=4)
    weight = weight / weight.abs().max() * 10 * scale
    layouts = option_groups(64, 0, 8, 15, 21, 25, 29)
    grid, rounded = swept(weight, factor, layouts)
    assert rounded.values.isfinite().all()
    for option, groups in enumerate(layouts):
        codes, multipliers = grid.codes[option], grid.multipliers[option]
        levels = levels_of(rounded.values[:, option], codes, multipliers, groups)
        tensors = exl2.pack_linear(
            levels, codes, (multipliers.float() * 256).half(), groups, torch.arange(64)
        )
        assert torch.equal(exl2.dequantize_linear(tensors).float().T, rounded.values[:, option])


def test_rows_that_follow_take_over_the_multipliers_and_choose_their_own_codes() -> None:
    _, weight, factor = problem(192, seed=5, out=512)
    layouts = option_groups(192, 1, 5, 9, 15)
    leader, _ = swept(weight[:, ::2].contiguous(), factor, layouts)
    follower, rounded = swept(weight[:, 1::2].contiguous(), factor, layouts, leader)
    alone, free = swept(weight[:, 1::2].contiguous(), factor, layouts)
    for option in range(len(layouts)):
        assert torch.equal(follower.multipliers[option], leader.multipliers[option])
        assert not torch.equal(alone.multipliers[option], leader.multipliers[option])
        assert rounded.energy[option].sum() < 1.1 * free.energy[option].sum()


def test_a_linear_of_zeros_stays_zero() -> None:
    _, weight, factor = problem(64, seed=6)
    grid, rounded = swept(weight * 0, factor, option_groups(64, 0, 5, 29))
    assert (rounded.values == 0).all()
    assert all((multiplier > 0).all() for multiplier in grid.multipliers)


@pytest.mark.parametrize("magnitude", [1e-7, 1e-4, 0.02, 30.0])
def test_the_compiled_loop_rounds_as_the_plain_one(monkeypatch: pytest.MonkeyPatch, magnitude: float) -> None:
    of = correlated_hessian(192, seed=41)
    factor = hessian.factor(of)
    weight = magnitude * torch.randn(192, 600, generator=torch.Generator().manual_seed(42))
    layouts = [groups_of(option.qparams, 192) for option in (OPTIONS[0], OPTIONS[8], OPTIONS[-1])]
    assert kernels.COMPILED
    compiled = rounding.sweep(weight, factor, Exl2Grid(layouts, factor.pivots, 600), 3)
    monkeypatch.setattr("exlq.numerics.rounding.COMPILED", False)
    plain = rounding.sweep(weight, factor, Exl2Grid(layouts, factor.pivots, 600), 3)
    same = (compiled.values == plain.values).float().mean().item()
    assert same > 0.99, f"{same:.2%} of values agree; ties in float32 explain at most 1 %"
    assert torch.equal(compiled.values, compiled.values.half().float())
    assert torch.allclose(compiled.energy.sum(1), plain.energy.sum(1), rtol=0.01)
