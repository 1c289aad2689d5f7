"""The ggml types this program writes, by name: how many weights a block holds, in how many bytes."""

from __future__ import annotations

from typing import NamedTuple

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType


class Block(NamedTuple):
    """Weights and bytes of one block of a type."""

    block_size: int
    type_size: int


FLOATS = ("F32", "F16", "BF16")
QUANTIZED = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
BLOCKS = {name: Block(*GGML_QUANT_SIZES[GGMLQuantizationType[name]]) for name in (*FLOATS, *QUANTIZED)}
