"""GGUF blocks as a codec: scales fixed before the sweep, so that columns go in act-order unstored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.codec import Role
from exlq.formats.gguf.recipes import fallback
from exlq.formats.gguf_blocks import BLOCK_TYPES, FLOAT_TYPES, TYPES
from exlq.formats.gguf_blocks.block import BlockType, Fields, StoredType
from exlq.formats.gguf_blocks.fit import fit, underflows
from exlq.formats.gguf_descent import affine, descended
from exlq.numerics.float_grid import FloatGrid
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded
from exlq.numerics.static_grid import Affine, StaticGrid
from exlq.types import LinearSpec, Option

# What is tried, fewest bits first: the types that others of their size do not better on every matrix.
SUPER_BLOCKS = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
UNBLOCKED = ("F16",)

# What `-hb` asks for.
HEAD_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


class GgufCodec:
    """One ggml type for a whole matrix; its stored tensor is `blocks`, (out_features, row_bytes) uint8."""

    name = "gguf"
    shares_scales = False
    ties = True

    def options(self, spec: LinearSpec) -> tuple[Option, ...]:
        if spec.in_features % 256 == 0:
            return tuple(map(type_option, SUPER_BLOCKS))
        return tuple(map(type_option, SMALL_BLOCKS if spec.in_features % 32 == 0 else UNBLOCKED))

    def measured(self, spec: LinearSpec, role: Role) -> tuple[Option, ...]:
        return () if role == "tied head" else self.options(spec)  # the embedding serves as head

    def head_option(self, spec: LinearSpec, head_bits: int) -> Option:
        return type_option(fallback(HEAD_TYPES[head_bits], spec.in_features))

    def storage_bits(self, spec: LinearSpec, option: Option) -> int:
        kind = type_of(option)
        if spec.in_features % kind.block_size:
            raise FormatError(
                f"{spec.key} has {spec.in_features} input features, {kind.name} needs whole blocks of "
                f"{kind.block_size}; choose {fallback(kind.name, spec.in_features)}"
            )
        return 8 * kind.type_size * (spec.numel // kind.block_size)

    def sorts_channels(self, spec: LinearSpec) -> bool:
        return True  # the order is that of processing alone

    def grid(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        factor: Factor,
        weight: Tensor,
        leader: StaticGrid | FloatGrid | None,
    ) -> StaticGrid | FloatGrid:
        names = [type_of(option).name for option in options]
        if names[0] in FLOAT_TYPES:
            return FloatGrid(FLOAT_TYPES[names[0]].dtype, spec.in_features)
        turned = weight[factor.perm.argsort()].T.contiguous()  # (rows, in_features) in the model's order
        # What an error costs lies between H's diagonal, if no other channel answers, and the pivot, if
        # all later ones do.
        importance = (factor.pivots * factor.diagonal()).sqrt()[factor.perm.argsort()]
        search = "best" if factor.curvature is None else "fast"  # a descent follows that finds more
        try:
            return StaticGrid(
                [_fitted(BLOCK_TYPES[name], turned, importance, search) for name in names], factor.perm
            )
        except FormatError as exc:
            raise FormatError(f"{spec.key}: {exc}") from exc

    def refined(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        grid: StaticGrid | FloatGrid,
        factor: Factor,
        weight: Tensor,
        rounded: Rounded,
    ) -> tuple[StaticGrid | FloatGrid, Rounded]:
        if factor.curvature is None or isinstance(grid, FloatGrid):
            return grid, rounded
        kinds = [BLOCK_TYPES[type_of(option).name] for option in options]
        return descended(kinds, grid, factor, weight, rounded)

    def levels(
        self, spec: LinearSpec, option: Option, grid: StaticGrid | FloatGrid, values: Tensor
    ) -> Tensor:
        if isinstance(grid, FloatGrid):
            return values
        lattice = grid.options[0]
        natural = lattice.levels(values[grid.perm.argsort()])
        return natural[grid.perm]

    def pack(
        self,
        spec: LinearSpec,
        option: Option,
        levels: Tensor,
        parts: Sequence[tuple[Tensor, StaticGrid | FloatGrid]],
        perm: Tensor,
    ) -> dict[str, Tensor]:
        natural = levels[perm.argsort()].T.contiguous()  # (out_features, in_features)
        kind = type_of(option)
        if kind.name in FLOAT_TYPES:
            return {"blocks": FLOAT_TYPES[kind.name].pack(natural.cpu())}
        blocks = torch.empty(
            len(natural), kind.type_size * (spec.in_features // kind.block_size), dtype=torch.uint8
        )
        for rows, grid in parts:
            assert isinstance(grid, StaticGrid)
            stored: Fields = replace(grid.options[0].fields, levels=natural[rows].to(torch.int16))
            near: dict[str, Any] = {
                name: held if held is None else held.cpu() for name, held in vars(stored).items()
            }
            blocks[rows.cpu()] = BLOCK_TYPES[kind.name].pack(Fields(**near))
        return {"blocks": blocks}

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, option: Option) -> Tensor:
        return type_of(option).unpack(tensors["blocks"])


def type_option(name: str) -> Option:
    """The option that stores a matrix as the ggml type `name`."""
    return Option(name, {"type": name})


def type_of(option: Option) -> StoredType:
    """The ggml type of an option.

    Raises:
        FormatError: if it is none that is known.
    """
    name = option.qparams.get("type")
    if name not in TYPES:
        raise FormatError(f"{dict(option.qparams)} are no parameters of a GGUF option")
    return TYPES[name]


def holds(name: str, weight: Tensor) -> bool:
    """Whether a type can store the weights, (out_features, in_features), as well as larger ones alike."""
    if name in FLOAT_TYPES:
        return True
    kind = BLOCK_TYPES[name]
    return weight.shape[1] % kind.block_size == 0 and not underflows(kind, weight.float())


def plainly_rounded(
    spec: LinearSpec, option: Option, weight: Tensor, importance: Tensor | None
) -> dict[str, Tensor]:
    """The stored tensors of a matrix rounded weight by weight, without error feedback.

    Args:
        weight: (out_features, in_features) of any float dtype.
        importance: (in_features,) weight of each input channel's squared error; None for all alike.
    """
    kind, weight = type_of(option), weight.float().cpu().contiguous()
    try:
        if kind.name in FLOAT_TYPES:
            return {"blocks": FLOAT_TYPES[kind.name].pack(weight)}
        block_type = BLOCK_TYPES[kind.name]
        rounded = fit(block_type, weight, None if importance is None else importance.cpu(), search="best")
        return {"blocks": block_type.pack(rounded)}
    except FormatError as exc:
        raise FormatError(f"{spec.key}: {exc}") from exc


def _fitted(kind: BlockType, weight: Tensor, importance: Tensor, search: str) -> Affine:
    """The scales of `kind` that suit (rows, in_features) weights best, as grids of the sweep."""
    return affine(kind, fit(kind, weight, importance, search=search), weight.device)
