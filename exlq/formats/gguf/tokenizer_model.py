"""The file `tokenizer.model` of SentencePiece: a protocol buffer, of which we need a few fields."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from exlq.errors import ModelError

# Wire types of protocol buffers.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
FIXED_BYTES = {FIXED64: 8, FIXED32: 4}
VARINT_BYTES = 10

# Field numbers of sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
TEXT, SCORE, TYPE = 1, 2, 3
MODEL_TYPE = 3
CHARSMAP, EXTRA_WHITESPACES = 2, 4


class PieceType(IntEnum):
    """What a piece is; the numbers are those of `tokenizer.ggml.token_type` too."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


MODEL_TYPES = {1: "unigram", 2: "BPE", 3: "word", 4: "char"}


class Piece(NamedTuple):
    """One entry of the vocabulary, its id is its place."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `tokenizer.model` holds, as far as it concerns a GGUF file."""

    pieces: tuple[Piece, ...]
    model_type: str
    normalizes: bool  # texts are rewritten, by NFKC mostly, before they are split
    removes_extra_whitespaces: bool


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """The file as pieces and settings; a file that is no such model raises ModelError."""
    try:
        return _parse(path.read_bytes())
    except (ValueError, struct.error, OSError) as exc:
        raise ModelError(f"{path}: no SentencePiece model ({exc}); copy the file again") from exc


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    model_type, normalizes, removes = "unigram", False, True  # the defaults of the format
    for number, value in _fields(data):
        if number == PIECES:
            pieces.append(_piece(_message(value)))
        elif number == TRAINER:
            kind = dict(_fields(_message(value))).get(MODEL_TYPE, 1)
            model_type = MODEL_TYPES.get(_integer(kind), f"number {kind!r}")
        elif number == NORMALIZER:
            settings = dict(_fields(_message(value)))
            normalizes = bool(settings.get(CHARSMAP))
            removes = bool(settings.get(EXTRA_WHITESPACES, 1))
    if not pieces:
        raise ValueError("it holds no pieces")
    return SentencePieceModel(tuple(pieces), model_type, normalizes, removes)


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _message(fields.get(SCORE, bytes(4))))[0]
    return Piece(
        _message(fields.get(TEXT, b"")).decode("utf-8"),
        score,
        PieceType(_integer(fields.get(TYPE, PieceType.NORMAL))),
    )


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field of a message: integers of varints, bytes of all else."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | bytes
        if wire == VARINT:
            value, at = _varint(data, at)
        elif wire == BYTES or wire in FIXED_BYTES:
            size, at = _varint(data, at) if wire == BYTES else (FIXED_BYTES[wire], at)
            if size > len(data) - at:
                raise ValueError(f"field {number} has {size} bytes, {len(data) - at} are left")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"field {number} is of wire type {wire}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift, byte in enumerate(data[at : at + VARINT_BYTES]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise ValueError("a number does not end")


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number stands where bytes belong")
    return value


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes stand where a number belongs")
    return value
