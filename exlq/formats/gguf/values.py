"""What a GGUF file says about itself, apart from how it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType


@dataclass(frozen=True)
class KeyValue:
    """One metadata entry; `element` is the type of an array's elements, for arrays alone."""

    key: str
    value: Any
    type: GGUFValueType
    element: GGUFValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the file lists it.

    `shape` is torch's, (out_features, in_features) for a matrix; `type` a name of `gguf_blocks.TYPES`.
    """

    name: str
    shape: tuple[int, ...]
    type: str
