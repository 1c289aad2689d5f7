"""Files that claim, or hide, more than fits into memory are refused before any of it is unpacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerBase

from exlq.calibration import bounds, open_source, read_stream, stream
from exlq.calibration.source import read_batches
from exlq.errors import CalibrationError
from tests.calibration.helpers import Write


def written(path: Path, values: list[Any], column: str = "text", **settings: Any) -> Path:
    pq.write_table(pa.table({column: values}), path, **settings)
    return path


def refused(path: Path, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_text_packed_over_a_thousand_times_is_refused(tmp_path: Path) -> None:
    cells = ["x" * (1 << 20) + str(i) for i in range(20)]
    path = written(tmp_path / "a.parquet", cells, compression="zstd", use_dictionary=False)
    refused(path, r"row group 0 unpacks .* over 1000 times as many")


def test_a_row_group_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounds, "MOST_GROUP_BYTES", 10_000)
    refused(written(tmp_path / "a.parquet", ["some words"] * 5000, use_dictionary=False), "row group 0 has ")


def test_a_gigabyte_cell_is_refused_by_the_size_of_its_page(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", ["few words", "x" * (bounds.MOST_PAGE_BYTES + 1)])
    refused(path, r"a page of column text unpacks to 67,1.* is one cell so large\?")


def test_a_few_bytes_that_stand_for_many_ids_are_refused(tmp_path: Path) -> None:
    """Runs of one id take no room in the file; as many int64 are 160 MB."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": [[7] * 20_000_000]}), path)
    assert path.stat().st_size < 50_000
    refused(path, "unpacks")


def test_one_large_cell_named_by_very_many_rows_is_refused(tmp_path: Path) -> None:
    words = "".join(f"{i * 7919 % 100_003} " for i in range(100_000))
    path = written(tmp_path / "a.parquet", [words] * 2000, compression="zstd", compression_level=19)
    source = open_source(path)
    with pytest.raises(CalibrationError, match="over 1000 times the file"):
        for _ in read_batches(source):
            pass


def test_large_cells_are_read_a_few_at_a_time(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", [str(i) * (3 << 20) for i in range(9)], use_dictionary=False,
                   compression="none")  # fmt: skip
    assert [len(batch) for batch in read_batches(open_source(path))] == [2, 2, 2, 2, 1]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_the_pages_found_are_those_that_arrow_wrote(tmp_path: Path, dictionary: bool, version: str) -> None:
    path = written(
        tmp_path / "a.parquet", [None, *(f"words {i}" for i in range(5000))], use_dictionary=dictionary,
        data_page_version=version, data_page_size=1000, row_group_size=2000, write_page_index=True,
    )  # fmt: skip
    metadata = pq.ParquetFile(path).metadata
    chunks = [metadata.row_group(i).column(0) for i in range(metadata.num_row_groups)]
    found = bounds.bounds_of(path, metadata, "text")
    headers = sum(chunk.total_uncompressed_size for chunk in chunks) - found.unpacked
    assert headers == 0  # what the footer says, which counts the headers too, is the larger
    assert 1000 <= found.largest_page < 200_000


def test_a_page_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", ["some words"] * 9, use_dictionary=False, compression="none")
    content = bytearray(path.read_bytes())
    assert content[4:7] == b"\x15\x00\x15"  # field 1, a data page; field 2, its size unpacked
    at = 7
    while content[at] > 127:
        at += 1
    path.write_bytes(content[:7] + b"\xfe\xff\xff\xff\x0f" + content[at + 1 :])
    refused(path, "unpacks to 2,147,483,647 bytes|cannot be read as parquet")


def test_a_footer_that_is_most_of_a_large_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + bytes(20_000_000) + (19_999_000).to_bytes(4, "little") + b"PAR1")
    refused(path, "its footer has 19,999,000 bytes")


def test_a_line_that_no_tokenizer_could_take_is_refused(
    write: Write, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MOST_CHARS", 1000)
    assert len(read_stream(write(["word " * 150 + "\n" + "word " * 150]), tokenizer).ids)
    with pytest.raises(CalibrationError, match=r"row 1 of text .* has 1,500 characters without a newline"):
        read_stream(write(["good", "word " * 300]), tokenizer)
    chat = json.dumps([{"role": "user", "content": "word\n" * 300}])
    with pytest.raises(CalibrationError, match=r"row 0 of messages .* characters without an end"):
        read_stream(write([chat], "messages"), tokenizer)


@pytest.mark.parametrize("cell", ['[{"role": "user", "content": "\\ud800"}]', "[" * 70 + "]" * 70])
def test_json_chats_with_half_characters_or_endless_nesting_are_refused_by_their_row(
    write: Write, tokenizer: PreTrainedTokenizerBase, cell: str
) -> None:
    with pytest.raises(
        CalibrationError, match=r"row 1 of messages .* does not fit the chat template"
    ) as caught:
        read_stream(write(["[]", cell], "messages"), tokenizer)
    assert str(caught.value).isprintable()
