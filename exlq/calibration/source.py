"""A parquet file and the one column of it that is read, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from exlq.calibration.bounds import bounds_of, require_footer, require_ratio
from exlq.errors import CalibrationError

ROWS_PER_BATCH = 64  # few, because one cell may hold a book
BATCH_BYTES = 1 << 26  # of a batch unpacked, where cells are large
READ_BUFFER_BYTES = 1 << 20  # else pyarrow takes a column's whole chunk of a row group into memory


@dataclass(frozen=True)
class Source:
    """A column that can be read; `kind` is text, messages or input_ids, `rows` counts the file's rows.

    Of `at_most` rows together it is known that they fit into memory.
    """

    path: Path
    column: str
    kind: str
    rows: int
    at_most: int = ROWS_PER_BATCH


def open_source(path: Path, text_column: str | None = None) -> Source:
    """The column to read: `text_column` if given, else the first present of `text`, `messages`, `input_ids`.

    Raises:
        CalibrationError: if the file is missing, no parquet, has no such column of a usable type, or
            unpacks to more than fits into memory.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file, a parquet file was wanted; check the path")
    with reading(path):
        require_footer(path)
        with pq.ParquetFile(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
    kinds = {kind: kind for kind in KINDS} if text_column is None else {text_column: "text"}
    column = next((name for name in kinds if name in schema.names), None)
    if column is None:
        wanted = text_column or ", ".join(KINDS)
        raise CalibrationError(
            f"{path}: no column {wanted}, the file has {', '.join(schema.names) or 'none'}; accepted are "
            "text, messages (chat), input_ids (token ids), or any column of strings named with --text-column"
        )
    usable, accepted = KINDS[kinds[column]]
    found = schema.types[schema.names.index(column)]
    if not usable(found):
        raise CalibrationError(f"{path}: column {column} is of type {found}, {accepted} was wanted")
    with reading(path):
        bounds = bounds_of(path, metadata, column)
    at_most = BATCH_BYTES // max(1, bounds.largest_page)
    return Source(path, column, kinds[column], metadata.num_rows, max(1, min(ROWS_PER_BATCH, at_most)))


def read_texts(source: Source, batch_rows: int = ROWS_PER_BATCH) -> Iterator[str | None]:
    """The cells of a text column in file order, None where a cell is null."""
    for batch in read_batches(source, batch_rows):
        with reading(source.path):
            cells = batch.to_pylist()
        yield from cells


def read_batches(source: Source, batch_rows: int = ROWS_PER_BATCH) -> Iterator[pa.Array]:
    """The source's column as arrow arrays of at most `batch_rows` cells, in file order.

    Fewer where cells are so large that these would not fit into memory.

    Raises:
        CalibrationError: if the file turns out to be damaged, or to hold far more than its size.
    """
    batch_rows, unpacked = min(batch_rows, source.at_most), 0
    with reading(source.path), pq.ParquetFile(source.path, buffer_size=READ_BUFFER_BYTES) as file:
        for batch in file.iter_batches(batch_size=batch_rows, columns=[source.column]):
            cells = batch.column(0)
            if pa.types.is_dictionary(cells.type):
                cells = cells.dictionary_decode()
            unpacked += cells.nbytes
            require_ratio(source.path, unpacked)
            yield cells


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises about a damaged file, or one of another kind, into a CalibrationError."""
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, MemoryError) as exc:
        reason = " ".join(str(exc).split())
        raise CalibrationError(
            f"{path}: cannot be read as parquet ({reason}); a whole parquet file was wanted"
        ) from exc


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return str(kind) in {"string", "large_string", "string_view"}  # the last is newer than pyarrow 15


def _is_chat(kind: pa.DataType) -> bool:
    if not _is_list(kind):
        return _is_text(kind)
    item = kind.value_type
    if not pa.types.is_struct(item):
        return _is_text(item)
    fields = {field.name: field.type for field in item}
    return {"role", "content"} <= fields.keys() and _is_text(fields["role"]) and _is_text(fields["content"])


def _is_ids(kind: pa.DataType) -> bool:
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


KINDS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "text": (_is_text, "string"),
    "messages": (_is_chat, "list<struct<role: string, content: string>> or JSON of it"),
    "input_ids": (_is_ids, "list of integers"),
}
