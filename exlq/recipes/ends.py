"""Types of embedding and head in a GGUF file where only the bits of the decoder's linears are asked for."""

from __future__ import annotations

from exlq.models.layout import EMBEDDING_KEY, HEAD_KEY

# The embedding's type by the decoder's bits per weight, from which on.
EMBEDDING_TYPES = ((8.0, "Q8_0"), (5.0, "Q6_K"), (0.0, "Q4_K"))
TIED_TYPES = ((8.0, "Q8_0"), (0.0, "Q6_K"))
# What `-hb` asks for, as `formats.gguf_codec.HEAD_TYPES` has it; a test holds them against each other.
HEAD_TYPES = {2: "Q2_K", 3: "Q3_K", 4: "Q4_K", 5: "Q5_K", 6: "Q6_K", 8: "Q8_0"}


def gguf_ends(bits: float, head_bits: int, tied: bool) -> dict[str, str]:
    """The types by the matrices' keys, before any gives way to the length of its rows.

    Args:
        bits: per weight, asked for of the decoder's linears.
        tied: whether the embedding is the head too.
    """
    rule = TIED_TYPES if tied else EMBEDDING_TYPES
    ends = {EMBEDDING_KEY: next(name for least, name in rule if bits >= least)}
    return ends if tied else ends | {HEAD_KEY: HEAD_TYPES[head_bits]}
