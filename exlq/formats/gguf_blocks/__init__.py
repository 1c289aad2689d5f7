"""The ggml types a GGUF file is written in: bytes of blocks from levels and scales, and back."""

from exlq.formats.gguf_blocks.block import BlockType, StoredType
from exlq.formats.gguf_blocks.floats import BF16, F16, F32, FloatType
from exlq.formats.gguf_blocks.iq4 import IQ4_NL, IQ4_XS
from exlq.formats.gguf_blocks.kquants import Q2_K, Q3_K, Q4_K, Q5_K, Q6_K
from exlq.formats.gguf_blocks.legacy import Q4_0, Q4_1, Q5_0, Q5_1, Q8_0

FLOAT_TYPES: dict[str, FloatType] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
}
BLOCK_TYPES: dict[str, BlockType] = {
    "Q4_0": Q4_0,
    "Q4_1": Q4_1,
    "Q5_0": Q5_0,
    "Q5_1": Q5_1,
    "Q8_0": Q8_0,
    "Q2_K": Q2_K,
    "Q3_K": Q3_K,
    "Q4_K": Q4_K,
    "Q5_K": Q5_K,
    "Q6_K": Q6_K,
    "IQ4_NL": IQ4_NL,
    "IQ4_XS": IQ4_XS,
}
TYPES: dict[str, StoredType] = {**FLOAT_TYPES, **BLOCK_TYPES}
