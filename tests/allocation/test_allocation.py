from __future__ import annotations

import itertools
import math
import random
import time
from fractions import Fraction

import numpy as np
import pytest
from scipy import optimize, sparse

from exlq.allocation import SOLVERS, Choice, Item, exact, frontier, reachable_range, solve
from exlq.errors import MeasurementError, TargetError
from exlq.types import Allocation
from tests.allocation.helpers import KINDS, brute_force, model_like, small_instance


def budgets(items: list[Item], seed: int) -> list[int]:
    low, high = reachable_range(items)
    return [low, high, high + 10**40, random.Random(seed).randint(low, high)]


def exact_loss(items: list[Item], found: Allocation) -> Fraction:
    return sum((Fraction(item.choices[found.choice[item.key]].loss) for item in items), Fraction(0))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"wide range"}))
@pytest.mark.parametrize("seed", range(20))
def test_the_default_solver_equals_brute_force_with_the_stated_ties(kind: str, seed: int) -> None:
    items = small_instance(kind, seed)
    for budget in budgets(items, seed):
        found = solve(items, budget)
        loss, bits, indices = brute_force(items, budget)
        assert (exact_loss(items, found), found.total_bits) == (loss, bits)
        assert tuple(found.choice[item.key] for item in items) == indices
        assert found.gap < 1e-15, "the search completed, so its bound is the answer's own loss"


@pytest.mark.parametrize("seed", range(20))
def test_losses_too_far_apart_for_a_float_sum_are_still_the_least_to_its_precision(seed: int) -> None:
    items = small_instance("wide range", seed)
    for budget in budgets(items, seed):
        found = solve(items, budget)
        assert found.loss == pytest.approx(float(brute_force(items, budget)[0]), rel=1e-15, abs=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_keeps_the_budget_and_its_bound_is_proven(solver: str, kind: str) -> None:
    for seed in range(17):
        items = small_instance(kind, seed)
        for budget in budgets(items, seed):
            found = solve(items, budget, solver)
            optimum = brute_force(items, budget)[0]
            chosen = [item.choices[found.choice[item.key]] for item in items]
            assert found.total_bits == sum(choice.bits for choice in chosen) <= budget
            assert found.loss == math.fsum(choice.loss for choice in chosen)
            assert found.bound <= float(optimum) <= found.loss


@pytest.mark.parametrize("seed", range(4))
def test_a_model_sized_answer_is_as_good_as_that_of_highs(seed: int) -> None:
    items = model_like(blocks=4, options=12, seed=seed)
    low, high = reachable_range(items)
    budget = low + (high - low) * (seed + 1) // 6

    found = solve(items, budget)

    bits = np.array([c.bits for item in items for c in item.choices]) / budget
    loss = np.array([c.loss for item in items for c in item.choices]) / found.loss
    one_each = sparse.kron(sparse.eye_array(len(items)), np.ones((1, 12)), format="csr")
    answer = optimize.milp(
        loss,
        integrality=np.ones(len(loss), dtype=int),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(one_each, 1, 1), optimize.LinearConstraint(bits, -np.inf, 1)],
        options={"mip_rel_gap": 0.0, "time_limit": 20.0},
    )
    assert answer.success
    assert float(answer.fun) == pytest.approx(1, abs=1e-6), f"HiGHS found a loss of {answer.fun} times ours"


@pytest.mark.parametrize("bpw", [2.3, 4.0, 6.1])
def test_a_70b_model_takes_seconds_and_is_proven_optimal(bpw: float) -> None:
    items = model_like(blocks=100, options=25, seed=0)
    weights = 100 * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 2 * 8192 * 28672)
    begin = time.perf_counter()
    found = solve(items, int(bpw * weights))
    assert time.perf_counter() - begin < 5
    assert found.gap < 1e-15
    assert 0 <= bpw * weights - found.total_bits < 1e-4 * weights


