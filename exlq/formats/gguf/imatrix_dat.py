"""The legacy `.dat` form of an importance matrix: counted strings and floats, means times a number of chunks.

Source: llama.cpp, common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp (2026-10), restated.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.files import atomic_write_bytes
from exlq.formats.gguf.imatrix_entries import Entry, Imatrix


def read_dat(path: Path) -> Imatrix:
    """The importance matrix in a legacy file.

    Raises:
        ModelError: if it holds none.
    """
    cursor = _Cursor(path.read_bytes())
    n_entries = cursor.number()
    if n_entries < 1:
        raise ModelError(f"{n_entries} entries are announced, want at least 1")
    entries: dict[str, Entry] = {}
    for _ in range(n_entries):
        name = cursor.text()
        if name in entries:
            raise ModelError(f"{name!r} has two entries, want one")
        entries[name] = _entry(cursor)
    # the first files ended here
    chunk_count = cursor.number() if cursor.left else 0
    dataset = cursor.text() if cursor.left else ""
    return Imatrix(entries, (dataset,) if dataset else (), chunk_count)


def write_dat(imatrix: Imatrix, path: Path) -> None:
    """Write a legacy file; it holds the name of one dataset, the last, and no counts of experts."""
    parts = [struct.pack("<i", len(imatrix.entries))]
    for name, entry in sorted(imatrix.entries.items()):
        n_calls = _n_calls(entry, imatrix.chunk_size)
        values = _means(entry) * n_calls  # (n_mat, n_in) float64
        stored = values.float().numpy().astype("<f4").tobytes()
        parts += [_counted(name), struct.pack("<ii", n_calls, values.numel()), stored]
    parts += [struct.pack("<i", imatrix.chunk_count), _counted("".join(imatrix.datasets[-1:]))]
    atomic_write_bytes(path, b"".join(parts))


class _Cursor:
    """Reads on through `data`; nothing is taken before it is known to be there."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.place

    def take(self, n_bytes: int) -> memoryview:
        if not 0 <= n_bytes <= self.left:
            raise ModelError(f"{n_bytes} bytes are announced at byte {self.place}, {self.left} are left")
        self.place += n_bytes
        return memoryview(self.data)[self.place - n_bytes : self.place]

    def number(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        begin, n_bytes = self.place, self.number()
        try:
            return bytes(self.take(n_bytes)).decode()
        except UnicodeDecodeError as exc:
            raise ModelError(f"the name at byte {begin} is not UTF-8") from exc


def _entry(cursor: _Cursor) -> Entry:
    n_calls, n_values = cursor.number(), cursor.number()
    if n_values < 1:
        raise ModelError(f"{n_values} values are announced before byte {cursor.place}, want at least 1")
    values = np.frombuffer(cursor.take(4 * n_values), "<f4").astype(np.float32)
    # without a number of calls llama.cpp takes the values as they are
    return Entry(torch.from_numpy(values).unsqueeze(0), torch.tensor([float(max(n_calls, 1))]))


def _n_calls(entry: Entry, chunk_size: int) -> int:
    """Chunks that hold the tokens of the busiest expert; at least 1."""
    return max(1, -(-int(entry.counts.max()) // max(chunk_size, 1)))


def _means(entry: Entry) -> Tensor:
    """(n_mat, n_in) float64, ones for an expert no token reached."""
    counts = entry.counts.double().unsqueeze(-1)
    return torch.where(counts > 0, entry.sums.double() / counts.clamp(min=1), 1.0)


def _counted(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data
