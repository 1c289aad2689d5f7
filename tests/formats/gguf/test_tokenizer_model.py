"""tokenizer.model is read as the package sentencepiece reads it, and broken ones are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor

from exlq.errors import ModelError
from exlq.formats.gguf.tokenizer_model import PieceType, read_sentencepiece
from tests.formats.gguf.tokenizer_models import sentencepiece_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    return sentencepiece_model(directory, user_defined_symbols=["<tag>"]) / "tokenizer.model"


def test_pieces_are_those_of_sentencepiece(model: Path) -> None:
    processor = SentencePieceProcessor(model_file=str(model))
    found = read_sentencepiece(model)
    assert len(found.pieces) == processor.get_piece_size() == 700
    for i, piece in enumerate(found.pieces):
        assert piece.text == processor.id_to_piece(i)
        assert piece.score == processor.get_score(i)
        assert (piece.type == PieceType.CONTROL) == processor.is_control(i)
        assert (piece.type == PieceType.BYTE) == processor.is_byte(i)
        assert (piece.type == PieceType.UNKNOWN) == processor.is_unknown(i)
    assert found.pieces[3].type == PieceType.USER_DEFINED


def test_settings_are_those_of_the_training(model: Path, tmp_path: Path) -> None:
    found = read_sentencepiece(model)
    assert (found.model_type, found.normalizes, found.removes_extra_whitespaces) == ("BPE", False, False)
    options: dict[str, Any] = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    other = sentencepiece_model(tmp_path, model_type="unigram", vocab_size=450, **options)
    found = read_sentencepiece(other / "tokenizer.model")
    assert (found.model_type, found.normalizes, found.removes_extra_whitespaces) == ("unigram", True, True)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "it holds no pieces"),
        (b"\x0a\x05abc", "field 1 has 5 bytes, 3 are left"),
        (b"\x0a" + b"\xff" * 11, "a number does not end"),
        (b"\x0a\x80", "a number does not end"),
        (b"\x0b", "field 1 is of wire type 3"),
        (b"\x08\x01", "a number stands where bytes belong"),
        (b"\x0a\x02\x18\x09", "9 is not a valid PieceType"),
        (b"\x0a\x03\x1a\x01x", "bytes stand where a number belongs"),
        (b"\x0a\x03\x0a\x01\xff", "utf-8"),
        (b"\x0a\x03\x12\x01x", "unpack requires a buffer of 4 bytes"),
    ],
)
def test_a_broken_model_is_refused_in_one_line(data: bytes, found: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=found) as refused:
        read_sentencepiece(path)
    assert "\n" not in str(refused.value)


def test_no_damage_raises_anything_else(model: Path, tmp_path: Path) -> None:
    rng, whole, path = random.Random(0), model.read_bytes(), tmp_path / "tokenizer.model"
    for _ in range(200):
        damaged = bytearray(whole[: rng.randrange(1, len(whole))])
        for _ in range(5):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            read_sentencepiece(path)
        except ModelError:
            continue


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no SentencePiece model"):
        read_sentencepiece(tmp_path / "tokenizer.model")
