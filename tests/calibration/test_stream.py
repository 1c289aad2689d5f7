"""Streams against the `tokenizers` library on the whole text."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exlq.calibration import pieces, read_stream
from tests.calibration.helpers import BOS, EOT, ROWS, Oracle, Write, joined


def test_text_rows_give_the_tokens_of_the_joined_text(
    write: Write, tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    stream = read_stream(write([*ROWS[:3], None, *ROWS[3:]]), tokenizer)
    assert stream.ids.tolist() == oracle(joined(ROWS))
    assert (stream.documents, stream.blank, stream.null, stream.bos_id) == (4, 2, 1, BOS)


LINES = st.sampled_from(["", " = T = ", "word .", " a word , and", "été 12345", "  indented", "<|eot_id|> x"])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(LINES, max_size=6).map("\n".join), min_size=1, max_size=30), st.integers(1, 40))
def test_neither_pieces_nor_batches_change_the_tokens(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: PreTrainedTokenizerBase,
    oracle: Oracle,
    rows: list[str],
    batch_rows: int,
) -> None:
    rows = ["begin", *(row + "\n end" for row in rows)]  # a good seam at least after every cell
    path = tmp_path_factory.mktemp("pieces") / "a.parquet"
    pq.write_table(pa.table({"text": rows}), path, row_group_size=7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", 100)
        stream = read_stream(path, tokenizer, batch_rows=batch_rows)
    assert stream.ids.tolist() == oracle(joined(rows))


@given(st.lists(st.text("a \n", max_size=30), min_size=1), st.integers(1, 20))
def test_pieces_join_to_the_text_and_end_with_lines(rows: list[str], chars: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_CHARS", chars)
        parts = list(pieces.text_pieces(rows))
        assert parts == list(pieces.text_pieces([joined(rows)]))
    assert "".join(parts) == joined(rows)
    assert all(part.endswith("\n") for part in parts)
    assert all(len(part) >= chars for part in parts[:-1])


def test_a_tokenizer_that_marks_the_beginning_marks_only_one(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rows = [f" line number {i} of the text" for i in range(50)]
    library.train_from_iterator(rows, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<0x0A>"]))
    monkeypatch.setattr(pieces, "PIECE_CHARS", 60)
    stream = read_stream(write(rows), PreTrainedTokenizerFast(tokenizer_object=library))
    assert stream.ids.tolist() == library.encode(joined(rows)).ids
    assert stream.bos_id is None


def test_special_tokens_in_text_are_plain_text_unless_asked_for(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = write(["end<|eot_id|>of turn", "more"])
    assert EOT not in read_stream(path, tokenizer).ids
    assert read_stream(path, tokenizer, parse_special=True).ids.tolist().count(EOT) == 1
    assert EOT not in read_stream(path, tokenizer).ids


def test_chat_is_what_the_template_makes_with_one_bos_each(
    write: Write, tokenizer: PreTrainedTokenizerBase
) -> None:
    ask = {"role": "user", "content": "Where is it?"}
    chats = [[ask, {"role": "assistant", "content": "There."}], [ask]]
    expected: list[int] = []
    for chat in chats:
        expected += tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    as_json = [json.dumps(chat) for chat in chats]
    items_as_json = [[json.dumps(message) for message in chat] for chat in chats]
    for cells in ([chats[0], [], None, chats[1]], as_json, items_as_json):
        stream = read_stream(write(cells, "messages"), tokenizer)
        assert stream.ids.tolist() == expected
        assert expected.count(BOS) == stream.documents == 2
        assert stream.parse_special


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int16()), pa.list_(pa.uint32())])
def test_ready_ids_are_put_end_to_end(
    write: Write, tokenizer: PreTrainedTokenizerBase, kind: pa.DataType
) -> None:
    path = write([[5, 6], [], None, [7], [2047, 0]], "input_ids", kind)
    for batch_rows in (1, 2, 64):
        stream = read_stream(path, tokenizer, batch_rows=batch_rows)
        assert stream.ids.tolist() == [5, 6, 7, 2047, 0]
        assert (stream.documents, stream.blank, stream.null) == (3, 1, 1)


def test_wikitext_tokens_are_those_of_the_whole_text(
    shared: Path, tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    path = shared / "data" / "wikitext2-valid.parquet"
    rows = pq.read_table(path)["text"].to_pylist()
    assert read_stream(path, tokenizer).ids.tolist() == oracle(joined(rows))