def test_the_preview_is_instant_and_close() -> None:
    items = model_like(blocks=100, options=25, seed=1)
    low, high = reachable_range(items)
    begin = time.process_time()
    preview = solve(items, (low + high) // 2, "lagrange")
    assert time.process_time() - begin < 1
    assert preview.bound <= solve(items, (low + high) // 2).loss <= preview.loss
    assert preview.gap < 1e-3


def test_the_order_of_items_and_choices_does_not_change_loss_and_bits() -> None:
    items = model_like(blocks=3, options=15, seed=2)
    low, high = reachable_range(items)
    expected = solve(items, (low + high) // 2)
    assert solve(items, (low + high) // 2) == expected
    rng = random.Random(0)
    for _ in range(5):
        turned = [
            Item(item.key, tuple(rng.sample(item.choices, 15))) for item in rng.sample(items, len(items))
        ]
        found = solve(turned, (low + high) // 2)
        assert found.total_bits == expected.total_bits
        assert {i.key: i.choices[found.choice[i.key]] for i in turned} == {
            i.key: i.choices[expected.choice[i.key]] for i in items
        }


@pytest.mark.parametrize("kind", ["linear", "falling"])
def test_a_search_cut_short_still_keeps_the_budget_and_a_proven_bound(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exact, "MAX_STATES", 2)
    monkeypatch.setattr(exact, "MIN_STATES", 1)
    cut = 0
    for seed in range(60):
        items = small_instance(kind, seed)
        budget = budgets(items, seed)[-1]
        found = solve(items, budget)
        optimum = float(brute_force(items, budget)[0])
        assert found.bound <= optimum <= found.loss
        assert found.total_bits <= budget
        cut += found.bound < found.loss * (1 - 1e-12)
    assert cut > 0, "no search was cut short, so nothing was shown"


def test_the_frontier_is_convex_and_each_point_is_an_optimum() -> None:
    for seed in range(20):
        items = small_instance("falling", seed)
        points = frontier(items)
        assert points[0][0] == reachable_range(items)[0]
        for bits, loss in points:
            assert loss == pytest.approx(float(brute_force(items, bits)[0]), rel=1e-12)
        slopes = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(points)]
        assert all(after >= before - 1e-12 for before, after in itertools.pairwise(slopes))


def test_tied_items_take_the_same_index_and_count_together() -> None:
    cheap, dear = Choice(10, 1.0), Choice(20, 0.0)
    items = [Item("a", (cheap, dear), "t"), Item("b", (cheap, dear)), Item("c", (cheap, dear), "t")]
    assert solve(items, 40).choice == {"a": 0, "b": 1, "c": 0}
    assert solve(items, 50).choice == {"a": 1, "b": 0, "c": 1}
    assert solve(items, 49).total_bits == 40


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_unreachable_budget_names_the_range(solver: str) -> None:
    items = [Item("a", (Choice(10, 1.0), Choice(20, 0.0))), Item("b", (Choice(5, 1.0),))]
    assert reachable_range(items) == (15, 25)
    with pytest.raises(TargetError, match=r"14 bits.*15 to 25"):
        solve(items, 14, solver)


def test_an_unknown_solver_is_refused_with_the_known_ones() -> None:
    with pytest.raises(TargetError, match="exact, lagrange"):
        solve([Item("a", (Choice(1, 0.0),))], 1, "guess")


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((), "a has no choices"),
        ((Choice(1, math.nan),), "a, choice 0: loss is nan"),
        ((Choice(1, 0.0), Choice(1, math.inf)), "a, choice 1: loss is inf"),
        ((Choice(1, -0.5),), "loss is -0.5"),
        ((Choice(-1, 0.5),), "bits is -1"),
        ((Choice(1.5, 0.5),), "bits is 1.5"),  # type: ignore[arg-type]
    ],
)
def test_impossible_numbers_are_refused_by_name(choices: tuple[Choice, ...], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        Item("a", choices)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "nothing to allocate"),
        ([Item("a", (Choice(1, 0.0),)), Item("a", (Choice(1, 0.0),))], "a is given twice"),
        ([Item("a", (Choice(1, 0.0),), "t"), Item("b", (Choice(1, 0.0),) * 2, "t")], "a and b are tied"),
        ([Item("a", (Choice(1 << 62, 0.0),))], "at most 2\\*\\*62"),
    ],
)
def test_items_that_cannot_be_folded_are_refused(items: list[Item], message: str) -> None:
    with pytest.raises(MeasurementError, match=message):
        solve(items, 100)
