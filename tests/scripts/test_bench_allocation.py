"""The two allocations that ours is held against."""

from __future__ import annotations

import pytest

from exlq.measurement import LinearRecord, OptionRecord
from scripts import annealer
from scripts.bench_allocation import Allocator, annealed, uniform

NUMELS = (1000, 3000, 1000, 2000, 1000, 3000, 1000, 2000)
FIGURES = {"2b": (2, 0.3), "3b": (3, 0.1), "wasteful": (4, 0.2), "5b": (5, 0.01)}


def linears_of(names: list[str]) -> list[LinearRecord]:
    """Linears of unlike sizes, each with the options `names`; a last one of its own."""
    return [
        LinearRecord(
            f"linear.{i}",
            numel,
            tuple(
                OptionRecord(name, bits, bits * numel, error, {"bits": [bits]}, error, error)
                for name, (bits, error) in [*((n, FIGURES[n]) for n in names), (f"own {i}", (6, 0.0))]
            ),
        )
        for i, numel in enumerate(NUMELS)
    ]


def spent(linears: list[LinearRecord], choice: list[int]) -> int:
    return sum(linear.options[i].total_bits for linear, i in zip(linears, choice, strict=True))


def test_uniform_is_one_option_where_the_budget_is_just_that() -> None:
    linears = linears_of(list(FIGURES))
    assert uniform(linears, 3 * sum(NUMELS), seed=0) == [1] * len(NUMELS)


@pytest.mark.parametrize("bits", [2.0, 2.3, 3.5, 4.0, 4.9, 5.0, 9.0])
def test_uniform_keeps_the_budget_and_mixes_two_neighbours_of_the_front(bits: float) -> None:
    linears = linears_of(list(FIGURES))
    choice = uniform(linears, int(bits * sum(NUMELS)), seed=0)
    assert spent(linears, choice) <= bits * sum(NUMELS)
    assert set(choice) in ({0}, {0, 1}, {1}, {1, 3}, {3})
    assert spent(linears, choice) > (min(bits, 5.0) - 0.25) * sum(NUMELS)


def test_uniform_spreads_the_better_option_over_the_model() -> None:
    linears = linears_of(["2b", "3b"])
    choice = uniform(linears, int(2.5 * sum(NUMELS)), seed=0)
    assert 0 < sum(choice[:4]) < 4
    assert 0 < sum(choice[4:]) < 4


@pytest.mark.parametrize("allocator", [uniform, annealed])
def test_both_keep_the_budget_and_repeat_themselves(
    allocator: Allocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annealer, "RUNS", 3)
    linears = linears_of(list(FIGURES))
    budget = int(3.3 * sum(NUMELS))
    choice = allocator(linears, budget, 7)
    assert spent(linears, choice) <= budget
    assert choice == allocator(linears, budget, 7)
