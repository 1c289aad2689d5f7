"""Safetensors shards written as tensors come, without holding a shard in memory.

Layout (github.com/huggingface/safetensors, README, "Format"): 8 bytes little-endian header length,
the header as JSON padded with spaces to a multiple of 8, then the data without holes. Four-byte
tensors come before two-byte ones, so that each begins at a multiple of its element size.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from exlq import faults
from exlq.errors import FormatError
from exlq.files import naming

DTYPES: Final = {
    torch.int32: "I32",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_WIDTHS = (4, 2)  # bytes of an element, in the order in which the data lie in a file
_OFFSET_DIGITS = 20  # of an offset in the header, at most
_COPY_BYTES = 1 << 20


class _Entry(NamedTuple):
    name: str
    dtype: str
    shape: list[int]
    itemsize: int
    nbytes: int

    def json(self, begin: int) -> str:
        """The header's entry of a tensor whose data start at `begin`."""
        fields = {"dtype": self.dtype, "shape": self.shape, "data_offsets": [begin, begin + self.nbytes]}
        return f"{json.dumps(self.name)}:{json.dumps(fields, separators=(',', ':'))}"

    @property
    def most_bytes(self) -> int:
        """Bytes this tensor can add to a file, its part of the header included."""
        return len(self.json(0)) + 2 * _OFFSET_DIGITS + self.nbytes


_FIXED_BYTES = 8 + 2 + 8  # header length, braces, padding


class ShardWriter:
    """Writes tensors to `<stem>.safetensors`, or to numbered shards if they do not fit one.

    Args:
        directory: exists, and is the caller's own: file names are final only after `close`.
        shard_bytes: no file grows beyond this; None for one file.
    """

    def __init__(self, directory: Path, stem: str = "output", shard_bytes: int | None = None) -> None:
        self._directory, self._stem, self._limit = directory, stem, shard_bytes
        self._names: set[str] = set()
        self._entries: list[_Entry] = []
        self._used_bytes = _FIXED_BYTES
        self._data: dict[int, BinaryIO] = {}
        self._shards: list[Path] = []

    def add(self, name: str, tensor: Tensor) -> None:
        """Appends one tensor; begins a new shard if it does not fit the present one.

        Raises:
            FormatError: for a name given twice, a dtype ExLlamaV2 does not read, or a tensor that
                no shard can hold.
        """
        entry = self._entry(name, tensor)
        if self._limit is not None and self._used_bytes + entry.most_bytes > self._limit:
            self._cut()
        if entry.itemsize not in self._data:
            self._data[entry.itemsize] = self._part(entry.itemsize).open("wb")
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        with naming(self._part(entry.itemsize)):
            self._data[entry.itemsize].write(raw.numpy().data)
        faults.point("shard data")
        self._names.add(name)
        self._entries.append(entry)
        self._used_bytes += entry.most_bytes

    def close(self) -> tuple[Path, ...]:
        """Finishes the last shard and gives all of them their names, which are returned in order.

        Raises:
            FormatError: if nothing was added.
        """
        self._cut()
        if not self._shards:
            raise FormatError(f"no tensor was added to {self._stem}.safetensors: nothing to write")
        count = len(self._shards)
        names = [f"{self._stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if count == 1:
            names = [f"{self._stem}.safetensors"]
        return tuple(
            shard.replace(self._directory / name) for shard, name in zip(self._shards, names, strict=True)
        )

    def abandon(self) -> None:
        """Closes and removes what was written so far."""
        for width, file in self._data.items():
            with suppress(OSError):  # of what could not be written before, and need not be now
                file.close()
            self._part(width).unlink(missing_ok=True)
        for shard in self._shards:
            shard.unlink(missing_ok=True)
        self._data, self._shards, self._entries = {}, [], []

    def _entry(self, name: str, tensor: Tensor) -> _Entry:
        if name in self._names:
            raise FormatError(f"{name} was added twice: names in one model are distinct")
        if tensor.dtype not in DTYPES:
            known = ", ".join(DTYPES.values())
            raise FormatError(f"{name} is {tensor.dtype}, ExLlamaV2 reads {known}: convert it first")
        width = tensor.element_size()
        entry = _Entry(name, DTYPES[tensor.dtype], list(tensor.shape), width, tensor.numel() * width)
        if self._limit is not None and _FIXED_BYTES + entry.most_bytes > self._limit:
            raise FormatError(
                f"{name} takes {entry.nbytes / 2**20:.2f} MiB, a shard holds {self._limit / 2**20:.2f} MiB:"
                " ask for larger shards"
            )
        return entry

    def _cut(self) -> None:
        """Puts the header before the data of the present shard, if there are any."""
        if not self._entries:
            return
        shard = self._directory / f"{self._stem}-{len(self._shards) + 1:05d}.part"
        self._shards.append(shard)
        with naming(shard), shard.open("wb") as out:
            out.write(self._header())
            faults.point("shard header")
            for width in _WIDTHS:
                if width in self._data:
                    self._data[width].close()
                    with self._part(width).open("rb") as data:
                        shutil.copyfileobj(data, out, _COPY_BYTES)
                    self._part(width).unlink()
        self._entries, self._data, self._used_bytes = [], {}, _FIXED_BYTES

    def _header(self) -> bytes:
        texts, begin = [], 0
        for entry in sorted(self._entries, key=lambda entry: _WIDTHS.index(entry.itemsize)):
            texts.append(entry.json(begin))
            begin += entry.nbytes
        header = ("{" + ",".join(texts) + "}").encode("ascii")
        header += b" " * (-len(header) % 8)
        return len(header).to_bytes(8, "little") + header

    def _part(self, width: int) -> Path:
        return self._directory / f"{self._stem}-{width}.data"
