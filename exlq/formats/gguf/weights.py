"""The tensors of a GGUF file under the names of the checkpoint it was made of."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.tensors import Entry, file_rows, from_file, unshifted
from exlq.formats.gguf_blocks import TYPES


class GgufWeights:
    """`Weights` over a GGUF file: float32 as ggml dequantizes, rows in the checkpoint's order, shifts undone.

    The file's tensor read last is kept; what is read must not be modified. Close `file` after the last read.

    Args:
        entries: those the file was written with; computed ones are left out.

    Raises:
        FormatError: for an entry that the file lacks or holds in another shape or an unknown type.
    """

    def __init__(self, file: GgufFile, entries: Sequence[Entry]) -> None:
        self._file = file
        self._entries = {source: entry for entry in entries for source in entry.sources}
        self._kept: tuple[str, Tensor] | None = None
        for entry in self._entries.values():
            _check(file, entry)

    def keys(self) -> Collection[str]:
        return self._entries.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown name."""
        entry = self._entry(key)
        return (entry.rows[entry.sources.index(key)], *entry.rows_shape[1:])

    def dtype(self, key: str) -> torch.dtype:
        self._entry(key)
        return torch.float32

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor, or only the given rows of its first dimension, which alone are dequantized."""
        entry = self._entry(key)
        if entry.stacked:
            return self._expert(entry, entry.sources.index(key), rows)
        kept = self._kept is not None and self._kept[0] == entry.name
        if rows is None or kept or len(entry.shape) == 1:
            whole = from_file(entry, self._whole(entry))[key]
            return whole if rows is None else whole[rows if isinstance(rows, slice) else rows.cpu()]
        stored = file_rows(entry, key)[rows if isinstance(rows, slice) else rows.cpu()]
        return unshifted(entry, self._unpacked(entry, stored))

    def _expert(self, entry: Entry, expert: int, rows: slice | Tensor | None) -> Tensor:
        """One matrix of a stack; the stack itself may be too large to be kept."""
        (stored,) = self._file.read(entry.name, slice(expert, expert + 1))
        if rows is not None:
            stored = stored[rows if isinstance(rows, slice) else rows.cpu()]
        return TYPES[self._file.tensors[entry.name].type].unpack(stored)

    def _whole(self, entry: Entry) -> Tensor:
        if self._kept is None or self._kept[0] != entry.name:
            self._kept = None  # two large ones need not be in memory together
            whole = unshifted(entry, self._unpacked(entry, None))
            self._kept = entry.name, whole.reshape(entry.rows_shape)
        return self._kept[1]

    def _unpacked(self, entry: Entry, rows: Tensor | None) -> Tensor:
        stored = TYPES[self._file.tensors[entry.name].type]
        return stored.unpack(self._file.read(entry.name, rows))

    def _entry(self, key: str) -> Entry:
        if key not in self._entries:
            raise ModelError(f"no tensor {key} in {self._file.path}; it has {len(self._entries)} others")
        return self._entries[key]


def _check(file: GgufFile, entry: Entry) -> None:
    info = file.tensors.get(entry.name)
    if info is None:
        raise FormatError(f"{file.path} has no tensor {entry.name}, which the model wants")
    if info.shape != entry.shape:
        raise FormatError(f"{file.path}: {entry.name} has the shape {info.shape}, wanted {entry.shape}")
    if info.type not in TYPES:
        raise FormatError(f"{file.path}: {entry.name} is {info.type}, wanted one of {', '.join(TYPES)}")
