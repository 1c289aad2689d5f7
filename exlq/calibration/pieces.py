"""Rows of text joined to one stream, and cut again into pieces a tokenizer can take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

PIECE_CHARS = 1 << 16
SEAM = re.compile(r"(?<=\n)(?= ?\S)")


def text_pieces(rows: Iterable[str]) -> Iterator[str]:
    """The rows as they stand, a newline added where one does not end in it, cut at good seams.

    A seam is good after a newline and before a line with at most one space in front: tokenizers begin
    a new token there (those that split as GPT-2 does may join the newlines of a blank line before
    it). A piece ends at the first good seam after `PIECE_CHARS` characters, or, where none comes within
    as many again, at the next newline. A line is never cut, and the pieces depend on nothing but the text.
    """
    held: list[str] = []
    chars, look_at = 0, 2 * PIECE_CHARS
    for row in rows:
        held.append(row if row.endswith("\n") else f"{row}\n")
        chars += len(held[-1])
        if chars >= look_at:
            *pieces, rest = _split("".join(held))
            yield from pieces
            held, chars = [rest], len(rest)
            look_at = max(2 * PIECE_CHARS, 2 * chars)
    if held:
        yield from _split("".join(held))


def grouped(texts: Iterable[str], chars: int) -> Iterator[list[str]]:
    """Lists of consecutive texts, each just long enough to hold `chars` characters, the last perhaps less."""
    group: list[str] = []
    total = 0
    for text in texts:
        group.append(text)
        total += len(text)
        if total >= chars:
            yield group
            group, total = [], 0
    if group:
        yield group


def _split(text: str) -> Iterator[str]:
    """Pieces, and at last what is too short to be cut yet."""
    start = 0
    while len(text) - start >= 2 * PIECE_CHARS:
        seam = SEAM.search(text, start + PIECE_CHARS, start + 2 * PIECE_CHARS)
        stop = seam.start() if seam else text.find("\n", start + 2 * PIECE_CHARS - 1) + 1
        if stop in (0, len(text)):
            break
        yield text[start:stop]
        start = stop
    yield text[start:]
