"""The rows that are looked at: all of a file, or a sample drawn by lot from a large one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from exlq.calibration import Source, open_source, read_texts
from exlq.calibration.source import read_batches, reading
from exlq.errors import CalibrationError
from exlq.files import parse_json

SAMPLE_BYTES = 32 << 20  # of a column, decompressed; more are not looked at


@dataclass(frozen=True)
class Sample:
    """`source` is the file itself, or one of the rows drawn from it; `rows` those of the whole file."""

    source: Source
    rows: int
    columns: dict[str, str]

    @property
    def sampled(self) -> bool:
        return self.source.rows < self.rows


@contextmanager
def sampled(path: Path, text_column: str | None, seed: int, most: int = SAMPLE_BYTES) -> Iterator[Sample]:
    """The file, or beyond `most` bytes of its column each row with the chance that leaves about so many.

    Raises:
        CalibrationError: if the file cannot be used.
    """
    source = open_source(path, text_column)
    with reading(path), pq.ParquetFile(path) as file:
        columns = {field.name: str(field.type) for field in file.schema_arrow}
        size = _column_bytes(file.metadata, source.column)
    if size <= most:
        yield Sample(source, source.rows, columns)
        return
    with TemporaryDirectory(prefix="exlq-doctor-") as scratch:
        drawn = Path(scratch) / path.name
        kept = _draw(source, drawn, most / size, random.Random(seed))
        yield Sample(replace(source, path=drawn, rows=kept), source.rows, columns)


def texts_of(source: Source) -> list[str | None]:
    """The text of every row, of a chat what its messages say; ids have none.

    Raises:
        CalibrationError: for rows that cannot be read.
    """
    if source.kind == "text":
        return list(read_texts(source))
    if source.kind == "messages":
        return [_said(source, row, cell) for row, cell in enumerate(_cells(source))]
    return []


def _column_bytes(metadata: pq.FileMetaData, column: str) -> int:
    return sum(
        chunk.total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for index in range(metadata.num_columns)
        for chunk in [metadata.row_group(group).column(index)]
        if chunk.path_in_schema.split(".")[0] == column
    )


def _draw(source: Source, target: Path, share: float, lot: random.Random) -> int:
    """Writes the rows drawn to a file of its own, of which at least one; how many they are."""
    kept: list[pa.Array] = []
    for batch in read_batches(source):
        kept.append(batch.filter(pa.array([lot.random() < share for _ in range(len(batch))])))
        if not sum(map(len, kept)):
            kept = [batch.slice(0, 1)]
    pq.write_table(pa.table({source.column: pa.chunked_array(kept)}), target)
    return sum(map(len, kept))


def _cells(source: Source) -> Iterator[Any]:
    for batch in read_batches(source):
        with reading(source.path):
            cells = batch.to_pylist()
        yield from cells


def _said(source: Source, row: int, cell: Any) -> str | None:
    """What the messages of a chat say, a line between them."""
    if cell is None:
        return None
    try:
        listed = parse_json(cell) if isinstance(cell, str) else cell
        items = [parse_json(item) if isinstance(item, str) else item for item in listed]
        contents = [item.get("content") for item in items]
    except (ValueError, TypeError, AttributeError) as exc:
        raise CalibrationError(
            f"{source.path}: row {row} of {source.column} (from 0) is no list of messages"
        ) from exc
    return "\n".join(content for content in contents if isinstance(content, str))
