"""The seam between the pipeline and a format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeVar

from torch import Tensor

from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Grid, Rounded
from exlq.types import LinearSpec, Option

G = TypeVar("G", bound=Grid)
Role = Literal["linear", "head", "tied head", "embedding"]


class Codec(Protocol[G]):
    """How one format stores one matrix.

    For every option of every matrix: `unpack(pack(...))` equals the values the sweep left, bit for
    bit, and the tensors of `pack` hold exactly `storage_bits` bits.
    """

    name: str
    shares_scales: bool  # whether something of a matrix's scales belongs to all its output rows
    ties: bool  # whether linears that share one tensor in the checkpoint do so in the file

    def options(self, spec: LinearSpec) -> tuple[Option, ...]:
        """What the matrix may be stored as, fewest bits first; FormatError if nothing fits its shape."""
        ...

    def measured(self, spec: LinearSpec, role: Role) -> tuple[Option, ...]:
        """What a matrix of that role may be stored as; empty where the format does not quantize such."""
        ...

    def head_option(self, spec: LinearSpec, head_bits: int) -> Option:
        """The way a head of nominally so many bits is stored."""
        ...

    def storage_bits(self, spec: LinearSpec, option: Option) -> int:
        """Bits of the stored tensors, padding counted, bias apart."""
        ...

    def sorts_channels(self, spec: LinearSpec) -> bool:
        """Whether this matrix may be stored, and so be rounded, with its input channels in another order."""
        ...

    def grid(
        self, spec: LinearSpec, options: Sequence[Option], factor: Factor, weight: Tensor, leader: G | None
    ) -> G:
        """A grid for some output rows of the matrix, for each option in turn.

        Args:
            weight: (in_features, rows) float32 in processing order: what is about to be rounded.
            leader: the finished grid of other rows of the same matrix and options: what belongs to all
                rows is taken from it.
        """
        ...

    def refined(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        grid: G,
        factor: Factor,
        weight: Tensor,
        rounded: Rounded,
    ) -> tuple[G, Rounded]:
        """What a sweep of `weight` left, improved as the format's scales allow; as it is, if not at all."""
        ...

    def levels(self, spec: LinearSpec, option: Option, grid: G, values: Tensor) -> Tensor:
        """(in_features, rows) levels of `values`, (in_features, rows), left by a one-option sweep."""
        ...

    def pack(
        self,
        spec: LinearSpec,
        option: Option,
        levels: Tensor,
        parts: Sequence[tuple[Tensor, G]],
        perm: Tensor,
    ) -> dict[str, Tensor]:
        """The stored tensors of one matrix.

        Args:
            levels: (in_features, out_features), from `levels`, in processing order.
            parts: the output rows, (n,) int64, and the finished one-option grid of each part swept.
            perm: (in_features,) input channel of each position in processing order.
        """
        ...

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, option: Option) -> Tensor:
        """(out_features, in_features) float32 as a reader of the format computes it."""
        ...
