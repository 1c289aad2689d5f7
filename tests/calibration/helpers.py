"""Rows of text, and how they are joined."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

Oracle = Callable[[str], list[int]]
Write = Callable[..., Path]
BOS, EOT = 0, 4  # of the bundled tokenizer
ROWS = [
    "",
    " = Title = \n",
    "",
    " A line of text , with <unk> and 1 234 numbers . \n",
    "No newline",
    "für Elise 🙂\n",
]


def joined(rows: list[str]) -> str:
    return "".join(row if row.endswith("\n") else row + "\n" for row in rows)
