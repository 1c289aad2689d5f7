"""The scales of GGUF blocks as `exlq.numerics.descent` moves them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from exlq.formats.gguf_blocks.block import BlockType, Fields, Integers
from exlq.numerics.descent import Lattice

INTEGER_MOVES = (0, -1, 1)
STEP_MOVES = (0.0, -0.5, 0.5, -0.1, 0.1)  # how far the end of the range goes, in levels
OFFSET_MOVES = (0.0, -0.25, 0.25)  # in steps


class BlockMoves:
    """The scales of some rows of one type's blocks, (runs or blocks, rows) each."""

    def __init__(self, kind: BlockType, fields: Fields) -> None:
        self._kind, self._given = kind, fields
        run = kind.sub_block or kind.block_size
        self._runs_per_block = kind.block_size // run
        self._reach = max(map(abs, kind.table or (kind.levels.low, kind.levels.high)))
        self._d = fields.d.T.float().contiguous()
        offset = None if fields.offset is None else -fields.offset
        self._base = _rows_last(fields.dmin if offset is None else offset)
        self._scales, self._mins = _rows_last(fields.scales), _rows_last(fields.mins)
        self._offered = (self._d[:1], self._d[:1])  # (candidates, rows) of what `take` then makes real

    def candidates(self, index: int) -> Lattice:
        block = index // self._runs_per_block
        d = self._d[block]
        base = torch.zeros_like(d) if self._base is None else self._base[block]
        if self._scales is None or self._kind.scales is None:
            self._offered = _moved_floats(d, base, self._reach, self._base is not None)
            return self._lattice(*self._offered)
        scales = _moved(self._scales[index], self._kind.scales)
        mins = torch.ones(1, len(d), device=d.device)
        if self._mins is not None and self._kind.mins is not None:
            mins = _moved(self._mins[index], self._kind.mins)
        self._offered = _pairs(scales, mins)
        return self._lattice(d * self._offered[0], base * self._offered[1])

    def take(self, index: int, picked: Tensor) -> None:
        step, offset = (held.gather(0, picked.unsqueeze(0))[0] for held in self._offered)
        held = (self._d, self._base) if self._scales is None else (self._scales, self._mins)
        for stored, changed in zip(held, (step, offset), strict=True):
            if stored is not None:
                stored[index] = changed

    def fields(self) -> Fields:
        """What the rows' blocks now store; the levels are those given."""
        changed: dict[str, Tensor] = {}
        if self._scales is None:
            changed["d"] = self._d.half()
            if self._base is not None:
                changed["offset"] = -self._base.half()
        else:
            changed["scales"] = self._scales.to(torch.int8)
            if self._mins is not None:
                changed["mins"] = self._mins.to(torch.int8)
        return replace(self._given, **{name: held.T.contiguous() for name, held in changed.items()})

    def _lattice(self, step: Tensor, offset: Tensor) -> Lattice:
        levels = self._kind.levels
        return Lattice(step, offset, levels.low, levels.high, self._kind.table)


def _rows_last(stored: Tensor | None) -> Tensor | None:
    return None if stored is None else stored.T.float().contiguous()


def _moved(integers: Tensor, ends: Integers) -> Tensor:
    """(moves, rows) integers near (rows,) present ones, these first."""
    moves = torch.tensor(INTEGER_MOVES, dtype=torch.float32, device=integers.device)
    return (integers + moves[:, None]).clamp(ends.low, ends.high)


def _moved_floats(step: Tensor, offset: Tensor, reach: int, has_offset: bool) -> tuple[Tensor, Tensor]:
    """float16 steps and offsets near present ones, (rows,), these first."""
    moves = torch.tensor(STEP_MOVES, device=step.device)[:, None] / reach
    steps = (step * (1 + moves)).half().float()
    shifts = torch.tensor(OFFSET_MOVES if has_offset else (0.0,), device=step.device)[:, None]
    return _pairs(steps, (offset + shifts * step).half().float())


def _pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Every row of (m, rows) with every row of (n, rows), the first ones first."""
    m, n = len(first), len(second)
    return first.repeat_interleave(n, 0), second.repeat(m, 1)
