"""Source tensors under canonical names: fused matrices split, older names and tied heads resolved."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.models.layout import HEAD_KEY, Layout
from exlq.types import Weights


@dataclass(frozen=True)
class _Place:
    """Where a canonical tensor is stored: the whole of `key`, or `rows` of it, or of matrix `expert` in it.

    `whole` is the shape of such a tensor of matrices.
    """

    key: str
    rows: slice | None = None
    expert: int | None = None
    whole: tuple[int, ...] = ()


class CanonicalWeights:
    """`Weights` with exactly the tensors a model needs, each linear's under its own name.

    Raises ModelError when made, if a tensor is missing, has another shape than the model wants or
    is not bf16, fp16 or fp32.
    """

    def __init__(self, weights: Weights, layout: Layout) -> None:
        self._weights = weights
        self._places: dict[str, _Place] = {}
        stored = frozenset(weights.keys())
        for name, shape in layout.wanted.items():
            place = next((p for p in _candidates(name, layout) if p.key in stored), None)
            if place is None:
                raise _missing(name, layout, stored)
            _check(weights, place, layout, shape)
            self._places[name] = place

    @property
    def tied(self) -> bool:
        """Whether head and embedding are read from one stored tensor."""
        return self._places[f"{HEAD_KEY}.weight"] == self._places["model.embed_tokens.weight"]

    def keys(self) -> Collection[str]:
        return self._places.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown key."""
        place = self._place(key)
        shape = self._weights.shape(place.key)
        shape = shape if place.expert is None else shape[1:]
        return shape if place.rows is None else (place.rows.stop - place.rows.start, *shape[1:])

    def dtype(self, key: str) -> torch.dtype:
        return self._weights.dtype(self._place(key).key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor in its stored dtype, or only the given rows of its first dimension."""
        place = self._place(key)
        if place.rows is None:
            return self._weights.read(place.key, rows)
        if place.expert is not None:
            (matrix,) = self._weights.read(place.key, slice(place.expert, place.expert + 1))
            picked = _within(place.rows, rows)
            found: Tensor = matrix[picked.cpu() if isinstance(picked, Tensor) else picked]
            return found
        return self._weights.read(place.key, _within(place.rows, rows))

    def _place(self, key: str) -> _Place:
        if key not in self._places:
            raise ModelError(f"the model has no tensor {key}; it has {len(self._places)} others")
        return self._places[key]


def _within(outer: slice, rows: slice | Tensor | None) -> slice | Tensor:
    """Rows counted from the start of `outer`, counted from the start of the whole."""
    if rows is None:
        return outer
    if isinstance(rows, Tensor):
        return rows + int(outer.start)
    counted = range(outer.start, outer.stop)[rows]
    return slice(counted.start, counted.stop, counted.step)


def _candidates(name: str, layout: Layout) -> Iterator[_Place]:
    """Where a tensor may be, best first: its own name, fused with others, another name, the tied matrix."""
    yield _Place(name)
    if name in layout.fused:
        key, rows = layout.fused[name]
        yield _Place(key, rows)
    if name in layout.stacked:
        stacked = layout.stacked[name]
        yield _Place(stacked.key, stacked.rows, stacked.expert, stacked.shape)
    if name in layout.named:
        yield _Place(layout.named[name])
    if name in layout.older:
        yield _Place(layout.older[name])
    if name in layout.tied:
        yield _Place(layout.tied[name])


def _check(weights: Weights, place: _Place, layout: Layout, shape: tuple[int, ...]) -> None:
    found, wanted = weights.shape(place.key), shape
    if place.expert is not None:
        wanted = place.whole
    elif place.rows is not None:
        wanted = (layout.fused_rows[place.key], *shape[1:])
    if found != wanted:
        raise ModelError(f"{place.key} has the shape {found}; config.json wants {wanted}")
    weights.dtype(place.key)


def _missing(name: str, layout: Layout, stored: frozenset[str]) -> ModelError:
    tried = [place.key for place in _candidates(name, layout)]
    absent = sum(all(p.key not in stored for p in _candidates(n, layout)) for n in layout.wanted)
    return ModelError(
        f"no tensor {' or '.join(tried)} among the {len(stored)} stored, and {absent} of the"
        f" {len(layout.wanted)} wanted are missing; give a whole, unquantized model"
    )
