"""Token rows: windows of a token stream, one in eight of them held out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exlq.calibration.stream import TokenStream, read_stream
from exlq.errors import CalibrationError, ConfigError
from exlq.names import Mode

DEFAULT_LENGTH = 2048
HELDOUT_EVERY = 8
MINIMUM_ROWS = HELDOUT_EVERY  # fewer only if fewer were asked for: one in eight is to be held out


@dataclass(frozen=True)
class CalibrationRecord:
    """Where token rows came from, ready for JSON.

    `file` has no directory; `tokens` counts the whole stream, `documents` the rows of the file
    that hold something; `bos_id` is None where the tokenizer puts nothing in front.
    """

    file: str
    sha256: str
    column: str
    kind: str
    rows: int
    row_length: int
    tokens: int
    documents: int
    seed: int
    mode: str
    parse_special: bool
    bos_id: int | None
    tokenizer_sha256: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class TokenRows:
    """`ids` is (n_rows, row_length) int64; `heldout` is (n_rows,) bool, true for rows no Hessian may see.

    `starts`, (n_rows,) int64, is where each row begins in the token stream.
    """

    ids: Tensor
    heldout: Tensor
    starts: Tensor
    record: CalibrationRecord

    def row_name(self, row: int) -> str:
        """What a person calls one of the rows, and where to find it."""
        return f"calibration row {row} (from 0; token {int(self.starts[row])} of {self.record.file})"


def token_rows(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    n_rows: int,
    row_length: int,
    tokenizer_sha256: str,
    seed: int = 0,
    mode: Mode = "spread",
    text_column: str | None = None,
    parse_special: bool = False,
) -> TokenRows:
    """Token rows of a parquet file: `read_stream`, then `cut_rows`."""
    stream = read_stream(path, tokenizer, text_column, parse_special)
    return cut_rows(stream, n_rows, row_length, tokenizer_sha256, seed, mode)


def random_rows(
    tokenizer: PreTrainedTokenizerBase, like: TokenRows, share: float, vocab_size: int, seed: int
) -> Tensor:
    """(n, row_length) int64 rows of tokens drawn alike, no special ones; n is a share of the text rows.

    Where BOS opens the rows of `like`, it opens these. They show a Hessian what the text never has.
    """
    n_rows, length = round(share * int((~like.heldout).sum())), like.ids.shape[1]
    special = set(tokenizer.all_special_ids)
    usable = torch.tensor([i for i in range(min(vocab_size, len(tokenizer))) if i not in special])
    generator = torch.Generator().manual_seed(seed)
    ids = usable[torch.randint(0, len(usable), (n_rows, length), generator=generator)]
    if like.record.bos_id is not None:
        ids[:, 0] = like.record.bos_id
    return ids


def cut_rows(
    stream: TokenStream,
    n_rows: int,
    row_length: int,
    tokenizer_sha256: str,
    seed: int = 0,
    mode: Mode = "spread",
) -> TokenRows:
    """Windows of `row_length` tokens that do not overlap, as many of `n_rows` as the stream holds.

    `spread`: one window in each of `n_rows` equal parts of the stream, at the same seeded offset in
    each. `first`: the first `n_rows * row_length` tokens, as ExLlamaV2 takes them. Where the tokenizer
    puts BOS in front of a text, it takes the place of each window's first token; a window whose second token
    is BOS starts there instead, if a token is left behind it, so that no row opens with two.

    Raises:
        ConfigError: if a number is out of range.
        CalibrationError: if there are fewer than `MINIMUM_ROWS` windows, and fewer than asked for.
    """
    if n_rows < 1 or row_length < 2:
        raise ConfigError(
            f"{n_rows} rows of {row_length} tokens were asked for; at least 1 row of 2 is needed"
        )
    fitting = min(n_rows, len(stream.ids) // row_length)
    if fitting < min(n_rows, MINIMUM_ROWS):
        raise CalibrationError(_too_few(stream, min(n_rows, MINIMUM_ROWS), row_length))
    starts = STARTS[mode](len(stream.ids), fitting, row_length, seed)
    record = CalibrationRecord(
        file=stream.source.path.name,
        sha256=stream.sha256,
        column=stream.source.column,
        kind=stream.source.kind,
        rows=fitting,
        row_length=row_length,
        tokens=len(stream.ids),
        documents=stream.documents,
        seed=seed,
        mode=mode,
        parse_special=stream.parse_special,
        bos_id=stream.bos_id,
        tokenizer_sha256=tokenizer_sha256,
        notes=_notes(stream, n_rows, fitting, row_length),
    )
    starts = _after_bos(stream, starts, row_length)
    ids = _windows(stream, starts, row_length)
    return TokenRows(ids, heldout_mask(fitting), torch.from_numpy(starts), record)


def heldout_mask(n_rows: int) -> Tensor:
    """(n_rows,) bool: rows 7, 15, 23 and so on, or the last of two to seven; a single row is not."""
    mask = torch.arange(n_rows) % HELDOUT_EVERY == HELDOUT_EVERY - 1
    if 1 < n_rows < HELDOUT_EVERY:
        mask[-1] = True
    return mask


def row_length(requested: int | None, maximum: int) -> int:
    """Tokens in a row: `requested`, or 2048 or the model's `max_position_embeddings` if that is less.

    Raises:
        ConfigError: if more than the model's maximum is asked for, or fewer than 2.
    """
    if requested is None:
        return min(DEFAULT_LENGTH, maximum)
    if not 2 <= requested <= maximum:
        raise ConfigError(
            f"rows of {requested} tokens were asked for, the model takes 2 to {maximum} "
            "(max_position_embeddings); give a length in that range"
        )
    return requested


def _spread(tokens: int, n_rows: int, length: int, seed: int) -> NDArray[np.int64]:
    offset = random.Random(seed).randrange(tokens // n_rows - length + 1)
    return np.array([i * tokens // n_rows + offset for i in range(n_rows)], dtype=np.int64)


def _first(_tokens: int, n_rows: int, length: int, _seed: int) -> NDArray[np.int64]:
    return np.arange(n_rows, dtype=np.int64) * length


def _after_bos(stream: TokenStream, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """Starts moved to a BOS that would otherwise stand second in its window."""
    if stream.bos_id is None:
        return starts
    doubled = stream.ids[starts + 1] == stream.bos_id
    moved: NDArray[np.int64] = starts + (doubled & (starts + length < len(stream.ids)))
    return moved


def _windows(stream: TokenStream, starts: NDArray[np.int64], length: int) -> Tensor:
    """(n_rows, length) int64."""
    rows = torch.from_numpy(stream.ids[starts[:, None] + np.arange(length)].astype(np.int64))
    if stream.bos_id is not None:
        rows[:, 0] = stream.bos_id
    return rows


def _too_few(stream: TokenStream, n_rows: int, length: int) -> str:
    return (
        f"{stream.source.path}: {len(stream.ids)} tokens found in column {stream.source.column}, "
        f"{n_rows * length} are needed ({n_rows} rows of {length}); give a longer file or shorter rows"
    )


def _notes(stream: TokenStream, n_rows: int, fitting: int, length: int) -> tuple[str, ...]:
    notes = []
    if fitting < n_rows:
        notes.append(
            f"{fitting} of {n_rows} rows: the file holds {len(stream.ids)} tokens, {n_rows * length} wanted"
        )
    if stream.null:
        notes.append(f"{stream.null} of {stream.source.rows} rows are null and left out")
    return tuple(notes)


STARTS: dict[str, Callable[[int, int, int, int], NDArray[np.int64]]] = {"spread": _spread, "first": _first}
