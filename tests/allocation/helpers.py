"""Instances of the knapsack, and the slow oracle."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from fractions import Fraction

from exlq.allocation import Choice, Item


def brute_force(items: Sequence[Item], budget_bits: int) -> tuple[Fraction, int, tuple[int, ...]]:
    """(loss, bits, indices) least in this order over every combination, in exact arithmetic."""
    answers = []
    for indices in itertools.product(*(range(len(item.choices)) for item in items)):
        ties = {(item.tie, index) for item, index in zip(items, indices, strict=True) if item.tie}
        if len(ties) > len({tie for tie, _ in ties}):
            continue
        chosen = [item.choices[index] for item, index in zip(items, indices, strict=True)]
        bits = sum(choice.bits for choice in chosen)
        if bits <= budget_bits:
            answers.append((sum((Fraction(c.loss) for c in chosen), Fraction(0)), bits, indices))
    return min(answers)


KINDS = (
    "random", "coarse", "falling", "linear", "near ties", "huge", "zero loss", "tiny loss", "one choice",
    "duplicates", "tied", "wide range",
)  # fmt: skip


def small_instance(kind: str, seed: int) -> list[Item]:
    """At most 6 items of at most 5 choices; losses are dyadic where ties are meant to be exact."""
    rng = random.Random(f"{kind} {seed}")
    n_choices = 1 if kind == "one choice" else 0
    items = []
    for i in range(rng.randint(1, 6)):
        count = n_choices or (4 if kind == "tied" else rng.randint(1, 5))
        choices = [_choice(kind, rng) for _ in range(count)]
        if kind == "duplicates":
            choices += choices[: 5 - count]
            rng.shuffle(choices)
        items.append(Item(f"item {i}", tuple(choices), "pair" if kind == "tied" and i % 2 else None))
    return items


def _choice(kind: str, rng: random.Random) -> Choice:
    bits = rng.randint(0, 40)
    match kind:
        case "coarse":
            return Choice(100 * rng.randint(0, 4), rng.randint(0, 4) / 4)
        case "falling":
            return Choice(bits, 2.0 ** -(bits / 4) * rng.uniform(0.7, 1.3))
        case "linear":
            return Choice(bits, (40 - bits) / 8)
        case "near ties":
            return Choice(bits, 1 + rng.randint(0, 3) * 2.0**-40)
        case "huge":
            return Choice(rng.randint(10**9, 8 * 10**15), rng.random())
        case "zero loss":
            return Choice(bits, float(rng.random() < 0.4))
        case "tiny loss":
            return Choice(bits, rng.randint(0, 5) * 5e-324)
        case "wide range":
            return Choice(bits, 2.0 ** rng.randint(-300, 300))
        case _:
            return Choice(bits, rng.random())


def model_like(blocks: int, options: int, seed: int) -> list[Item]:
    """Linears of a large Llama with losses that fall fourfold a bit, a tenth of noise on them."""
    rng = random.Random(seed)
    shapes = [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (28672, 8192)]
    items = []
    for i, (rows, columns) in enumerate(shapes * blocks):
        weight = rng.lognormvariate(-7, 1)
        choices = []
        for j in range(options):
            group = (32, 64, 128)[j % 3]
            bits = (
                64 * (rows * columns * (2 * options + 6 * j) // (64 * options))
                + rows * (columns // group) * 4
            )
            choices.append(
                Choice(bits, weight * 4.0 ** -(bits / rows / columns) * rng.lognormvariate(0, 0.1))
            )
        items.append(Item(f"block {i // 6} linear {i % 6}", tuple(choices)))
    return items
