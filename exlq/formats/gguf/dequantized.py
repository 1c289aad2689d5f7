"""A GGUF file's own tensors as floats, whatever type they are stored in."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf_blocks import TYPES

NO_WEIGHTS = {"I8", "I16", "I32", "I64", "F64"}  # types that are no weights


class GgufTensors:
    """`Weights` over any GGUF file, of a split one the first: float32 under the file's own names.

    Rows are in the file's order: those of q and k of some families are not in the checkpoint's. `file` has
    the metadata. Also a context manager.

    Raises:
        FormatError: for a file that breaks the rules of the format.
    """

    def __init__(self, path: Path) -> None:
        self.file = GgufFile(path)

    def keys(self) -> Collection[str]:
        return self.file.tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._info(key).shape

    def dtype(self, key: str) -> torch.dtype:
        self._info(key)
        return torch.float32

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor, or some rows of one with two dimensions or more.

        Raises:
            ModelError: for an unknown name.
            FormatError: for a type that nothing here reads.
        """
        info = self._info(key)
        values = unpacked(info, self.file.read(key, rows))
        count = info.shape[0] if rows is None or len(info.shape) == 1 else -1
        return values.reshape(count, *info.shape[1:])

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> GgufTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _info(self, key: str) -> TensorInfo:
        if key not in self.file.tensors:
            raise ModelError(f"no tensor {key} in {self.file.path}; it has {len(self.file.tensors)} others")
        return self.file.tensors[key]


def unpacked(info: TensorInfo, stored: Tensor) -> Tensor:
    """(…, in_features) float32 from (…, row_bytes) uint8; other than weights as they are.

    Raises:
        FormatError: for a type that nothing here reads.
    """
    if info.type in NO_WEIGHTS:
        return stored
    rows = stored.reshape(-1, stored.shape[-1])
    if info.type in TYPES:
        return TYPES[info.type].unpack(rows)
    try:  # as the gguf package reads a type we have not
        return torch.from_numpy(gguf.quants.dequantize(rows.numpy(), GGMLQuantizationType[info.type]))
    except (NotImplementedError, KeyError) as exc:
        raise FormatError(f"{info.name} is of type {info.type}, which cannot be dequantized here") from exc
