"""How much a conversion works."""

from __future__ import annotations

from typing import NamedTuple

ROW_LENGTH = 2048  # tokens in a row, or the model's maximum if that is less
LEAST_ROWS = 8  # one in eight is held out
NORMAL, DEFAULT_QUANTIZE_TOKENS, DEFAULT_MEASURE_TOKENS = "normal", 100 * 2048, 16 * 2048


class Effort(NamedTuple):
    """Tokens to quantize and to measure on, where rows are not given; whether a descent follows the sweep."""

    quantize_tokens: int
    measure_tokens: int
    descent: bool = True


EFFORTS = {
    "quick": Effort(DEFAULT_QUANTIZE_TOKENS // 4, DEFAULT_MEASURE_TOKENS // 4, descent=False),
    NORMAL: Effort(DEFAULT_QUANTIZE_TOKENS, DEFAULT_MEASURE_TOKENS),
    "best": Effort(DEFAULT_QUANTIZE_TOKENS * 5 // 2, DEFAULT_MEASURE_TOKENS * 5 // 2),
}


def rows_of(tokens: int, length: int) -> int:
    """Rows of `length` that come to `tokens`; never so few that none could be held out."""
    return max(LEAST_ROWS, tokens // length)
