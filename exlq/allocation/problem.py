"""What the solvers work on: items with choices, tied ones folded, losses as exact integers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from exlq.errors import MeasurementError

MAX_TOTAL_BITS = 1 << 62  # solvers count bits in int64


class Choice(NamedTuple):
    """One way to store an item: exact stored bits, and the loss it costs (finite, not negative)."""

    bits: int
    loss: float


@dataclass(frozen=True)
class Item:
    """Something stored in one of several ways.

    Items that share a `tie` take the same choice index; they list equally many choices.
    Raises MeasurementError where a number cannot be one.
    """

    key: str
    choices: tuple[Choice, ...]
    tie: str | None = None

    def __post_init__(self) -> None:
        if not self.choices:
            raise MeasurementError(f"{self.key} has no choices; it needs at least one")
        for index, (bits, loss) in enumerate(self.choices):
            if not isinstance(bits, int) or bits < 0:
                raise MeasurementError(f"{self.key}, choice {index}: bits is {bits!r}, not an integer from 0")
            if not (math.isfinite(loss) and loss >= 0):
                raise MeasurementError(f"{self.key}, choice {index}: loss is {loss!r}, not a number from 0")


@dataclass(frozen=True)
class Problem:
    """Items after folding, in the order of their first member.

    `bits[i][j]` and `losses[i][j]` belong to choice j of folded item i; losses are exact
    integers in units of 2**-scale. `keys[i]` names the members that take choice j together.
    """

    keys: tuple[tuple[str, ...], ...]
    bits: tuple[tuple[int, ...], ...]
    losses: tuple[tuple[int, ...], ...]
    scale: int

    def total_bits(self, choice: Sequence[int]) -> int:
        return sum(bits[index] for bits, index in zip(self.bits, choice, strict=True))

    def total_loss(self, choice: Sequence[int]) -> int:
        return sum(losses[index] for losses, index in zip(self.losses, choice, strict=True))

    def as_loss(self, units: int) -> float:
        """The float nearest to a loss in exact units."""
        return units / (1 << self.scale)

    def as_lower_loss(self, units: int) -> float:
        """The greatest float that is not above a loss in exact units."""
        nearest = self.as_loss(units)
        above = Fraction(nearest) > Fraction(units, 1 << self.scale)
        return math.nextafter(nearest, 0.0) if above else nearest


class Solution(NamedTuple):
    """A choice per folded item, and a proven lower bound of the least loss in exact units."""

    choice: list[int]
    bound: int


def fold(items: Sequence[Item]) -> Problem:
    """The exact problem in which every set of tied items is one item.

    Raises MeasurementError on no items, a key given twice, tied items with unequally many
    choices, or more bits in all than int64 counts.
    """
    if not items:
        raise MeasurementError("there is nothing to allocate; give at least one item")
    groups: dict[str, list[Item]] = {}
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise MeasurementError(f"{item.key} is given twice; name every item once")
        seen.add(item.key)
        groups.setdefault(f"key {item.key}" if item.tie is None else f"tie {item.tie}", []).append(item)
    for members in groups.values():
        _check_tied(members)
    most_bits = sum(max(choice.bits for choice in item.choices) for item in items)
    if most_bits >= MAX_TOTAL_BITS:
        raise MeasurementError(f"the largest choices sum to {most_bits} bits; at most 2**62 can be counted")
    scale = max(_binary_digits(choice.loss) for item in items for choice in item.choices)
    return Problem(
        keys=tuple(tuple(item.key for item in members) for members in groups.values()),
        bits=tuple(_summed([[c.bits for c in item.choices] for item in m]) for m in groups.values()),
        losses=tuple(
            _summed([[_exact(c.loss, scale) for c in item.choices] for item in m]) for m in groups.values()
        ),
        scale=scale,
    )


def _check_tied(members: list[Item]) -> None:
    first = members[0]
    for other in members[1:]:
        if len(other.choices) != len(first.choices):
            raise MeasurementError(
                f"{first.key} and {other.key} are tied but have {len(first.choices)} and "
                f"{len(other.choices)} choices; tied items need the same choices"
            )


def _summed(columns: list[list[int]]) -> tuple[int, ...]:
    return tuple(sum(column) for column in zip(*columns, strict=True))


def _binary_digits(loss: float) -> int:
    """Binary digits after the point that a float needs; its denominator is a power of two."""
    return float(loss).as_integer_ratio()[1].bit_length() - 1


def _exact(loss: float, scale: int) -> int:
    numerator, denominator = float(loss).as_integer_ratio()
    return numerator * ((1 << scale) // denominator)
