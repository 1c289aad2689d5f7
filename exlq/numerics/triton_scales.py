"""The search for EXL2's scales in three launches on a GPU; `exlq.numerics.scales` says what it does."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from exlq.numerics.triton_grid import EXACT, ROWS, on_device_of, rounded

PROBES, CANDIDATES = 8, 8  # powers of two, as Triton wants; of the probes the last is left out
MANY_ROWS = 256  # of all rows, that one program goes through
NEVER = tl.constexpr(3e38)  # the error of what is not to be chosen


def probe(
    weights: Tensor, importance: Tensor, half: Tensor, bottom: Tensor, top: float
) -> tuple[Tensor, ...]:
    """Weighted errors (8, groups, out) at seven scales, what these are multiples of, the best (groups, out).

    Args:
        weights: (size, groups, out); importance: (size,).
        half: (groups, 1), minus the lowest level; bottom: (groups, 1), the logarithm of the least multiple.
        top: the logarithm of the largest multiple.
    """
    size, groups, out = weights.shape
    errors = weights.new_empty(PROBES, groups, out)
    base, best = torch.empty_like(errors[0]), torch.empty_like(errors[0])
    launch = probe_kernel[(triton.cdiv(out, ROWS), groups)]
    arrays = (weights, importance, half, bottom, errors, base, best)
    with on_device_of(weights):
        launch(*arrays, top, size, groups, out, PROBES=PROBES, ROWS=ROWS, **EXACT)
    return errors, base, best


def best_multiplier(
    errors: Tensor, base: Tensor, best: Tensor, bottom: Tensor, spread: Tensor, top: float, smallest: float
) -> Tensor:
    """(groups,) float16, that of the `spread` (8,) of candidates which leaves all rows the least error."""
    groups, out = base.shape
    found = torch.empty(groups, dtype=torch.float16, device=base.device)
    arrays = (errors, base, best, bottom, spread, found)
    sizes = {"CANDIDATES": CANDIDATES, "ROWS": MANY_ROWS, "num_warps": 4}
    with on_device_of(base):
        multiplier_kernel[(groups,)](*arrays, top, smallest, groups, out, **(EXACT | sizes))
    return found


def best_codes(weights: Tensor, importance: Tensor, half: Tensor, multiplier: Tensor, best: Tensor) -> Tensor:
    """(groups, out) uint8, the best of three codes about that of the `best` scale, by the exact error."""
    size, groups, out = weights.shape
    codes = torch.empty(groups, out, dtype=torch.uint8, device=weights.device)
    launch = code_kernel[(triton.cdiv(out, ROWS), groups)]
    arrays = (weights, importance, half, multiplier, best, codes)
    with on_device_of(weights):
        launch(*arrays, size, groups, out, CODES=4, ROWS=ROWS, **EXACT)
    return codes


def _errors(
    scales: tl.tensor,
    weights: tl.tensor,
    importance: tl.tensor,
    stride: tl.tensor,
    size: tl.tensor,
    real: tl.tensor,
    half: tl.tensor,
) -> tl.tensor:
    """Weighted squared errors of plain rounding at `scales`, (n, rows), of the columns at `weights`."""
    total = tl.zeros_like(scales)
    inverse = 1.0 / scales
    for channel in range(size):
        weight = tl.load(weights + channel * stride, mask=real, other=0.0)[None, :]
        level = rounded(tl.minimum(tl.maximum(weight * inverse, -half), half - 1))
        error = level * scales - weight
        total += tl.load(importance + channel) * error * error
    return total


def _row_of(table: tl.tensor, index: tl.tensor, wanted: tl.tensor) -> tl.tensor:
    """`table`[wanted[row], row] of (n, rows), `index` being 0 to n - 1 as (n, 1)."""
    return tl.sum(tl.where(index == wanted[None, :], table, 0.0), 0)


def _probe_kernel(
    weights: tl.tensor,
    importance: tl.tensor,
    half: tl.tensor,
    bottom: tl.tensor,
    errors: tl.tensor,
    base: tl.tensor,
    best: tl.tensor,
    top: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    out: tl.tensor,
    PROBES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    real = row < out
    place = group * out + row
    reach, least = tl.load(half + group), tl.load(bottom + group)
    largest = tl.zeros((ROWS,), tl.float32)
    for channel in range(size):
        weight = tl.load(weights + channel * groups * out + place, mask=real, other=0.0)
        largest = tl.maximum(largest, tl.abs(weight))
    unit = tl.maximum(largest, 1e-12) / (reach - 0.5)
    step = (top - least) / (PROBES - 2)
    index = tl.arange(0, PROBES)[:, None]
    scales = unit[None, :] * tl.exp(least + index * step)
    found = errors_at(scales, weights + place, importance, groups * out, size, real, reach)
    lowest = tl.argmin(tl.where(index == PROBES - 1, NEVER, found), 0)
    middle = tl.minimum(tl.maximum(lowest, 1), PROBES - 3)
    before, here, after = (
        row_of(found, index, middle - 1),
        row_of(found, index, middle),
        row_of(found, index, middle + 1),
    )
    bend = tl.maximum(before - 2 * here + after, 1e-30)
    moved = tl.minimum(tl.maximum((before - after) / (2 * bend), -1.0), 1.0)
    tl.store(best + place, unit * tl.exp(least + step * (middle + moved)), mask=real)
    tl.store(base + place, unit, mask=real)
    tl.store(errors + index * groups * out + place[None, :], found, mask=real[None, :])


def _error_at(
    scale: tl.tensor,
    unit: tl.tensor,
    errors: tl.tensor,
    stride: tl.tensor,
    place: tl.tensor,
    real: tl.tensor,
    least: tl.tensor,
    step: tl.tensor,
) -> tl.tensor:
    """The error at other scales, interpolated between the probes; grown linearly beyond their ends."""
    position = (tl.log(scale / unit) - least) / step
    inside = tl.minimum(tl.maximum(position, 0.0), 6.0)
    below = tl.minimum(inside.to(tl.int32), 5)
    low = tl.load(errors + below * stride + place, mask=real, other=0.0)
    high = tl.load(errors + (below + 1) * stride + place, mask=real, other=0.0)
    between = low + (high - low) * (inside - below)
    return between * (1 + 4 * step * tl.abs(position - inside))


def _multiplier_kernel(
    errors: tl.tensor,
    base: tl.tensor,
    best: tl.tensor,
    bottom: tl.tensor,
    spread: tl.tensor,
    multiplier: tl.tensor,
    top: tl.tensor,
    smallest: tl.tensor,
    groups: tl.tensor,
    out: tl.tensor,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """One group, all of its rows, so many at a time."""
    group, lanes, index = tl.program_id(0), tl.arange(0, ROWS), tl.arange(0, CANDIDATES)
    least = tl.load(bottom + group)
    step = (top - least) / 6
    largest = tl.zeros((ROWS,), tl.float32)
    for start in range(0, out, ROWS):
        held = tl.load(best + group * out + start + lanes, mask=start + lanes < out, other=0.0)
        largest = tl.maximum(largest, held)
    wanted = tl.max(largest, 0) / 256 * tl.load(spread + index)
    candidates = tl.minimum(tl.maximum(wanted, smallest), 255.0).to(tl.float16)
    unit_scale = candidates.to(tl.float32)[:, None]
    total = tl.zeros((CANDIDATES, ROWS), tl.float32)
    for start in range(0, out, ROWS):
        row = start + lanes
        real = (row < out)[None, :]
        place = (group * out + row)[None, :]
        unit = tl.load(base + place, mask=real, other=1.0)
        root = tl.sqrt(tl.load(best + place, mask=real, other=1.0) / unit_scale)
        below = tl.minimum(tl.maximum(tl.floor(root), 1.0), 16.0)
        above = tl.minimum(tl.maximum(tl.ceil(root), 1.0), 16.0)
        real = real & (index >= 0)[:, None]
        one = error_at(below * below * unit_scale, unit, errors, groups * out, place, real, least, step)
        other = error_at(above * above * unit_scale, unit, errors, groups * out, place, real, least, step)
        total += tl.minimum(one, other)
    chosen = tl.argmin(tl.sum(total, 1), 0)
    tl.store(multiplier + group, tl.sum(tl.where(index == chosen, candidates.to(tl.float32), 0.0), 0))


def _code_kernel(
    weights: tl.tensor,
    importance: tl.tensor,
    half: tl.tensor,
    multiplier: tl.tensor,
    best: tl.tensor,
    codes: tl.tensor,
    size: tl.tensor,
    groups: tl.tensor,
    out: tl.tensor,
    CODES: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    row, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    real = row < out
    place = group * out + row
    step = tl.load(multiplier + group).to(tl.float32)
    index = tl.arange(0, CODES)[:, None]
    nearest = rounded(tl.sqrt(tl.load(best + place, mask=real, other=1.0) / step))[None, :]
    moved = tl.where(index == 0, 0.0, tl.where(index == 1, -1.0, 1.0))  # the first of equals is kept
    root = tl.minimum(tl.maximum(nearest + moved, 1.0), 16.0)
    scales = (root * root * step).to(tl.float16).to(tl.float32)
    reach = tl.load(half + group)
    found = errors_at(scales, weights + place, importance, groups * out, size, real, reach)
    chosen = tl.argmin(tl.where(index == CODES - 1, NEVER, found), 0)
    tl.store(codes + place, (row_of(root, index, chosen) - 1).to(tl.uint8), mask=real)


errors_at = triton.jit(_errors)
row_of = triton.jit(_row_of)
error_at = triton.jit(_error_at)
probe_kernel = triton.jit(_probe_kernel)
multiplier_kernel = triton.jit(_multiplier_kernel)
code_kernel = triton.jit(_code_kernel)
