"""The ggml types that store weights as floats, one by one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exlq.errors import FormatError


@dataclass(frozen=True)
class FloatType:
    """One ggml type of floats; a block is one weight."""

    name: str
    ggml_type: int
    type_size: int  # bytes of a weight
    dtype: torch.dtype
    block_size: int = 1

    def pack(self, values: Tensor) -> Tensor:
        """(rows, row_bytes) uint8 from (rows, in_features), rounded to nearest even.

        Raises:
            FormatError: if a weight is not finite, or too large for the type.
        """
        stored = values.to(self.dtype).contiguous()
        if not stored.isfinite().all():
            bad = (~stored.isfinite()).sum()
            raise FormatError(f"{bad} of {stored.numel()} weights are not finite in {self.name}")
        return stored.view(torch.uint8)

    def unpack(self, blocks: Tensor) -> Tensor:
        """(rows, in_features) float32 from (rows, row_bytes) uint8.

        Raises:
            FormatError: if `blocks` is not uint8 with rows of whole weights.
        """
        if blocks.dtype != torch.uint8 or blocks.shape[-1] % self.type_size:
            raise FormatError(
                f"{self.name} weights are {self.type_size} bytes each, found rows of {blocks.shape[-1]} "
                f"{blocks.dtype}; read them as the type they were stored in"
            )
        aligned = blocks.clone(memory_format=torch.contiguous_format)
        return aligned.view(self.dtype).float()


F32 = FloatType("F32", 0, 4, torch.float32)
F16 = FloatType("F16", 1, 2, torch.float16)
BF16 = FloatType("BF16", 30, 2, torch.bfloat16)
