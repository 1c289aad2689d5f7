"""Channels inside the MLPs and attention heads in another order: the same function, better blocks.

Formats with fixed blocks give neighbouring input channels of a linear one scale. Whatever order the rows
of gate_proj and up_proj are in, as long as the columns of down_proj follow, the MLP computes the same;
so does attention with the channels of a head reordered in v_proj and, for all query heads that share
it, in o_proj. So these channels may choose their neighbours.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from exlq.models.canonical import CanonicalWeights
from exlq.models.layout import HEAD_KEY, Layout, Linear
from exlq.types import LinearSpec, Weights

BLOCK = 16  # channels that share a scale in the smallest sub-blocks; larger ones are made of these
BLOCKS_AT_ONCE = 512  # filled together; the time of an assignment grows with the cube
ROWS_AT_ONCE = 1024  # in float64
TINY = 1e-30
OUT_OF_ATTENTION, INTO, OUT_OF = "attn_out", "_in", "_out"  # input keys of stages, and ends of them
VALUES = ".v_proj"


@dataclass(frozen=True)
class _Between:
    """Channels that are the rows of the linears `into` and the columns of `out`.

    They change places within `heads` equal parts of the rows; `shared` parts of the columns in
    succession belong to each.
    """

    into: tuple[str, ...]
    out: str
    heads: int
    shared: int


class PermutedWeights:
    """`Weights` under canonical names with the channels inside MLPs and attention heads reordered.

    The order follows from the weights alone. It is found at the first read of a linear it concerns and
    kept. Where head and embedding are one tensor, only the embedding's name is there.

    Args:
        weights: as stored.
        kv_heads: heads of every v_proj.

    Raises:
        ModelError: as `CanonicalWeights`.
    """

    def __init__(self, weights: Weights, layout: Layout, kv_heads: int) -> None:
        self._weights = CanonicalWeights(weights, layout)
        places = [each for linears in layout.blocks for each in _reordered(linears, kv_heads)]
        kinds = ("weight", "bias")
        self._rows = {f"{key}.{kind}": each for each in places for key in each.into for kind in kinds}
        self._columns = {f"{each.out}.weight": each for each in places}
        self._orders: dict[str, tuple[Tensor, Tensor]] = {}

    def keys(self) -> Collection[str]:
        names = self._weights.keys()
        return [name for name in names if name != f"{HEAD_KEY}.weight"] if self._weights.tied else names

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown key."""
        return self._weights.shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._weights.dtype(key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor in its stored dtype, or only the given rows of its first dimension."""
        if key in self._rows:
            order, _ = self._order(self._rows[key])
            return self._weights.read(key, order if rows is None else order[_on_cpu(rows)])
        if key in self._columns:
            _, order = self._order(self._columns[key])
            return self._weights.read(key, rows)[:, order]
        return self._weights.read(key, rows)

    def _order(self, between: _Between) -> tuple[Tensor, Tensor]:
        """The stored row, and the stored column, at each place: int64."""
        if between.out not in self._orders:
            gains = [_root_mean_square(self._weights.read(f"{key}.weight")) for key in between.into]
            sizes = torch.stack(gains).prod(0)
            self._orders[between.out] = _orders(between, sizes, self._weights.read(f"{between.out}.weight"))
        return self._orders[between.out]


def _orders(between: _Between, sizes: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Orders of the rows, whose `sizes` are given, and of the columns of `weight`."""
    by_head = weight.reshape(len(weight), between.heads, between.shared, -1)  # (out, heads, shared, channels)
    n = by_head.shape[-1]
    rows, columns = [], []
    for head, size in enumerate(sizes.view(between.heads, n)):
        order = channel_order(by_head[:, head].flatten(0, 1), size)
        rows.append(order + head * n)
        columns += [order + (head * between.shared + each) * n for each in range(between.shared)]
    return torch.cat(rows), torch.cat(columns)


def channel_order(weight: Tensor, size: Tensor) -> Tensor:
    """An order of the columns of a matrix in which runs of 16 suit one scale per row.

    Columns of a run have their large weights in the same rows, so that a scale suits all of them;
    their `size` differs as much as can be, so that the weights that count most are not all rounded
    by the same scale. The columns are cut into 16 tiers by falling size, and every run takes one of
    each tier: tier by tier the assignment with the greatest sum of likenesses, a likeness being the
    product of squared weights, scaled to length 1 per column, with the run's sum so far.

    Args:
        weight: (rows, columns) of any float dtype.
        size: (columns,) about how large the input of each column is.

    Returns:
        (columns,) int64. Columns beyond a multiple of 16 come last, those of least size.
    """
    falling = torch.argsort(size.cpu().nan_to_num(), descending=True, stable=True)
    n_blocks = len(falling) // BLOCK
    if n_blocks < 2:
        return torch.arange(len(falling))
    dealt, rest = falling[: n_blocks * BLOCK], falling[n_blocks * BLOCK :]
    tiers = dealt.view(BLOCK, n_blocks)
    n_parts = -(-n_blocks // BLOCKS_AT_ONCE)
    parts = [_runs(weight, tiers[:, part::n_parts]) for part in range(n_parts)]
    return torch.cat([*parts, rest])


def _runs(weight: Tensor, tiers: Tensor) -> Tensor:
    """The columns of `tiers`, (16, blocks), in runs of one of each, as (16 · blocks,)."""
    runs = [tiers[0]]
    total = _pattern(weight, tiers[0])
    for tier in tiers[1:]:
        patterns = _pattern(weight, tier)
        _, chosen = linear_sum_assignment((total.T @ patterns).numpy(), maximize=True)
        taken = torch.from_numpy(chosen)
        runs.append(tier[taken])
        total += patterns[:, taken]
    return torch.stack(runs, dim=1).flatten()


def _pattern(weight: Tensor, columns: Tensor) -> Tensor:
    """(rows, columns) squared weights, every column of length 1; float64, so that threads do not matter."""
    squares = weight[:, columns].cpu().double().nan_to_num(0, 0, 0).square()
    return squares.div_(torch.linalg.vector_norm(squares, dim=0).clamp_min_(TINY))


def _root_mean_square(weight: Tensor) -> Tensor:
    """(rows,) float64, of each row."""
    parts = torch.split(weight, ROWS_AT_ONCE)
    return torch.cat([part.cpu().double().square().mean(1).sqrt() for part in parts])


def _on_cpu(rows: slice | Tensor) -> slice | Tensor:
    return rows.cpu() if isinstance(rows, Tensor) else rows


def _reordered(linears: tuple[Linear, ...], kv_heads: int) -> tuple[_Between, ...]:
    """The places of a block at which channels may be reordered."""
    (value,) = (linear.spec for linear in linears if linear.spec.key.endswith(VALUES))
    by_stage: dict[str, list[LinearSpec]] = {}
    for linear in linears:
        by_stage.setdefault(linear.stage, []).append(linear.spec)
    (output,) = by_stage.pop(OUT_OF_ATTENTION)
    mlps = (name.removesuffix(OUT_OF) for name in by_stage if name.endswith(OUT_OF))
    return (
        *(_inside(by_stage[name + INTO], by_stage[name + OUT_OF]) for name in mlps),
        _Between((value.key,), output.key, kv_heads, output.in_features // value.out_features),
    )


def _inside(into: list[LinearSpec], out_of: list[LinearSpec]) -> _Between:
    """Of an MLP or an expert: the rows of its gate and up, the columns of its down."""
    (down,) = out_of
    return _Between(tuple(spec.key for spec in into), down.key, 1, 1)
