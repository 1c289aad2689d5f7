"""ggml's own quantizer, from the library inside `xllamacpp`."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from exlq.formats.gguf_blocks.block import BlockType


@cache
def library() -> ctypes.CDLL:
    found = pytest.importorskip("xllamacpp").__file__
    loaded = ctypes.CDLL(str(Path(found).parent / "xllamacpp.abi3.so"))
    loaded.ggml_cpu_init()
    loaded.ggml_quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return loaded


def quantize(kind: BlockType, weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """(rows, row_bytes) uint8 as ggml's search and rounding make them, on one thread."""
    rows, in_features = weight.shape
    source = weight.float().contiguous()
    blocks = torch.empty(rows, in_features // kind.block_size * kind.type_size, dtype=torch.uint8)
    factors = None if importance is None else importance.float().contiguous()
    size = library().ggml_quantize_chunk(
        kind.ggml_type,
        source.data_ptr(),
        blocks.data_ptr(),
        0,
        rows,
        in_features,
        None if factors is None else factors.data_ptr(),
    )
    assert size == blocks.numel()
    return blocks
