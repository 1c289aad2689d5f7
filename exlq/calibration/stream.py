"""A source's tokens as one stream, in file order, with no BOS added between rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from exlq.calibration.chat import read_chats
from exlq.calibration.pieces import grouped, text_pieces
from exlq.calibration.source import (
    ROWS_PER_BATCH,
    Source,
    open_source,
    read_batches,
    read_texts,
    reading,
)
from exlq.calibration.tokenizer import bos_id, encode, encode_continued
from exlq.errors import CalibrationError
from exlq.files import sha256_file

CHARS_PER_CALL = 1 << 20  # what is handed to the tokenizer at once
MOST_CHARS = 1 << 21  # of a line, or a chat: they are never cut, and a tokenizer takes 200 times their size


@dataclass(frozen=True)
class TokenStream:
    """All tokens of one source.

    `ids` is (tokens,) int32. `documents` counts the rows that hold something, `blank` those that are empty
    or white space only, `null` those without a value. `bos_id` is what the tokenizer puts in front of
    a text; the stream holds it only where the file or the chat template does.
    """

    ids: NDArray[np.int32]
    source: Source
    sha256: str
    documents: int
    blank: int
    null: int
    parse_special: bool
    bos_id: int | None


def read_stream(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    text_column: str | None = None,
    parse_special: bool = False,
    batch_rows: int = ROWS_PER_BATCH,
) -> TokenStream:
    """Every token of a parquet file; the same whatever `batch_rows` is.

    Text rows are joined as they stand, a newline added where one does not end in it (an empty row is
    so an empty line); special tokens in them are plain text unless `parse_special`. Chat goes through
    the model's template, each row alone, and is always parsed for special tokens. Null rows are left out.

    Raises:
        CalibrationError: if the file cannot be used, or no row of it holds anything.
    """
    source = open_source(path, text_column)
    reader = Reader(source, tokenizer, parse_special or source.kind == "messages", batch_rows, Counter())
    parts = [np.empty(0, np.int32), *READERS[source.kind](reader)]
    if not reader.tally["documents"]:
        raise CalibrationError(
            f"{path}: {source.rows} rows, none with anything in column {source.column}; text or tokens needed"
        )
    return TokenStream(
        ids=np.concatenate(parts),
        source=source,
        sha256=sha256_file(path),
        documents=reader.tally["documents"],
        blank=reader.tally["blank"],
        null=reader.tally["null"],
        parse_special=reader.parse_special,
        bos_id=bos_id(tokenizer),
    )


@dataclass(frozen=True)
class Reader:
    """One reading of a source; `tally` counts its rows as they pass."""

    source: Source
    tokenizer: PreTrainedTokenizerBase
    parse_special: bool
    batch_rows: int
    tally: Counter[str]

    def counted(self, cells: Iterable[str | None]) -> Iterator[str]:
        """The cells that are not null."""
        for cell in cells:
            self.tally["null" if cell is None else "documents" if cell.strip() else "blank"] += 1
            if cell is not None:
                self._require_short(cell)
                yield cell

    def _require_short(self, cell: str) -> None:
        if len(cell) <= MOST_CHARS:
            return
        is_chat = self.source.kind == "messages"
        longest = len(cell) if is_chat else max(map(len, cell.split("\n")))
        if longest > MOST_CHARS:
            raise CalibrationError(
                f"{self.source.path}: row {self.tally.total() - 1} of {self.source.column} (from 0) has "
                f"{longest:,} characters without {'an end' if is_chat else 'a newline'}, at most "
                f"{MOST_CHARS:,} are read; cut it or leave it out"
            )


def _read_text(reader: Reader) -> Iterator[NDArray[np.int32]]:
    pieces = text_pieces(reader.counted(read_texts(reader.source, reader.batch_rows)))
    yield encode(reader.tokenizer, [next(pieces, "")], reader.parse_special)
    for group in grouped(pieces, CHARS_PER_CALL):
        yield encode_continued(reader.tokenizer, group, reader.parse_special)


def _read_chat(reader: Reader) -> Iterator[NDArray[np.int32]]:
    chats = reader.counted(read_chats(reader.source, reader.tokenizer, reader.batch_rows))
    for group in grouped(chats, CHARS_PER_CALL):
        yield encode(reader.tokenizer, group, reader.parse_special)


def _read_ids(reader: Reader) -> Iterator[NDArray[np.int32]]:
    vocab_size = 1 + max(reader.tokenizer.get_vocab().values())
    row = 0
    for batch in read_batches(reader.source, reader.batch_rows):
        lengths = pc.list_value_length(batch)
        documents = pc.sum(pc.greater(lengths, 0)).as_py() or 0
        reader.tally.update(
            documents=documents, null=batch.null_count, blank=len(batch) - batch.null_count - documents
        )
        yield _checked_ids(reader.source, batch, row, vocab_size)
        row += len(batch)


def _checked_ids(source: Source, batch: pa.Array, first_row: int, vocab_size: int) -> NDArray[np.int32]:
    """The batch's ids end to end, (tokens,); raises CalibrationError for one the tokenizer does not have."""
    flat = pc.list_flatten(batch)
    with reading(source.path):  # a comparison overflows above 2**63
        good = pc.fill_null(pc.and_(pc.greater_equal(flat, 0), pc.less(flat, vocab_size)), False)
    ids: NDArray[np.int32]
    if pc.all(good, min_count=0).as_py():
        ids = flat.to_numpy(zero_copy_only=False).astype(np.int32)
        return ids
    at = pc.index(good, False).as_py()
    row = first_row + pc.list_parent_indices(batch)[at].as_py()
    raise CalibrationError(
        f"{source.path}: row {row} of {source.column} (from 0) holds token {flat[at].as_py()}, "
        f"ids of this tokenizer go from 0 to {vocab_size - 1}; was the file made with another one?"
    )


READERS: dict[str, Callable[[Reader], Iterator[NDArray[np.int32]]]] = {
    "text": _read_text,
    "messages": _read_chat,
    "input_ids": _read_ids,
}
