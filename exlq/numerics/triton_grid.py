"""What Triton's kernels have in common: rounding to the nearest stored value."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAGIC = tl.constexpr(
    1.5 * 2**23
)  # added and taken away it leaves a float32 below 2²² rounded, halves to even
EXACT: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}  # a product is rounded before a sum
ROWS = 32  # of a program: one to a lane, so that sums over columns stay in it


def on_device_of(x: Tensor) -> AbstractContextManager[None]:
    """Inside, kernels are launched on the GPU that has `x`, whichever is the present one."""
    found: AbstractContextManager[None] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
    return found


def _rounded(x: tl.tensor) -> tl.tensor:
    """The nearest integers, halves to even, of float32 below 2²²."""
    return (x + MAGIC) - MAGIC


def _nearest(
    aim: tl.tensor,
    step: tl.tensor,
    shift: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    table: tl.tensor,
    FLOAT16: tl.constexpr,
) -> tl.tensor:
    """The values step · level - shift nearest to `aim`, or float16(step · level) without shift.

    Levels are integers from `low` to `high`, or where `low` is above `high` the sixteen at `table`.
    """
    wanted = tl.div_rn(aim + shift, tl.where(step == 0, 1.0, step))
    level = rounded(tl.minimum(tl.maximum(wanted, low), high))
    if FLOAT16:
        value = (level * step).to(tl.float16).to(tl.float32)
    else:
        if low > high:
            level = tl.zeros_like(wanted) + tl.load(table)
            for index in range(1, 16):
                below, above = tl.load(table + index - 1), tl.load(table + index)
                level = tl.where(wanted > (below + above) * 0.5, above, level)
        value = step * level - shift
    return value


rounded = triton.jit(_rounded)
nearest = triton.jit(_nearest)
