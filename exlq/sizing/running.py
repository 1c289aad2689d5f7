"""Memory that a model takes while it runs: weights, KV cache, compute buffers and a margin.

llama.cpp is counted as its programs run: one sequence, flash attention where there is a kernel, batches of
512 tokens, a window's blocks kept at the window. ExLlamaV2 0.3.2 reads prompts in pieces of 2048.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from exlq.errors import ConfigError
from exlq.sizing.shapes import ModelShape

MARGIN_BYTES = 512 << 20  # the program, its libraries and the device's driver
CELLS = 256  # a cache has a multiple of so many
LLAMA_BATCH, EXL2_BATCH = 512, 2048
EXL2_MOST_DEQUANTIZED = 512 << 20  # weights held as float16 at once
HALF_BYTES, FLOAT_BYTES = 2, 4
SCALED = 2 / 32  # bytes a channel that a float16 scale for 32 takes


class Cache(NamedTuple):
    """Bytes of one channel of the keys and of the values, and what the runtime calls it."""

    key: float
    value: float
    name: str


@dataclass(frozen=True)
class Running:
    """Bytes in memory; `total` is what has to fit."""

    weights: int
    cache: int
    buffers: int
    margin: int = MARGIN_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.margin


def running(shape: ModelShape, format: str, weights: int, context: int, cache: str = "f16") -> Running:
    """What a file of `weights` bytes takes at a context of so many tokens.

    Args:
        cache: of `CACHES`.
    """
    return Running(weights, cache_bytes(shape, format, context, cache), buffer_bytes(shape, format, context))


def require_context(shape: ModelShape, context: int) -> None:
    """Raises ConfigError for a context the model was not made for."""
    if not 1 <= context <= shape.max_length:
        raise ConfigError(
            f"--context {context}: this model goes from 1 to {shape.max_length} tokens; ask for that"
        )


def cache_bytes(shape: ModelShape, format: str, context: int, cache: str) -> int:
    """The KV cache.

    Source: llama.cpp's llama_kv_cache_iswa, by which a windowed block keeps the window and one batch;
    exllamav2 0.3.2, cache.py, where every block keeps the whole context and a quantized cache has one
    block's keys and values in float16 too.
    """
    kind = CACHES[cache][format]
    cells = _padded(context)
    windowed = shape.n_windowed if format == "gguf" else 0
    kept = (shape.n_blocks - windowed) * cells + windowed * min(cells, _padded(shape.window + LLAMA_BATCH))
    unpacked = 2 * HALF_BYTES * cells * shape.kv_channels if format == "exl2" and cache != "f16" else 0
    return round(kept * shape.kv_channels * (kind.key + kind.value)) + unpacked


def buffer_bytes(shape: ModelShape, format: str, context: int) -> int:
    """Working arrays of one batch.

    llama.cpp: logits, both halves of the MLP and the attention mask in float16. ExLlamaV2: one matrix as
    float16, and the states of a batch in float16.

    Source: measured with llama.cpp b11549 on the bundled model (7.52 MiB at 512 tokens, 11.02 at 4096;
    this gives 7.50 and 11.00); from the source of exllamav2 0.3.2, not measured.
    """
    if format == "gguf":
        floats = shape.vocab_size + 2 * shape.inner_channels
        return LLAMA_BATCH * (FLOAT_BYTES * floats + HALF_BYTES * _padded(context))
    largest = max(spec.numel for spec in (*shape.linears, shape.head))
    states = EXL2_BATCH * (2 * shape.inner_channels + 4 * shape.hidden_size)
    return HALF_BYTES * (min(largest, EXL2_MOST_DEQUANTIZED) + states)


def _padded(tokens: int) -> int:
    return -(-tokens // CELLS) * CELLS


# llama.cpp has no cache of six bits, the next larger stands for it.
CACHES: dict[str, dict[str, Cache]] = {
    "f16": {"gguf": Cache(2, 2, "f16"), "exl2": Cache(2, 2, "FP16")},
    "q8_0": {"gguf": Cache(34 / 32, 34 / 32, "q8_0"), "exl2": Cache(1 + SCALED, 1 + SCALED, "Q8")},
    "q6": {"gguf": Cache(34 / 32, 34 / 32, "q8_0"), "exl2": Cache(1 + SCALED, 0.5 + SCALED, "Q6")},
    "q4_0": {"gguf": Cache(18 / 32, 18 / 32, "q4_0"), "exl2": Cache(0.5 + SCALED, 0.5 + SCALED, "Q4")},
}
