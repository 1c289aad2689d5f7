"""How ExLlamaV2 0.3.2 rounds one matrix: scales by the largest weight, then plain GPTQ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from exlq.errors import HessianError
from exlq.formats import exl2
from exlq.types import Group

DAMPING = 0.12  # of the diagonal's mean
LEAST_DAMPING = 1e-5
ATTEMPTS = 10
CANDIDATES = torch.linspace(0.70, 1.20, 97)  # multipliers of a group's largest scale


class Inverse(NamedTuple):
    """The damped Hessian's inverse, UᵀU, with input channels in order of falling diagonal."""

    perm: Tensor  # (in_features,) int64
    upper: Tensor  # (in_features, in_features) float32, U


class Scales(NamedTuple):
    """Of one group."""

    codes: Tensor  # (out,) in [0, 16)
    q_scale_max: Tensor  # () float16
    scale: Tensor  # (out,) float32, as the kernels rebuild it


class Rounded(NamedTuple):
    """One matrix, rows in processing order."""

    levels: Tensor  # (in_features, out) uint8
    codes: Tensor  # (groups, out)
    q_scale_max: Tensor  # (groups,) float16
    values: Tensor  # (in_features, out) float32, what the levels stand for
    perm: Tensor  # (in_features,) int64

    def tensors(self, groups: Sequence[Group]) -> dict[str, Tensor]:
        """As EXL2 stores them."""
        return exl2.pack_linear(self.levels, self.codes, self.q_scale_max, groups, self.perm)

    def weight(self) -> Tensor:
        """(out, in_features) float32, input channels in the model's order."""
        return self.values[torch.argsort(self.perm)].T.contiguous()


def inverse(hessian: Tensor) -> Inverse:
    """From H, (in_features, in_features) float32: the sum of x xᵀ over tokens by the number of rows.

    Raises:
        HessianError: if ten times the damping do not make it positive definite.
    """
    perm = torch.argsort(hessian.diagonal(), descending=True)
    damped = hessian[perm][:, perm]
    ridge = max(DAMPING * float(damped.diagonal().mean()), LEAST_DAMPING)
    for _ in range(ATTEMPTS):
        damped.diagonal().add_(ridge)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return Inverse(perm, upper)
    raise HessianError(f"not positive definite with {ATTEMPTS * ridge:.3g} on the diagonal")


def quantize(weight: Tensor, factor: Inverse, groups: Sequence[Group]) -> Rounded:
    """Rounds `weight`, (out, in_features), group by group, each one's scales from its compensated weights."""
    left = weight.float().T[factor.perm].contiguous()
    levels, values = torch.empty_like(left, dtype=torch.uint8), torch.empty_like(left)
    found = []
    for group in groups:
        rows = slice(group.start, group.stop)
        found.append(search_scales(left[rows], group.bits))
        errors = _round_group(left, factor.upper, group, found[-1].scale, levels[rows], values[rows])
        left[group.stop :].addmm_(factor.upper[rows, group.stop :].T, errors, alpha=-1)
    codes = torch.stack([scales.codes for scales in found])
    tops = torch.stack([scales.q_scale_max for scales in found])
    return Rounded(levels, codes, tops, values, factor.perm)


def search_scales(weight: Tensor, bits: int) -> Scales:
    """Scales of a group's weights, (rows, out): the codes from the columns' largest, one factor for all."""
    zero = 1 << (bits - 1)
    base = (weight.abs().amax(0) + 1e-12) / ((2 * zero - 1) / 2)
    largest = base.max()
    squares = (16 * (base / largest).sqrt()).round().clamp(1, 16)
    ideal = (squares / 16).square() * largest
    factor = CANDIDATES[torch.stack([_cost(weight, ideal * p, zero) for p in CANDIDATES]).argmin()]
    codes = squares.to(torch.int64) - 1
    q_scale_max = (largest * factor).half()
    multiplier = exl2.group_multiplier(q_scale_max.reshape(1))
    return Scales(codes, q_scale_max, exl2.group_scales(codes.unsqueeze(0), multiplier)[0].float())


def _cost(weight: Tensor, scale: Tensor, zero: int) -> Tensor:
    """The sum of |error|^3.5."""
    error = (weight / scale).round_().clamp_(-zero, zero - 1).mul_(scale).sub_(weight).abs_()
    return error.square().mul_(error).mul_(error.sqrt()).sum()


def _round_group(
    left: Tensor, upper: Tensor, group: Group, scale: Tensor, levels: Tensor, values: Tensor
) -> Tensor:
    """Fills the group's levels and values; its errors by U's diagonal, (rows, out). Modifies `left`."""
    zero = 1 << (group.bits - 1)
    errors = torch.empty_like(values)
    divisor = torch.where(scale > 0, scale, torch.inf)  # a scale below float16's smallest is zero
    for row in range(group.size):
        column = group.start + row
        level = (left[column] / divisor).round_().clamp_(-zero, zero - 1)
        value = (level.half() * scale.half()).float()
        error = (left[column] - value) / upper[column, column]
        left[column : group.stop].addr_(upper[column, column : group.stop], error, alpha=-1)
        levels[row], values[row], errors[row] = level + zero, value, error
    return errors
