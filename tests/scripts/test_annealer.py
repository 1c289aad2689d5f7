"""The annealer keeps its budget, repeats itself, and comes near the optimum where that is easy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from scripts import annealer
from scripts.annealer import anneal

Slots = list[list[tuple[float, float]]]


def slots_of(n_slots: int, n_options: int, seed: int) -> Slots:
    """Slots of unlike sizes; errors fall by about half with every bit."""
    random = np.random.default_rng(seed)
    bits = np.sort(random.uniform(2, 8, (n_slots, n_options)), axis=1)
    sizes = random.uniform(1, 3, (n_slots, 1))
    errors = random.uniform(0.2, 1, (n_slots, 1)) * 0.5**bits
    return np.stack([bits * sizes, errors], -1).tolist()  # type: ignore[no-any-return]


def spent(options: Slots, choice: list[int]) -> float:
    return sum(slot[index][0] for slot, index in zip(options, choice, strict=True))


def squares(options: Slots, choice: tuple[int, ...] | list[int]) -> float:
    return sum(slot[index][1] ** 2 for slot, index in zip(options, choice, strict=True))


@pytest.fixture(autouse=True)
def few_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annealer, "RUNS", 3)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.6, 1.0])
def test_the_budget_is_kept_and_no_option_is_left_that_fits(share: float) -> None:
    options = slots_of(10, 6, seed=1)
    least, most = spent(options, [0] * 10), spent(options, [5] * 10)
    budget = least + share * (most - least)

    choice = anneal(options, budget, seed=0)

    assert spent(options, choice) <= budget * (1 + 1e-12)
    for slot, index in zip(options, choice, strict=True):
        assert index == 5 or spent(options, choice) + slot[index + 1][0] - slot[index][0] > budget


def test_slots_may_have_unlike_numbers_of_options() -> None:
    options = [slot[: 1 + i] for i, slot in enumerate(slots_of(6, 6, seed=2))]
    choice = anneal(options, 1e9, seed=0)
    assert choice == [0, 1, 2, 3, 4, 5]


def test_the_same_seed_gives_the_same_choice_and_another_seed_another() -> None:
    options = slots_of(24, 12, seed=3)
    budget = 1.5 * spent(options, [0] * 24)
    found = [anneal(options, budget, seed) for seed in (5, 5, 6)]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_it_ends_within_a_quarter_of_the_least_sum_of_squares_of_a_small_case() -> None:
    options = slots_of(6, 5, seed=4)
    options = [[(bits, 20 * error) for bits, error in slot] for slot in options]
    budget = 1.5 * spent(options, [0] * 6)
    every = [c for c in itertools.product(range(5), repeat=6) if spent(options, list(c)) <= budget]
    optimum = min(squares(options, choice) for choice in every)
    mean = float(np.mean([squares(options, choice) for choice in every]))

    found = squares(options, anneal(options, budget, seed=0))

    assert optimum <= found <= 1.25 * optimum < mean / 1.25


def test_a_budget_below_the_first_options_is_refused() -> None:
    with pytest.raises(ValueError, match="give more"):
        anneal([[(4.0, 0.1)], [(5.0, 0.1)]], 8.0, seed=0)
