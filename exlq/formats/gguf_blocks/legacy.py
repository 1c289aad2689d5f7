"""The types of 32 weights under one float16 step: d·q, or d·q + offset.

Byte w of the four-bit plane holds weight w in its low and weight w + 16 in its high nibble; the fifth bits
are one little-endian word of 32 bits.
"""

from __future__ import annotations

from exlq.formats.gguf_blocks.block import BlockType, Integers
from exlq.formats.gguf_blocks.layout import LEVELS, Half, Plane

NIBBLES = Plane(LEVELS, count=32, bits=4, width=16)
FIFTH_BITS = Plane(LEVELS, count=32, bits=1, width=1, lowest=4)
BYTES = Plane(LEVELS, count=32, bits=8, width=1)

Q4_0 = BlockType(
    "Q4_0",
    ggml_type=2,
    block_size=32,
    type_size=2 + 16,
    levels=Integers(-8, 7, bias=8),
    parts=(Half("d"), NIBBLES),
)
Q4_1 = BlockType(
    "Q4_1",
    ggml_type=3,
    block_size=32,
    type_size=2 + 2 + 16,
    levels=Integers(0, 15),
    parts=(Half("d"), Half("offset"), NIBBLES),
)
Q5_0 = BlockType(
    "Q5_0",
    ggml_type=6,
    block_size=32,
    type_size=2 + 4 + 16,
    levels=Integers(-16, 15, bias=16),
    parts=(Half("d"), FIFTH_BITS, NIBBLES),
)
Q5_1 = BlockType(
    "Q5_1",
    ggml_type=7,
    block_size=32,
    type_size=2 + 2 + 4 + 16,
    levels=Integers(0, 31),
    parts=(Half("d"), Half("offset"), FIFTH_BITS, NIBBLES),
)
Q8_0 = BlockType(
    "Q8_0",
    ggml_type=8,
    block_size=32,
    type_size=2 + 32,
    levels=Integers(-128, 127),
    parts=(Half("d"), BYTES),
)
