"""The head of a GGUF file: its metadata and its list of tensors, read from a map of the file.

Nothing is believed that does not fit into the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGUFValueType

from exlq.formats.gguf.values import KeyValue, TensorInfo

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MOST_DIMENSIONS = 4
_MOST_BYTES = 1 << 26  # of a header; a value takes up to 9 times its size when it is decoded
_MOST_TENSORS, _MOST_ENTRIES = 1 << 17, 1 << 16
_SMALLEST_ENTRY, _SMALLEST_TENSOR = 13, 28  # bytes: a uint8 under an empty key; an unnamed tensor of 1-D
_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}
_SIZES = {int(kind): (kind.name, *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}


class BrokenHeaderError(Exception):
    """What is wrong with a file, without its name."""


@dataclass(frozen=True)
class Listed:
    """A tensor as the list has it: `offset` counts from the start of the data.

    `row_bytes` is None, and the type its number in digits, where the gguf package does not know it.
    """

    info: TensorInfo
    offset: int
    row_bytes: int | None


@dataclass(frozen=True)
class Header:
    """Everything before the data, whose start is a multiple of `alignment` at or after `end`."""

    metadata: Mapping[str, KeyValue]
    tensors: tuple[Listed, ...]
    alignment: int
    end: int


def read_header(data: mmap.mmap) -> Header:
    """Raises BrokenHeaderError for what is no GGUF file, or not a whole one."""
    cursor = _Cursor(data)
    n_tensors, n_entries = _counts(cursor)
    metadata = _LazyMetadata(data, _entries(cursor, n_entries))
    tensors = tuple(_listed(cursor) for _ in range(n_tensors))
    given = metadata.get("general.alignment")
    alignment = gguf.GGUF_DEFAULT_ALIGNMENT if given is None else given.value
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise BrokenHeaderError(f"aligns tensors to {alignment!r} bytes, no power of two")
    return Header(metadata, tensors, alignment, cursor.position)


class _Cursor:
    """Reads on from `position`, never beyond the end."""

    def __init__(self, data: mmap.mmap, position: int = 0) -> None:
        self.data, self.position, self.size = data, position, min(len(data), _MOST_BYTES)

    def skip(self, n_bytes: int, what: str) -> int:
        """Moves on and returns where it was."""
        begin = self.position
        if n_bytes > self.size - begin:
            raise BrokenHeaderError(f"{what} of {n_bytes} bytes at {begin} ends beyond its {self.size} bytes")
        self.position = begin + n_bytes
        return begin

    def uint32(self) -> int:
        return int(struct.unpack_from("<I", self.data, self.skip(4, "a number"))[0])

    def uint64(self) -> int:
        return int(struct.unpack_from("<Q", self.data, self.skip(8, "a number"))[0])

    def string(self) -> bytes:
        begin = self.skip(self.uint64(), "a string")
        return self.data[begin : self.position]

    def name(self) -> str:
        try:
            return self.string().decode()
        except UnicodeDecodeError as exc:
            raise BrokenHeaderError(f"a name before byte {self.position} is not UTF-8") from exc

    def strings(self, count: int) -> Iterator[bytes]:
        return (self.string() for _ in range(count))

    def kind(self) -> GGUFValueType:
        number = self.uint32()
        try:
            return GGUFValueType(number)
        except ValueError as exc:
            raise BrokenHeaderError(f"a value of unknown type {number} before byte {self.position}") from exc

    def skip_strings(self, count: int) -> None:
        """Past `count` strings; written for speed, a vocabulary has hundreds of thousands."""
        data, position, size, unpack = self.data, self.position, self.size, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if position + 8 > size:
                raise BrokenHeaderError(f"an array of {count} strings ends beyond its {size} bytes")
            position += 8 + unpack(data, position)[0]
        if position > size:
            raise BrokenHeaderError(f"an array of {count} strings ends beyond its {size} bytes")
        self.position = position


@dataclass(frozen=True)
class _Stored:
    """A metadata value not decoded yet; `count` elements from `position` on, or one without `element`."""

    kind: GGUFValueType
    element: GGUFValueType | None
    count: int
    position: int


class _LazyMetadata(Mapping[str, KeyValue]):
    """The entries of one file, each decoded when first asked for."""

    def __init__(self, data: mmap.mmap, stored: Mapping[str, _Stored]) -> None:
        self._data = data
        self._stored = stored
        self._decoded: dict[str, KeyValue] = {}

    def __getitem__(self, key: str) -> KeyValue:
        if key not in self._decoded:
            stored = self._stored[key]
            self._decoded[key] = KeyValue(key, _value(self._data, stored), stored.kind, stored.element)
        return self._decoded[key]

    def __contains__(self, key: object) -> bool:
        return key in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def _counts(cursor: _Cursor) -> tuple[int, int]:
    """Tensors and metadata entries, after magic and version."""
    begin = cursor.skip(4, "the magic")
    if cursor.data[begin : begin + 4] != _MAGIC:
        raise BrokenHeaderError(f"begins with {cursor.data[begin : begin + 4]!r}, not {_MAGIC!r}")
    version = cursor.uint32()
    if version & 0xFFFF == 0:
        raise BrokenHeaderError("is big-endian, little-endian was wanted")
    if version not in _VERSIONS:
        raise BrokenHeaderError(f"is of version {version}, {' or '.join(map(str, _VERSIONS))} was wanted")
    n_tensors, n_entries = cursor.uint64(), cursor.uint64()
    if n_tensors * _SMALLEST_TENSOR + n_entries * _SMALLEST_ENTRY > cursor.size:
        raise BrokenHeaderError(
            f"{n_tensors} tensors and {n_entries} entries do not fit into {cursor.size} bytes"
        )
    if n_tensors > _MOST_TENSORS or n_entries > _MOST_ENTRIES:
        raise BrokenHeaderError(
            f"announces {n_tensors} tensors and {n_entries} entries, more than any model has"
        )
    return n_tensors, n_entries


def _entries(cursor: _Cursor, count: int) -> dict[str, _Stored]:
    found: dict[str, _Stored] = {}
    for _ in range(count):
        key, kind = cursor.name(), cursor.kind()
        if key in found:
            raise BrokenHeaderError(f"holds the entry {key} twice")
        found[key] = _array(cursor) if kind == GGUFValueType.ARRAY else _single(cursor, kind)
    return found


def _array(cursor: _Cursor) -> _Stored:
    element, count = cursor.kind(), cursor.uint64()
    stored = _Stored(GGUFValueType.ARRAY, element, count, cursor.position)
    if element == GGUFValueType.ARRAY:
        raise BrokenHeaderError("holds an array of arrays")
    if element == GGUFValueType.STRING:
        cursor.skip_strings(count)
    else:
        cursor.skip(count * np.dtype(_SCALARS[element]).itemsize, "an array")
    return stored


def _single(cursor: _Cursor, kind: GGUFValueType) -> _Stored:
    stored = _Stored(kind, None, 1, cursor.position)
    if kind == GGUFValueType.STRING:
        cursor.string()
    else:
        cursor.skip(np.dtype(_SCALARS[kind]).itemsize, "a number")
    return stored


def _value(data: mmap.mmap, stored: _Stored) -> Any:
    kind = stored.kind if stored.element is None else stored.element
    if kind == GGUFValueType.STRING:
        values = [_text(string) for string in _Cursor(data, stored.position).strings(stored.count)]
    else:
        values = np.frombuffer(data, np.dtype(_SCALARS[kind]), stored.count, stored.position).tolist()
    return values[0] if stored.element is None else values


def _text(stored: bytes) -> str | bytes:
    try:
        return stored.decode()
    except UnicodeDecodeError:
        return stored


def _listed(cursor: _Cursor) -> Listed:
    name, n_dims = cursor.name(), cursor.uint32()
    if not 1 <= n_dims <= _MOST_DIMENSIONS:
        raise BrokenHeaderError(f"{name} has {n_dims} dimensions")
    shape = tuple(reversed([cursor.uint64() for _ in range(n_dims)]))
    if not all(shape):
        raise BrokenHeaderError(f"{name} has the shape {shape}")
    number, offset = cursor.uint32(), cursor.uint64()
    if number not in _SIZES:
        return Listed(TensorInfo(name, shape, str(number)), offset, None)
    kind, block_size, type_size = _SIZES[number]
    if shape[-1] % block_size:
        raise BrokenHeaderError(f"{name} has rows of {shape[-1]} in blocks of {block_size}")
    return Listed(TensorInfo(name, shape, kind), offset, shape[-1] // block_size * type_size)
