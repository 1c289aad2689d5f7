"""Conversations of a `messages` column, written out by the model's chat template."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from exlq.calibration.source import Source, read_batches, reading
from exlq.errors import CalibrationError
from exlq.files import parse_json


def read_chats(source: Source, tokenizer: PreTrainedTokenizerBase, batch_rows: int) -> Iterator[str | None]:
    """Each row as the model sees it, special tokens spelled out; empty without messages, None where null.

    Raises:
        CalibrationError: if the tokenizer has no chat template, or a row (counted from 0) does not fit it.
    """
    if tokenizer.chat_template is None:
        raise CalibrationError(
            f"{source.path}: column {source.column} holds chat, but the model's tokenizer has no chat "
            "template; give a column of text with --text-column"
        )
    row = 0
    for batch in read_batches(source, batch_rows):
        with reading(source.path):
            cells = batch.to_pylist()
        for cell in cells:
            yield None if cell is None else _render(source, tokenizer, cell, row)
            row += 1


def _render(source: Source, tokenizer: PreTrainedTokenizerBase, cell: Any, row: int) -> str:
    try:
        messages = _messages(cell)
        text: str = tokenizer.apply_chat_template(messages, tokenize=False) if messages else ""
        text.encode()  # JSON can spell halves of UTF-16 pairs, and tokenizers fail on them
    except Exception as exc:  # a template is a program of the model's maker: it may raise anything
        reason = " ".join(str(exc).split())
        raise CalibrationError(
            f"{source.path}: row {row} of {source.column} (from 0) does not fit the chat template: {reason}"
        ) from exc
    return text


def _messages(cell: Any) -> list[dict[str, Any]]:
    """A cell's messages, each a struct or its JSON, or the whole cell JSON; fields without value left out."""
    listed = parse_json(cell) if isinstance(cell, str) else cell
    items = [parse_json(item) if isinstance(item, str) else item for item in listed]
    return [{name: value for name, value in item.items() if value is not None} for item in items]
