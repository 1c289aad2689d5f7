"""The types whose level is an index into sixteen fixed values, denser around zero."""

from __future__ import annotations

from exlq.formats.gguf_blocks.block import BlockType, Integers
from exlq.formats.gguf_blocks.layout import LEVELS, SUB, Half, Plane

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

IQ4_NL = BlockType(
    "IQ4_NL",
    ggml_type=20,
    block_size=32,
    type_size=2 + 16,
    levels=Integers(0, 15),
    table=VALUES,
    parts=(Half("d"), Plane(LEVELS, count=32, bits=4, width=16)),
)
IQ4_XS = BlockType(
    "IQ4_XS",
    ggml_type=23,
    block_size=256,
    type_size=2 + 2 + 4 + 128,
    levels=Integers(0, 15),
    table=VALUES,
    sub_block=32,
    scales=Integers(-32, 31, bias=32),
    parts=(
        Half("d"),
        Plane(SUB, count=8, bits=2, width=1, lowest=4),  # one word of 16 bits, shift 2·b
        Plane(SUB, count=8, bits=4, width=1),  # byte b // 2, low nibble where b is even
        Plane(LEVELS, count=256, bits=4, width=16),  # byte 16·(i // 32) + i % 16
    ),
)
