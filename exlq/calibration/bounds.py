"""What a parquet file claims to hold, held against what fits into memory before any of it is unpacked.

Layout (github.com/apache/parquet-format, README.md and parquet.thrift): the footer is Thrift before its
length and the magic; a column chunk is pages, each behind a `PageHeader` in Thrift's compact protocol.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from exlq.errors import CalibrationError

MOST_FOOTER_BYTES = 1 << 24
MOST_GROUP_BYTES = 1 << 31  # unpacked, of the columns that are read
MOST_RATIO = 1000  # unpacked by stored
SMALL_BYTES = 1 << 24  # may be packed as tightly as they like
MOST_PAGE_BYTES = 1 << 26  # unpacked; a cell is never larger than its page
MOST_PAGES = 1 << 18
ID_BYTES = 8  # of an integer when it is unpacked, however it is stored


class Page(NamedTuple):
    """What a page's header says; `values` is 0 for a dictionary."""

    stored: int
    unpacked: int
    values: int


@dataclass(frozen=True)
class Bounds:
    """The column's size in the whole file, and its largest page, both unpacked in bytes."""

    unpacked: int
    largest_page: int


def require_footer(path: Path) -> None:
    """Refuses a footer that takes too much memory when it is parsed.

    Raises:
        CalibrationError: saying how long it is.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        length = int.from_bytes(file.read(4), "little")
    if size >= 8 and min(length, size) > MOST_FOOTER_BYTES:
        raise CalibrationError(
            f"{path}: its footer has {length:,} bytes, at most {MOST_FOOTER_BYTES:,} are read; "
            "write it with fewer row groups"
        )


def bounds_of(path: Path, metadata: pq.FileMetaData, column: str) -> Bounds:
    """The sizes of a column, from the footer and the headers of its pages.

    Raises:
        CalibrationError: for a row group, a page or a ratio beyond the limits above.
        ValueError: for page headers that are damaged.
    """
    unpacked, largest, n_pages = 0, 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for group in range(metadata.num_row_groups):
            stored = held = 0
            for chunk in _chunks(metadata.row_group(group), column):
                width = ID_BYTES if chunk.physical_type.startswith("INT") else 0
                claimed = max(chunk.total_uncompressed_size, chunk.num_values * width)
                found = 0
                for page in _pages(data, chunk):
                    n_pages += 1
                    size = max(page.unpacked, page.values * width)
                    _require_page(path, column, size, n_pages)
                    found, stored, largest = found + size, stored + page.stored, max(largest, size)
                held += max(claimed, found)
            _require_group(path, column, group, held, stored)
            unpacked += held
    return Bounds(unpacked, largest)


def require_ratio(path: Path, unpacked: int) -> None:
    """Refuses cells that came to far more than the file: one may stand in it once and be named often.

    Raises:
        CalibrationError: saying how much they are.
    """
    if unpacked > max(4 * SMALL_BYTES, MOST_RATIO * path.stat().st_size):
        raise CalibrationError(
            f"{path}: its cells come to more than {unpacked:,} bytes, over {MOST_RATIO} times the file; "
            "was the same text meant so often?"
        )


def _chunks(group: pq.RowGroupMetaData, column: str) -> Iterator[pq.ColumnChunkMetaData]:
    """The chunks of a column, of which a nested one has several."""
    for index in range(group.num_columns):
        chunk = group.column(index)
        if chunk.path_in_schema == column or chunk.path_in_schema.startswith(f"{column}."):
            yield chunk


def _require_page(path: Path, column: str, size: int, n_pages: int) -> None:
    if size > MOST_PAGE_BYTES:
        raise CalibrationError(
            f"{path}: a page of column {column} unpacks to {size:,} bytes, at most {MOST_PAGE_BYTES:,} are "
            "read; is one cell so large? split it into rows"
        )
    if n_pages > MOST_PAGES:
        raise CalibrationError(f"{path}: column {column} has more than {MOST_PAGES:,} pages; write it anew")


def _require_group(path: Path, column: str, group: int, unpacked: int, stored: int) -> None:
    if unpacked > MOST_GROUP_BYTES:
        raise CalibrationError(
            f"{path}: row group {group} has {unpacked:,} bytes unpacked in column {column}, at most "
            f"{MOST_GROUP_BYTES:,} are read; write it with smaller row groups"
        )
    if unpacked > max(SMALL_BYTES, MOST_RATIO * stored):
        raise CalibrationError(
            f"{path}: row group {group} unpacks {stored:,} bytes of column {column} to {unpacked:,}, over "
            f"{MOST_RATIO} times as many; no text is packed like that"
        )


def _pages(data: mmap.mmap, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a chunk, until all its values have come."""
    dictionary = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    position, left = min(dictionary or chunk.data_page_offset, chunk.data_page_offset), chunk.num_values
    while left > 0:
        header, position = _struct(data, position)
        body = next((header[kind] for kind in _DATA_PAGES if kind in header), {_VALUES: 0})
        values = body.get(_VALUES) if isinstance(body, dict) else None
        page = Page(header.get(_STORED, -1), header.get(_UNPACKED, -1), values if values is not None else -1)
        if not all(type(n) is int and n >= 0 for n in page):
            raise ValueError(f"a page before byte {position} has no sizes")
        yield page
        position, left = position + page.stored, left - page.values
        if position > len(data):
            raise ValueError(f"a page ends at byte {position} of {len(data)}")


# The compact protocol of Thrift (github.com/apache/thrift, doc/specs/thrift-compact-protocol.md).


def _struct(data: mmap.mmap, position: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """The fields of a struct by their numbers, and where it ends; only numbers and structs are kept."""
    if depth > 8:
        raise ValueError("a page header is nested too deeply")
    fields: dict[int, Any] = {}
    number = 0
    while (head := _byte(data, position)) != 0:
        position += 1
        if head >> 4:
            number += head >> 4
        else:
            number, position = _zigzag(data, position)
        fields[number], position = _value(data, position, head & 15, depth)
    return fields, position + 1


def _value(data: mmap.mmap, position: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # booleans have no bytes of their own
        return kind == 1, position
    if kind == 3:
        return _byte(data, position), position + 1
    if kind in (4, 5, 6):
        return _zigzag(data, position)
    if kind == 7:
        return None, position + 8
    if kind == 8:  # text or bytes
        length, position = _varint(data, position)
        return None, position + length
    if kind == 12:
        return _struct(data, position, depth + 1)
    raise ValueError(f"a page header holds a value of type {kind}")  # lists and maps, which it has none of


def _zigzag(data: mmap.mmap, position: int) -> tuple[int, int]:
    value, position = _varint(data, position)
    return (value >> 1) ^ -(value & 1), position


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = _byte(data, position)
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"a number before byte {position} of a page header has no end")


def _byte(data: mmap.mmap, position: int) -> int:
    if not 0 <= position < len(data):
        raise ValueError(f"a page header lies at byte {position} of {len(data)}")
    return data[position]


_UNPACKED, _STORED, _VALUES = 2, 3, 1  # fields of PageHeader, and of the headers of data pages
_DATA_PAGES = (5, 8)  # fields of PageHeader: versions 1 and 2
