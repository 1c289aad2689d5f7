"""How hard each block type is searched, chosen by the error it saves for the time it takes.

Errors and rates of every type stand in what `scripts/bench_kquants.py` prints.
"""

from __future__ import annotations

from collections.abc import Sequence

from exlq.numerics.block_scales import Search

Pairs = tuple[tuple[float, float], ...]


def spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` numbers from `low` to `high`, evenly."""
    return tuple(low + (high - low) * i / (count - 1) for i in range(count))


def both_signs(level: float, factors: Sequence[float]) -> Pairs:
    """The largest weight of a sub-block on `level` times each factor, or on minus that."""
    return tuple((sign * level * factor, 0.0) for factor in factors for sign in (-1, 1))


def ranges(level: float, factors: Sequence[float], places: Sequence[float] = (0.0, 0.5, 1.0)) -> Pairs:
    """The range of a sub-block on `level` times each factor, what sticks out on either side or both."""
    return tuple((level * factor, place) for factor in factors for place in places)


def around(count: int) -> tuple[int, ...]:
    """0, -1, 1, … to plus and minus `count`."""
    return tuple(sorted(range(-count, count + 1), key=abs))


def products(factors: Sequence[float]) -> Pairs:
    return tuple((first, second) for first in factors for second in factors)


FOUR_BITS = spread(11, 17, 13)
SIX_BITS = spread(56, 66, 11)
SIGNED_SIX_BITS = (*spread(-34, -26, 9), *spread(26, 32, 7))
SIGNED_EIGHT_BITS = spread(-130, -110, 9)
NINE_STARTS = tuple((factor, 1.0) for factor in spread(0.85, 1.15, 9))
PAIRED_STARTS = products((1.0, 0.95, 1.05, 0.9, 1.1))
FIVE_PLACES = spread(0.0, 1.0, 5)

FAST: dict[str, Search] = {
    "Q4_0": Search(both_signs(8, spread(0.85, 1.4, 12))),
    "Q4_1": Search(ranges(15, spread(0.9, 1.3, 8))),
    "Q5_0": Search(both_signs(16, spread(0.88, 1.3, 12))),
    "Q5_1": Search(ranges(31, spread(0.9, 1.2, 8))),
    "Q8_0": Search(both_signs(128, (1.0,))),
    "Q2_K": Search(
        ranges(3, spread(0.8, 1.5, 12)), FOUR_BITS, FOUR_BITS, scale_window=around(1), min_window=around(1)
    ),
    "Q3_K": Search(both_signs(4, spread(0.8, 1.5, 8)), SIGNED_SIX_BITS, scale_window=around(1)),
    "Q4_K": Search(
        ranges(15, spread(0.88, 1.3, 10)), SIX_BITS, SIX_BITS, scale_window=around(1), min_window=around(1)
    ),
    "Q5_K": Search(
        ranges(31, spread(0.9, 1.2, 10)), SIX_BITS, SIX_BITS, scale_window=around(1), min_window=around(1)
    ),
    "Q6_K": Search(both_signs(32, spread(0.82, 1.35, 20)), SIGNED_EIGHT_BITS, scale_window=around(1)),
    "IQ4_NL": Search(both_signs(120, spread(0.8, 1.5, 16))),
    "IQ4_XS": Search(both_signs(120, spread(0.8, 1.5, 12)), SIGNED_SIX_BITS, scale_window=around(1)),
}
BEST: dict[str, Search] = {
    "Q4_0": Search(both_signs(8, spread(0.7, 2.2, 64)), sweeps=3, rounds=3),
    "Q4_1": Search(ranges(15, spread(0.8, 1.6, 24), FIVE_PLACES), sweeps=3, rounds=3),
    "Q5_0": Search(both_signs(16, spread(0.8, 1.6, 64)), sweeps=3, rounds=3),
    "Q5_1": Search(ranges(31, spread(0.8, 1.4, 24), FIVE_PLACES), sweeps=3, rounds=3),
    "Q8_0": Search(both_signs(128, spread(0.85, 1.2, 64)), sweeps=3, rounds=3),
    "Q2_K": Search(
        ranges(3, spread(0.7, 1.7, 20)),
        FOUR_BITS,
        FOUR_BITS,
        PAIRED_STARTS,
        scale_window=around(2),
        min_window=around(2),
        sweeps=3,
        rounds=3,
    ),
    "Q3_K": Search(
        both_signs(4, spread(0.75, 1.8, 24)),
        SIGNED_SIX_BITS,
        starts=NINE_STARTS,
        scale_window=around(8),
        sweeps=3,
        rounds=3,
    ),
    "Q4_K": Search(
        ranges(15, spread(0.85, 1.4, 20)),
        SIX_BITS,
        SIX_BITS,
        PAIRED_STARTS,
        scale_window=around(2),
        min_window=around(2),
        sweeps=3,
        rounds=3,
    ),
    "Q5_K": Search(
        ranges(31, spread(0.85, 1.3, 20)),
        SIX_BITS,
        SIX_BITS,
        PAIRED_STARTS,
        scale_window=around(2),
        min_window=around(2),
        sweeps=3,
        rounds=3,
    ),
    "Q6_K": Search(
        both_signs(32, spread(0.8, 1.5, 40)),
        SIGNED_EIGHT_BITS,
        starts=NINE_STARTS,
        scale_window=around(8),
        sweeps=3,
        rounds=3,
    ),
    "IQ4_NL": Search(both_signs(120, spread(0.75, 2.0, 64)), sweeps=3, rounds=3),
    "IQ4_XS": Search(
        both_signs(120, spread(0.75, 1.8, 24)),
        SIGNED_SIX_BITS,
        starts=NINE_STARTS,
        scale_window=around(3),
        sweeps=3,
        rounds=3,
    ),
}
