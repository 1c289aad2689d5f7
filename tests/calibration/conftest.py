"""The bundled tokenizer, the library under it, and parquet files made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from exlq import calibration
from tests.calibration.helpers import Oracle, Write


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return calibration.load_tokenizer(tiny_llama)


@pytest.fixture(scope="session")
def oracle(tiny_llama: Path) -> Oracle:
    """The library alone on a whole text, special tokens as plain text."""
    library = Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    library.encode_special_tokens = True
    return lambda text: list(library.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_parquet(values: list[Any], column: str = "text", kind: pa.DataType | None = None) -> Path:
        path = tmp_path / f"{column}.parquet"
        pq.write_table(pa.table({"other": list(range(len(values))), column: pa.array(values, kind)}), path)
        return path

    return write_parquet
