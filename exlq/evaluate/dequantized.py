"""A GGUF file with its weights dequantized: what was lost in them, apart from how they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.formats.gguf_blocks import TYPES

_NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}  # types left as they are


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
                writer.add(info.name, _values(info, file.read(info.name)))
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
    if info.type in _NO_WEIGHTS:
        return info.type
    if info.type not in TYPES:
        size = gguf.GGML_QUANT_SIZES.get(GGMLQuantizationType.__members__.get(info.type))
        try:
            _foreign(info.type, torch.zeros(1, size[1] if size else 0, dtype=torch.uint8))
        except (NotImplementedError, KeyError) as exc:
            raise FormatError(
                f"{path}: {info.name} is of type {info.type}, which cannot be dequantized here; "
                "leave out --weights-only"
            ) from exc
    return "F32"


def _values(info: TensorInfo, stored: Tensor) -> Tensor:
    """(…, in_features) float32 from (…, row_bytes) uint8; other than weights as they are."""
    if info.type in _NO_WEIGHTS:
        return stored
    rows = stored.reshape(-1, stored.shape[-1])
    return TYPES[info.type].unpack(rows) if info.type in TYPES else _foreign(info.type, rows)


def _foreign(kind: str, rows: Tensor) -> Tensor:
    """As the gguf package reads a type we have not."""
    return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), GGMLQuantizationType[kind]))
