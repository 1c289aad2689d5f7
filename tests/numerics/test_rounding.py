"""The sweep against the slow loop, on grids that do not depend on what the sweep does."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from exlq.numerics import hessian
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded, sweep
from tests.numerics.helpers import (
    Slow,
    correlated_hessian,
    damped,
    energy_of,
    heavy_tailed,
    one_column_at_a_time,
)

OUT = 40
MANY = ((32,), (64,), (128,), (32, 64), (64, 128), (128, 32))


class SteppedGrid:
    """Multiples of a step per column, option and row, clipped; keeps what it was shown.

    `sizes` has, per option, the group sizes it goes through in turn; the last is repeated. A column whose
    group was never opened rounds to garbage.
    """

    def __init__(self, steps: Tensor, sizes: Sequence[Sequence[int]], edges: Sequence[int]) -> None:
        self.steps, self.edges = steps, edges  # (in, options, out)
        self.starts = [group_starts(len(steps), of) for of in sizes]
        self.shown: dict[tuple[int, int], Tensor] = {}
        self.column = -1

    def open(self, column: int, current: Tensor) -> None:
        for option, starts in enumerate(self.starts):
            if column in starts:
                self.shown[option, column] = current[:, option].clone()
        self.column = column - 1

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        self.column += 1
        assert column == self.column
        return rounded_to(weights, self.steps[column])

    def of_rows(self, rows: Tensor) -> SteppedGrid:
        raise NotImplementedError

    def kernel(self, start: int, end: int) -> None:
        """There is none: the plain loop is what is tested."""


def rounded_to(weights: Tensor, steps: Tensor) -> Tensor:
    return (weights / steps).round().clamp(-4, 3) * steps


def group_starts(in_features: int, sizes: Sequence[int]) -> list[int]:
    """Starts of groups of the given sizes in turn, the last repeated, the very last cut short."""
    starts = [0]
    for size in [*sizes, *[sizes[-1]] * in_features]:
        if starts[-1] + size >= in_features:
            return starts
        starts.append(starts[-1] + size)
    return starts


def common_edges(in_features: int, sizes: Sequence[Sequence[int]]) -> list[int]:
    return sorted(set.intersection(*(set(group_starts(in_features, of)) for of in sizes)) - {0})


def problem(in_features: int, n_options: int, seed: int = 0) -> tuple[Tensor, Tensor, Factor, Tensor]:
    """Hessian, weight (in, out) in processing order, factor, steps (in, options, out)."""
    of = correlated_hessian(in_features, seed)
    factor = hessian.factor(of)
    weight = heavy_tailed(in_features, OUT, seed=seed + 1)[factor.perm]
    generator = torch.Generator().manual_seed(seed + 2)
    steps = 0.01 * (1 + torch.rand(in_features, n_options, OUT, generator=generator))
    return of, weight, factor, steps


def slowly(of: Tensor, weight: Tensor, factor: Factor, steps: Tensor, starts: Sequence[int]) -> Slow:
    """The slow loop for one option, steps (in, out)."""
    return one_column_at_a_time(
        weight,
        damped(of, factor),
        starts,
        lambda _column, _current: None,
        lambda column, weights: rounded_to(weights, steps[column].double()),
    )


def share_alike(rounded: Rounded, option: int, slow: Slow, steps: Tensor) -> float:
    return ((rounded.values[:, option] - slow.values).abs() < steps / 2).double().mean().item()


@pytest.mark.parametrize("in_features", [32, 192, 416])
@pytest.mark.parametrize(
    "sizes",
    [((32,),), ((128,),), MANY, ((96, 64), (32, 128), (160, 32)), ((128, 32, 64), (96, 160))],
    ids=["one of 32", "one of 128", "many", "hardly an edge in common", "no edge in common"],
)
def test_levels_are_those_of_the_published_loop(in_features: int, sizes: Sequence[Sequence[int]]) -> None:
    of, weight, factor, steps = problem(in_features, len(sizes))
    grid = SteppedGrid(steps, sizes, common_edges(in_features, sizes))
    rounded = sweep(weight, factor, grid, len(sizes))
    for option in range(len(sizes)):
        slow = slowly(of, weight, factor, steps[:, option], grid.starts[option])
        share = share_alike(rounded, option, slow, steps[:, option])
        assert share > 0.995, f"{share:.2%} of the levels of option {option} agree"


@pytest.mark.parametrize("in_features", [192, 416])
def test_a_group_is_chosen_on_weights_with_all_earlier_errors_once(in_features: int) -> None:
    """Neither stale nor twice corrected; float32 alone parts the two."""
    of, weight, factor, steps = problem(in_features, len(MANY), seed=10)
    grid = SteppedGrid(steps, MANY, common_edges(in_features, MANY))
    sweep(weight, factor, grid, len(MANY))
    for option, starts in enumerate(grid.starts):
        slow = slowly(of, weight, factor, steps[:, option], starts)
        bounds = [*starts, in_features]
        for start, stop in pairwise(bounds):
            shown, expected = grid.shown[option, start], slow.current[start]
            assert len(shown) >= stop - start, "the whole group is shown"
            own = (shown[: stop - start] - expected[: stop - start]).abs().amax(0)
            moved = (expected[: stop - start] - weight[start:stop]).abs().max()
            assert own.median() < 1e-6, f"option {option} at {start}; errors had moved weights by {moved:.2g}"
            assert start == 0 or moved > 1e-4


def test_where_the_columns_are_cut_does_not_matter() -> None:
    _, weight, factor, steps = problem(416, 2, seed=20)
    sizes = ((32,), (64,))
    edge_lists: list[list[int]] = [common_edges(416, sizes), [], [384], [64, 128, 320]]
    runs = [sweep(weight, factor, SteppedGrid(steps, sizes, edges), 2) for edges in edge_lists]
    for run in runs[1:]:
        alike = ((run.values - runs[0].values).abs() < steps / 2).double().mean().item()
        assert alike > 0.995


def test_an_option_is_rounded_alike_alone_and_among_others() -> None:
    _, weight, factor, steps = problem(192, len(MANY), seed=30)
    together = sweep(weight, factor, SteppedGrid(steps, MANY, common_edges(192, MANY)), len(MANY))
    for option, sizes in enumerate(MANY):
        own = steps[:, option : option + 1]
        alone = sweep(weight, factor, SteppedGrid(own, [sizes], common_edges(192, [sizes])), 1)
        alike = ((alone.values[:, 0] - together.values[:, option]).abs() < own[:, 0] / 2).double().mean()
        assert alike > 0.995


def test_the_energy_is_the_damped_quadratic_form_of_the_errors() -> None:
    of, weight, factor, steps = problem(416, 3, seed=40)
    sizes = ((32,), (64,), (128,))
    rounded = sweep(weight, factor, SteppedGrid(steps, sizes, common_edges(416, sizes)), 3)
    assert torch.equal(rounded.errors, weight.unsqueeze(1) - rounded.values)
    for option in range(3):
        exact = energy_of(rounded.errors[:, option], damped(of, factor))
        torch.testing.assert_close(rounded.energy[option].double(), exact, rtol=1e-4, atol=0)


def test_errors_cost_less_than_those_of_plain_rounding() -> None:
    of, weight, factor, steps = problem(192, 1, seed=50)
    rounded = sweep(weight, factor, SteppedGrid(steps, [(64,)], [64, 128]), 1)
    plain = weight - rounded_to(weight, steps[:, 0])
    assert rounded.energy.sum() < 0.5 * energy_of(plain, damped(of, factor)).sum()


def test_without_correlation_every_weight_is_rounded_by_itself() -> None:
    factor = hessian.factor(torch.diag(torch.linspace(4, 1, 96)))
    weight = heavy_tailed(96, OUT, seed=60)
    steps = torch.full((96, 1, OUT), 0.01)
    rounded = sweep(weight, factor, SteppedGrid(steps, [(32,)], [32, 64]), 1)
    assert torch.equal(rounded.values[:, 0], rounded_to(weight, steps[:, 0]))


def test_the_weight_is_left_alone() -> None:
    _, weight, factor, steps = problem(192, 2, seed=70)
    before = weight.clone()
    sweep(weight, factor, SteppedGrid(steps, [(32,), (64,)], [64, 128]), 2)
    assert torch.equal(weight, before)
