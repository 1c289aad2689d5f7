"""Texts that repeat earlier ones."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from exlq.doctor.record import Duplicates

RUN = 8  # words; a run that long is rarely written twice by chance
NEAR = 0.8  # of a text's runs
WORD = re.compile(r"[぀-ヿ㐀-鿿]|[^\W぀-ヿ㐀-鿿]+")  # kana and Han have no spaces
FACTOR = np.uint64(0x9E3779B97F4A7C15)


def find(texts: Sequence[str]) -> Duplicates:
    """Exact and near duplicates of earlier texts.

    A text is an exact duplicate if an earlier one is the same but for white space at its ends. It is a near
    duplicate if it is none and at least 80 % of its runs of 8 words stand in earlier texts. Case,
    punctuation and white space do not count in words; a text of fewer than 8 words is no near duplicate.
    """
    exact = _exact(texts)
    near = _repeated(texts) & ~exact
    characters = np.array([len(text) for text in texts], np.int64)
    whole = max(1, int(characters.sum()))
    exact_share, near_share = (float(characters[found].sum() / whole) for found in (exact, near))
    return Duplicates(int(exact.sum()), exact_share, int(near.sum()), near_share)


def _exact(texts: Sequence[str]) -> NDArray[np.bool_]:
    """(texts,) whether an earlier one is the same."""
    seen: set[str] = set()
    found = np.zeros(len(texts), bool)
    for index, text in enumerate(texts):
        found[index] = text.strip() in seen
        seen.add(text.strip())
    return found


def _repeated(texts: Sequence[str]) -> NDArray[np.bool_]:
    """(texts,) whether most of the runs of each stand in earlier ones."""
    hashes = [_runs(text) for text in texts]
    counts = np.array([len(each) for each in hashes], np.int64)
    owner = np.repeat(np.arange(len(texts)), counts)  # (runs,)
    if not len(owner):
        return np.zeros(len(texts), bool)
    _, first, inverse = np.unique(np.concatenate(hashes), return_index=True, return_inverse=True)
    earlier = owner[first][inverse] < owner
    repeated = np.bincount(owner, weights=earlier, minlength=len(texts))
    return (counts > 0) & (repeated >= NEAR * counts)


def _runs(text: str) -> NDArray[np.uint64]:
    """A hash of every run of eight words, (words - 7,)."""
    words = np.array(
        [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in WORD.findall(text.casefold())],
        np.uint64,
    )
    if len(words) < RUN:
        return np.empty(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(words, RUN)
    hashes = np.zeros(len(windows), np.uint64)
    for column in range(RUN):  # products wrap around, as a hash may
        hashes = (hashes ^ windows[:, column]) * FACTOR
    return hashes
