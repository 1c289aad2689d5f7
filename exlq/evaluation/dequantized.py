"""A GGUF file with its weights dequantized: what was lost in them, apart from how they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType

from exlq.errors import FormatError
from exlq.formats.gguf.dequantized import NO_WEIGHTS, unpacked
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter


def dequantized_copy(path: Path, out: Path) -> Path:
    """Writes `out`, one file with every weight of a GGUF file in F32 and its metadata as it is.

    Args:
        path: a whole GGUF file, or the first of a split one.

    Raises:
        FormatError: for a broken file, or a type nothing here can read.
    """
    with GgufFile(path) as file:
        infos = infos_of_copy(file)
        writer = GgufWriter(out, _metadata(file.metadata), infos)
        try:
            for info in file.tensors.values():
                writer.add(info.name, unpacked(info, file.read(info.name)))
            writer.close()
        except BaseException:
            writer.abandon()
            raise
    return out


def infos_of_copy(file: GgufFile) -> list[TensorInfo]:
    """What the copy holds; raises FormatError where a tensor's type cannot be read."""
    return [TensorInfo(info.name, info.shape, _type(file.path, info)) for info in file.tensors.values()]


def _metadata(stored: Mapping[str, KeyValue]) -> list[KeyValue]:
    """The entries that can be written again: all but arrays of nothing."""
    return [entry for entry in stored.values() if entry.element is None or len(entry.value)]


def _type(path: Path, info: TensorInfo) -> str:
    """What a tensor is in the copy; raises FormatError where its type cannot be read."""
    if info.type in NO_WEIGHTS:
        return info.type
    size = gguf.GGML_QUANT_SIZES.get(GGMLQuantizationType.__members__.get(info.type))
    try:
        unpacked(info, torch.zeros(1, size[1] if size else 0, dtype=torch.uint8))
    except FormatError as exc:
        raise FormatError(f"{path}: {exc}; leave out --weights-only") from exc
    return "F32"
