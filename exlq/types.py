"""The values and seams every layer shares."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class LinearSpec:
    """One matrix of the model, under its canonical name, as `nn.Linear` holds it.

    `key` has no suffix: `model.layers.0.self_attn.q_proj`.
    """

    key: str
    in_features: int
    out_features: int
    bias: bool = False

    @property
    def numel(self) -> int:
        """Weights, unpadded and without bias."""
        return self.in_features * self.out_features


@dataclass(frozen=True)
class Group:
    """Stored input channels `start` to `stop` (exclusive) that share their scales and bits."""

    start: int
    stop: int
    bits: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Option:
    """One way to store one matrix: a description a person reads and the parameters the codec reads."""

    desc: str
    qparams: Mapping[str, Any]


@dataclass(frozen=True)
class GgufFamily:
    """What llama.cpp calls a model family, and where its file differs from the checkpoint.

    `rotates_pairs`: its rotary embedding turns neighbouring channels, so the rows of q and k are put
    in that order; `norm_shift` is added to the weights of all norms.
    """

    architecture: str
    rotates_pairs: bool = False
    norm_shift: float = 0.0


@dataclass(frozen=True)
class Allocation:
    """One option per linear.

    `choice` maps a linear's key to the index of its option; `total_bits` is the exact sum of
    stored bits, `loss` the sum of predicted losses, `bound` a proven lower bound of that sum.
    """

    choice: Mapping[str, int]
    total_bits: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How far `loss` may be above the optimum, as a fraction of the optimum."""
        return max(0.0, self.loss - self.bound) / self.bound if self.bound > 0 else 0.0


class Weights(Protocol):
    """Named tensors of a model, read one at a time and never all at once.

    Names are those of the Hugging Face checkpoint (`model.layers.0.mlp.up_proj.weight`).
    """

    def keys(self) -> Collection[str]: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown key."""
        ...

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor in its stored dtype, or only the given rows of its first dimension."""
        ...

    def dtype(self, key: str) -> torch.dtype: ...
