"""The model's tokenizer: loading it, what it puts in front of a text, ids without padding or truncation."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from exlq.errors import ModelError, panics_as_errors

MOST_IDS = 1 << 24  # the library keeps a place for every id below the largest


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local model directory, never running code that came with it.

    Raises:
        ModelError: if there is none, or transformers cannot make one of it.
    """
    if not model_dir.is_dir():
        raise ModelError(
            f"{model_dir}: no such directory, a model with its tokenizer was wanted; check the path"
        )
    try:
        with panics_as_errors():
            tokenizer = AutoTokenizer.from_pretrained(
                str(model_dir), trust_remote_code=False, local_files_only=True
            )
        _require_ids(model_dir, tokenizer)
        empty = not len(encode(tokenizer, ["a"], parse_special=False))
    except ModelError:
        raise
    except Exception as exc:  # transformers and the backends it picks raise nearly every kind
        reason = " ".join(str(exc).split())
        raise ModelError(
            f"{model_dir}: no usable tokenizer ({type(exc).__name__}: {reason}); "
            "tokenizer.json and tokenizer_config.json were wanted"
        ) from exc
    if empty:  # transformers makes one without vocabulary where the files are missing
        raise ModelError(f"{model_dir}: the tokenizer has no vocabulary; tokenizer.json was wanted in it")
    return tokenizer


def _require_ids(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= MOST_IDS:
        raise ModelError(
            f"{model_dir}: the tokenizer has a token of id {largest}, wanted ids below {MOST_IDS}; "
            "download tokenizer.json again"
        )


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token this tokenizer puts in front of a text, None if it puts none, whatever its config says."""
    plain = _ids(tokenizer, ["a"], add_special_tokens=False, split_special_tokens=False)[0]
    whole = _ids(tokenizer, ["a"], add_special_tokens=True, split_special_tokens=False)[0]
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return int(whole[0]) if before else None


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse_special: bool
) -> NDArray[np.int32]:
    """The tokens of each text alone, one after another, (tokens,); none are added.

    With `parse_special` the spelling of a special token becomes that token, otherwise it stays plain text.
    """
    rows = _ids(tokenizer, texts, add_special_tokens=False, split_special_tokens=not parse_special)
    return _joined(tokenizer, rows)


def encode_continued(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], parse_special: bool
) -> NDArray[np.int32]:
    """As `encode`, but each text is tokenized as what follows a newline, (tokens,).

    This keeps tokenizers that mark the beginning of a text (the `▁` of SentencePiece) from
    marking each piece: the newline goes in front, and its tokens are taken off again.
    """
    lead = _ids(tokenizer, ["\n"], add_special_tokens=False, split_special_tokens=False)[0]
    led = [f"\n{text}" for text in texts]
    rows = _ids(tokenizer, led, add_special_tokens=False, split_special_tokens=not parse_special)
    if any(row[: len(lead)] != lead for row in rows):  # the newline ran into the text
        return encode(tokenizer, texts, parse_special)
    return _joined(tokenizer, [row[len(lead) :] for row in rows])


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **special: bool) -> list[list[int]]:
    try:
        with panics_as_errors():
            encoded = tokenizer(
                list(texts),
                padding=False,
                truncation=False,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
                **special,
            )
    except Exception as exc:  # what a broken tokenizer.json does comes out only here
        reason = " ".join(str(exc).split())
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer fails on text ({type(exc).__name__}: {reason}); "
            "download its files again"
        ) from exc
    rows: list[list[int]] = encoded["input_ids"]
    return rows


def _joined(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    try:
        return np.fromiter(chain.from_iterable(rows), dtype=np.int32)
    except OverflowError as exc:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer gives ids beyond 2**31; download its files again"
        ) from exc
