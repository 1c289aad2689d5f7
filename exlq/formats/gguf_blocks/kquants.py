"""The super-blocks: 256 weights under a float16 step, with integer sub-scales and, in some, sub-mins.

A weight is d·s·q, or d·s·q − dmin·m. The planes that several types share:

    two bits     byte 32·(i // 128) + i % 32, shift 2·((i % 128) // 32)
    nibbles      byte 32·(i // 64) + i % 32, low nibble where i % 64 < 32
    single bits  byte i % 32, bit i // 32
"""

from __future__ import annotations

from exlq.formats.gguf_blocks.block import BlockType, Integers
from exlq.formats.gguf_blocks.layout import LEVELS, SUB, Half, Plane, SixBitPairs

NIBBLES = Plane(LEVELS, count=256, bits=4, width=32)

Q2_K = BlockType(
    "Q2_K",
    ggml_type=10,
    block_size=256,
    type_size=16 + 64 + 2 + 2,
    levels=Integers(0, 3),
    sub_block=16,
    scales=Integers(0, 15),
    mins=Integers(0, 15),
    parts=(
        Plane(SUB, count=32, bits=4, width=16),  # byte g: m_g in the high nibble, s_g in the low one
        Plane(LEVELS, count=256, bits=2, width=32),
        Half("d"),
        Half("dmin"),
    ),
)
Q3_K = BlockType(
    "Q3_K",
    ggml_type=11,
    block_size=256,
    type_size=32 + 64 + 8 + 4 + 2,
    levels=Integers(-4, 3, bias=4),
    sub_block=16,
    scales=Integers(-32, 31, bias=32),
    parts=(
        Plane(LEVELS, count=256, bits=1, width=32, lowest=2),  # set where q >= 0
        Plane(LEVELS, count=256, bits=2, width=32),
        Plane(SUB, count=16, bits=4, width=8),  # byte g: s_(g+8) in the high nibble, s_g in the low one
        Plane(SUB, count=16, bits=2, width=4, lowest=4),  # byte g % 4, shift 2·(g // 4)
        Half("d"),
    ),
)
Q4_K = BlockType(
    "Q4_K",
    ggml_type=12,
    block_size=256,
    type_size=2 + 2 + 12 + 128,
    levels=Integers(0, 15),
    sub_block=32,
    scales=Integers(0, 63),
    mins=Integers(0, 63),
    parts=(Half("d"), Half("dmin"), SixBitPairs(), NIBBLES),
)
Q5_K = BlockType(
    "Q5_K",
    ggml_type=13,
    block_size=256,
    type_size=2 + 2 + 12 + 32 + 128,
    levels=Integers(0, 31),
    sub_block=32,
    scales=Integers(0, 63),
    mins=Integers(0, 63),
    parts=(
        Half("d"),
        Half("dmin"),
        SixBitPairs(),
        Plane(LEVELS, count=256, bits=1, width=32, lowest=4),
        NIBBLES,
    ),
)
Q6_K = BlockType(
    "Q6_K",
    ggml_type=14,
    block_size=256,
    type_size=128 + 64 + 16 + 2,
    levels=Integers(-32, 31, bias=32),
    sub_block=16,
    scales=Integers(-128, 127),
    parts=(
        Plane(LEVELS, count=256, bits=4, width=64),  # byte 64·(i // 128) + i % 64
        Plane(LEVELS, count=256, bits=2, width=32, lowest=4),
        Plane(SUB, count=16, bits=8, width=1),
        Half("d"),
    ),
)
