"""A value and its tensors, taken apart for a way to another device or process, and put together there."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

Part = TypeVar("Part")


@dataclass(frozen=True)
class Parcel(Generic[Part]):
    """A value: what each of its tensors became, and the rest as bytes. For our own processes alone."""

    rest: bytes
    parts: tuple[Part, ...]


def taken_apart(value: Any, each: Callable[[Tensor], Part]) -> Parcel[Part]:
    """The parcel of a value; `each` is given every tensor, however deep in the value it lies."""
    parts: list[Part] = []

    class Apart(pickle.Pickler):
        def persistent_id(self, found: Any) -> int | None:
            if not isinstance(found, Tensor):
                return None
            parts.append(each(found))
            return len(parts) - 1

    rest = io.BytesIO()
    Apart(rest, pickle.HIGHEST_PROTOCOL).dump(value)
    return Parcel(rest.getvalue(), tuple(parts))


def put_together(parcel: Parcel[Part], each: Callable[[Part], Tensor]) -> Any:
    """The value of a parcel, once `each` has made tensors of the parts."""

    class Together(pickle.Unpickler):
        def persistent_load(self, place: int) -> Tensor:
            return each(parcel.parts[place])

    return Together(io.BytesIO(parcel.rest)).load()
