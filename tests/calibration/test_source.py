"""Which column is read, and what cannot be used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exlq import calibration
from exlq.calibration import read_stream
from exlq.errors import CalibrationError, ModelError
from tests.calibration.helpers import Write


def test_columns_are_taken_in_the_stated_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "a.parquet"
    table = {
        "input_ids": [[7]],
        "messages": ["[]"],
        "text": ["a"],
        "body": pa.array(["b"]).dictionary_encode(),
    }
    for expected in ("text", "messages", "input_ids"):
        pq.write_table(pa.table(table), path)
        assert calibration.open_source(path).column == expected
        body = calibration.open_source(path, "body")
        assert (body.column, body.kind, list(calibration.read_texts(body))) == ("body", "text", ["b"])
        del table[expected]


@pytest.mark.parametrize(
    ("values", "column", "kind", "message"),
    [
        (["a"], "body", None, r"no column text, messages, input_ids, the file has other, body; accepted are"),
        ([1], "text", None, r"column text is of type int64, string was wanted"),
        (
            [[{"role": "user"}]],
            "messages",
            None,
            r"is of type list<.*>, list<struct<role: string, content: string>> or JSON of it was wanted",
        ),
        (["{}"], "input_ids", None, r"column input_ids is of type string, list of integers was wanted"),
        ([], "text", pa.string(), r"0 rows, none with anything in column text"),
        (["", " \n", None], "text", None, r"3 rows, none with anything in column text"),
        ([[], None], "input_ids", pa.list_(pa.int64()), r"2 rows, none with anything in column input_ids"),
        ([[1], [2, 2048]], "input_ids", None, r"row 1 of input_ids .* holds token 2048, .* from 0 to 2047"),
        ([[1], [], [-1]], "input_ids", None, r"row 2 of input_ids .* holds token -1,"),
        ([[1, None]], "input_ids", None, r"row 0 of input_ids .* holds token None,"),
        ([[2**64 - 1]], "input_ids", pa.list_(pa.uint64()), r"cannot be read"),
        (["[]", "[{"], "messages", None, r"row 1 of messages .* does not fit the chat template"),
        (["short"], "text", None, r"3 tokens found in column text, 128 are needed \(8 rows of 16\)"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    write: Write,
    tokenizer: PreTrainedTokenizerBase,
    values: list[Any],
    column: str,
    kind: pa.DataType | None,
    message: str,
) -> None:
    path = write(values, column, kind)
    with pytest.raises(CalibrationError, match=message) as caught:
        calibration.cut_rows(read_stream(path, tokenizer, batch_rows=2), 16, 16, "hash")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_damaged_or_absent_file_is_said_in_one_line(write: Write, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file"):
        calibration.open_source(tmp_path / "absent.parquet")
    with pytest.raises(CalibrationError, match="no column body, the file has other, text"):
        calibration.open_source(write(["a"]), "body")
    path = write([str(i) * 50 for i in range(500)])
    source, content = calibration.open_source(path), path.read_bytes()
    path.write_bytes(content[:4] + b"\xff" * 3000 + content[3004:])
    with pytest.raises(CalibrationError, match="cannot be read as parquet"):
        list(calibration.read_texts(source))
    for broken in (b"", b"text", content[:-20]):
        path.write_bytes(broken)
        with pytest.raises(CalibrationError, match="cannot be read as parquet") as caught:
            calibration.open_source(path)
        assert "\n" not in str(caught.value)


def test_chat_needs_a_template(write: Write, tiny_llama: Path) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_file=str(tiny_llama / "tokenizer.json"))
    with pytest.raises(CalibrationError, match="tokenizer has no chat template"):
        read_stream(write(["[]"], "messages"), bare)


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such directory"):
        calibration.load_tokenizer(tmp_path / "absent")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        calibration.load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ModelError, match="no vocabulary"):
        calibration.load_tokenizer(tmp_path)
