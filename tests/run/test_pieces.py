"""Text that streams: whole characters, nothing of a stop text."""

from __future__ import annotations

from pathlib import Path

import pytest

from exlq.calibration import load_tokenizer
from exlq.run.pieces import Detokenizer, Stops
from tests.helpers import make_tokenizer

TEXT = "Ünïcode: 漢字, 👩‍🚀 and a lone tail 🚀"


def test_a_character_of_several_tokens_is_never_split() -> None:
    tokenizer = make_tokenizer()  # one token a byte
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    text = Detokenizer(tokenizer.decode, [0])
    pieces = [text.push(token) for token in ids]
    assert len(ids) == len(TEXT.encode())
    assert [piece for piece in pieces if piece] == list(TEXT)
    assert text.flush() == ""


def test_what_never_becomes_a_character_is_given_at_the_end_as_a_replacement() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("ab🚀", add_special_tokens=False)["input_ids"][:-1]
    text = Detokenizer(tokenizer.decode, [])
    assert "".join(text.push(token) for token in ids) == "ab"
    assert text.flush() == "\ufffd"


def test_pieces_put_together_are_what_decoding_the_whole_gives(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    prompt, answer = "I have a dream", f" that {TEXT} is\n\n  spaced   well"
    before, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, answer))
    text = Detokenizer(lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True), before)
    assert "".join([*(text.push(token) for token in ids), text.flush()]) == answer


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        (["</s>"], "one <two </p> three"),
        (["three", "two"], "one <"),
        (["absent", "</s>x"], "one <two </p> three</s> four"),
        ([], "one <two </p> three</s> four"),
        (["o"], ""),
    ],
)
def test_stop_texts_end_the_text_however_it_is_cut(size: int, stop: list[str], shown: str) -> None:
    text, stops = "one <two </p> three</s> four", Stops(stop)
    pieces = [stops.push(text[i : i + size]) for i in range(0, len(text), size)]
    assert "".join(pieces) + stops.flush() == shown
    assert stops.hit == (shown != text)


def test_only_what_may_begin_a_stop_text_is_held_back() -> None:
    stops = Stops(["<end>"])
    assert [stops.push(piece) for piece in ("a", "b<", "en", "x", "<e")] == ["a", "b", "", "<enx", ""]
    assert stops.flush() == "<e"
