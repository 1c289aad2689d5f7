"""Weights and activations that are no numbers: found where they first appear, and named."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.types import Weights


class FiniteWeights:
    """The `Weights` it is given, whose values are looked at when they are read.

    `read` raises ModelError naming the tensor and the first row and column that is not finite.
    """

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def keys(self) -> Collection[str]:
        return self._weights.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown key."""
        return self._weights.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._weights.dtype(key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor in its stored dtype, or only the given rows of its first dimension."""
        found = self._weights.read(key, rows)
        if not is_finite(found):
            raise ModelError(_weight_message(key, found, rows, self._weights.shape(key)[0]))
        return found


def is_finite(values: Tensor) -> bool:
    """Whether all are, without a copy of them."""
    if not values.numel() or not values.is_floating_point():
        return True
    low, high = torch.aminmax(values.detach())  # NaN where any is
    return bool(low.isfinite() & high.isfinite())


def require_finite(x: Tensor, where: str, row_name: Callable[[int], str]) -> Tensor:
    """`x` itself, activations (rows, length, features), once looked at.

    Args:
        where: they were found, as "block 3, mlp.down_proj".
        row_name: what a row of `x` is called.

    Raises:
        ModelError: naming the first row that is not finite, and the token and the channel in it.
    """
    if is_finite(x):
        return x
    row, token, channel = (~x.isfinite()).nonzero()[0].tolist()
    raise ModelError(
        f"{where}: {x[row, token, channel].item()} in {row_name(row)}, token {token}, channel {channel}: "
        "the weights before it are broken or too large, take an intact checkpoint"
    )


def _weight_message(key: str, found: Tensor, rows: slice | Tensor | None, n_rows: int) -> str:
    bad = ~found.isfinite()
    place = bad.nonzero()[0].tolist()
    value = found[tuple(place)].item()
    if isinstance(rows, slice):
        place[0] = range(n_rows)[rows][place[0]]
    elif rows is not None:
        place[0] = int(rows[place[0]])
    at = ", ".join(f"{name} {index}" for name, index in zip(("row", "column"), place, strict=False))
    return (
        f"{key} has {value} at {at}, {int(bad.sum())} of the {bad.numel()} values read are not finite: "
        "download the checkpoint again or take another"
    )
