"""The grid of a float type, for matrices whose rows no block type divides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from exlq.numerics.rounding import STEP


class FloatGrid:
    """Values of one float dtype, for every option and row alike."""

    def __init__(self, dtype: torch.dtype, in_features: int) -> None:
        self.dtype = dtype
        self.edges: Sequence[int] = range(STEP, in_features, STEP)

    def open(self, column: int, current: Tensor) -> None:
        """There are no groups."""

    def nearest(self, column: int, weights: Tensor) -> Tensor:
        return weights.to(self.dtype).float()

    def of_rows(self, rows: Tensor) -> FloatGrid:
        return self

    def kernel(self, start: int, end: int) -> None:
        """A plain conversion is fast enough."""
