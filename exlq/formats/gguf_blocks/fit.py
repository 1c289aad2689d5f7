"""Rounding of a matrix to blocks of one type, with scales that leave little weighted error."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf_blocks.block import BlockType, Fields
from exlq.formats.gguf_blocks.searches import BEST, FAST
from exlq.numerics.block_scales import BlockFit, Blocks, Search, fit_blocks
from exlq.numerics.threads import one_thread

LARGEST_HALF = 65504.0
SMALLEST_NORMAL_HALF = 2.0**-14
TOLERATED_LOSS = 1.25  # squared error, over that of the same weights with all the range of a float32 step
SAMPLED_ROWS = 512


def fit(kind: BlockType, weight: Tensor, importance: Tensor | None = None, *, search: str = "fast") -> Fields:
    """Fields of `kind` with little Σ importance · (weight - value)², levels by plain rounding.

    That error is at most that of zeros. It does not depend on the number of threads.

    Args:
        weight: (rows, in_features), of any floating dtype and on any device.
        importance: (in_features,), zero or more, on any scale; None where all channels count the same.
            A channel of less than a millionth of the mean counts as one of that.
        search: a key of `SEARCHES`. "best" takes several times as long and keeps, block by block, what
            "fast" finds where that is better.

    Raises:
        FormatError: if rows are no whole blocks, a weight is not finite or too large for the type, or the
            importance has another length, a negative or a value that is not finite.
    """
    values, factors = weight.detach().cpu().float(), _checked(importance, weight.shape[-1])
    _check(kind, values)
    found = fit_blocks(values, factors, _blocks(kind), [table[kind.name] for table in SEARCHES[search]])
    return _fields(kind, BlockFit(*(tensor.to(weight.device) for tensor in found)))


def underflows(kind: BlockType, weight: Tensor) -> bool:
    """Whether the weights are so small that `kind` loses much of them because its steps are float16.

    Much is a quarter more squared error than for the same weights in a larger unit. Judged on at most
    `SAMPLED_ROWS` rows, evenly spread.

    Raises:
        FormatError: as `fit` does.
    """
    _check(kind, weight)
    rows = weight[:: -(-len(weight) // SAMPLED_ROWS)].cpu().double() if len(weight) else weight.double()
    blocks = torch.unflatten(rows, -1, (-1, kind.block_size))
    steps = blocks.abs().amax(-1) / _reach(kind)
    if not ((steps > 0) & (steps < SMALLEST_NORMAL_HALF)).any():
        return False
    power = torch.floor(torch.log2(1.0 / rows.abs().amax().clamp_min(1e-300)))
    larger = rows * 2.0**power
    return bool(_error(kind, rows) * 4.0**power > TOLERATED_LOSS * _error(kind, larger))


def _error(kind: BlockType, weight: Tensor) -> Tensor:
    return (kind.values(fit(kind, weight)).double() - weight).square().sum()


def _reach(kind: BlockType) -> float:
    """The largest magnitude of either sign that a block with a step of one can hold."""
    numbers = kind.table or (kind.levels.low, kind.levels.high)
    if "offset" in kind.halves:
        return float(numbers[-1])
    if kind.mins is not None:
        return float(kind.mins.high)
    return min(-numbers[0], numbers[-1]) * (kind.scales.high if kind.scales else 1.0)


def _check(kind: BlockType, weight: Tensor) -> None:
    if weight.ndim != 2 or weight.shape[-1] % kind.block_size:
        raise FormatError(
            f"{kind.name} needs rows of whole blocks of {kind.block_size} weights, found shape "
            f"{tuple(weight.shape)}; store it as another type"
        )
    if not weight.numel():
        return
    with one_thread():
        largest = weight.abs().amax().item()  # not finite where any is not
    if not math.isfinite(largest):
        raise FormatError(
            f"{(~weight.isfinite()).sum()} of {weight.numel()} weights are not finite; "
            "quantize an intact checkpoint"
        )
    limit = LARGEST_HALF * (1.0 if "offset" in kind.halves else _reach(kind))
    if largest > limit:
        raise FormatError(
            f"{kind.name} holds weights up to {limit:.3g}, found {largest:.3g}; store it as another type"
        )


def _checked(importance: Tensor | None, in_features: int) -> Tensor | None:
    """The importance on the CPU, or None where it is zero everywhere."""
    if importance is None:
        return None
    if importance.shape != (in_features,):
        raise FormatError(f"importance has shape {tuple(importance.shape)}, want ({in_features},)")
    factors = importance.detach().cpu().double()
    wrong = ~(factors.isfinite() & (factors >= 0))
    if wrong.any():
        raise FormatError(f"{wrong.sum()} of {in_features} importances are negative or not finite")
    return factors if factors.any() else None


def _blocks(kind: BlockType) -> Blocks:
    offset = "offset" in kind.halves
    mins = None if kind.mins is None else (kind.mins.low, kind.mins.high)
    return Blocks(
        size=kind.block_size,
        sub_block=kind.sub_block or kind.block_size,
        low=kind.levels.low,
        high=kind.levels.high,
        scales=(kind.scales.low, kind.scales.high) if kind.scales else (1, 1),
        mins=(1, 1) if offset else mins,
        signed=offset,
        table=kind.table or (),
    )


def _fields(kind: BlockType, found: BlockFit) -> Fields:
    return Fields(
        levels=found.levels,
        d=found.steps,
        dmin=found.bases if "dmin" in kind.halves else None,
        offset=-found.bases if "offset" in kind.halves else None,
        scales=found.scales if kind.scales else None,
        mins=found.mins if kind.mins else None,
    )


SEARCHES: dict[str, Sequence[Mapping[str, Search]]] = {
    "fast": (FAST,),
    "best": (FAST, BEST),
}
