"""EXL2 as a codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats import exl2
from exlq.formats.codec import Role
from exlq.formats.exl2_descent import descended
from exlq.formats.exl2_grid import Exl2Grid, levels_of
from exlq.formats.exl2_options import HEAD_OPTIONS, OPTIONS, groups_of
from exlq.numerics.hessian import Factor
from exlq.numerics.rounding import Rounded
from exlq.types import LinearSpec, Option

LARGEST = 32752.0  # half of what float16 holds: the outermost levels reach beyond the weights


class Exl2Codec:
    """Mixed widths inside a matrix, its input channels sorted by importance."""

    name = "exl2"
    shares_scales = True
    ties = False

    def options(self, spec: LinearSpec) -> tuple[Option, ...]:
        if spec.in_features % 32:
            raise FormatError(
                f"{spec.key} has {spec.in_features} input features, EXL2 needs a multiple of 32"
            )
        if spec.in_features > 65535:
            raise FormatError(f"{spec.key} has {spec.in_features} input features, EXL2 can address 65535")
        return OPTIONS

    def measured(self, spec: LinearSpec, role: Role) -> tuple[Option, ...]:
        options = self.options(spec)  # refuses shapes
        heads = tuple(HEAD_OPTIONS.values())
        return {"linear": options, "head": heads, "tied head": heads, "embedding": ()}[role]

    def head_option(self, spec: LinearSpec, head_bits: int) -> Option:
        """The way a head of nominally so many bits is stored."""
        return HEAD_OPTIONS[head_bits]

    def storage_bits(self, spec: LinearSpec, option: Option) -> int:
        return exl2.storage_bits(groups_of(option.qparams, spec.in_features), spec.out_features)

    def sorts_channels(self, spec: LinearSpec) -> bool:
        # ExLlamaV2 applies down_proj's order to the outputs of gate and up, but not to their biases.
        return not (spec.bias and spec.key.endswith("mlp.down_proj"))

    def grid(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        factor: Factor,
        weight: Tensor,
        leader: Exl2Grid | None,
    ) -> Exl2Grid:
        largest = max(map(abs, map(float, torch.aminmax(weight))))
        if not largest <= LARGEST:
            raise ModelError(
                f"{spec.key} has weights up to {largest:.6g}, EXL2 computes in float16 and has room up to "
                f"{LARGEST:.0f}: make GGUF (--format gguf)"
            )
        layouts = [groups_of(option.qparams, spec.in_features) for option in options]
        return Exl2Grid(layouts, factor.pivots, weight.shape[1], leader)

    def refined(
        self,
        spec: LinearSpec,
        options: Sequence[Option],
        grid: Exl2Grid,
        factor: Factor,
        weight: Tensor,
        rounded: Rounded,
    ) -> tuple[Exl2Grid, Rounded]:
        if factor.curvature is None:
            return grid, rounded
        layouts = [groups_of(option.qparams, spec.in_features) for option in options]
        return descended(layouts, grid, factor, weight, rounded)

    def levels(self, spec: LinearSpec, option: Option, grid: Exl2Grid, values: Tensor) -> Tensor:
        groups = groups_of(option.qparams, spec.in_features)
        return levels_of(values, grid.codes[0], grid.multipliers[0], groups)

    def pack(
        self,
        spec: LinearSpec,
        option: Option,
        levels: Tensor,
        parts: Sequence[tuple[Tensor, Exl2Grid]],
        perm: Tensor,
    ) -> dict[str, Tensor]:
        groups = groups_of(option.qparams, spec.in_features)
        codes = torch.empty(len(groups), spec.out_features, dtype=torch.uint8, device=levels.device)
        for rows, grid in parts:
            codes[:, rows] = grid.codes[0]
        q_scale_max = (parts[0][1].multipliers[0].float() * 256).half()  # exact, and finite up to 255
        packed = exl2.pack_linear(levels, codes, q_scale_max, groups, perm)
        return {name: tensor.cpu() for name, tensor in packed.items()}

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec, option: Option) -> Tensor:
        return exl2.dequantize_linear(tensors)[: spec.out_features].float()
