"""Rows and chunks against plain slices of the stream."""

from __future__ import annotations

import json
from dataclasses import asdict
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from exlq import calibration
from exlq.calibration import TokenRows, TokenStream, read_stream
from exlq.errors import CalibrationError, ConfigError
from exlq.names import Mode
from tests.calibration.helpers import BOS, ROWS, Oracle, Write, joined


def cut(ids: list[int], n_rows: int, length: int, seed: int = 0, mode: Mode = "spread") -> TokenRows:
    """Rows of a stream of known ids, whose tokenizer begins with token 9."""
    source = calibration.Source(Path("a.parquet"), "text", "text", 1)
    stream = TokenStream(np.array(ids, np.int32), source, "", 1, 0, 0, False, bos_id=9)
    return calibration.cut_rows(stream, n_rows, length, "", seed, mode)


@given(st.integers(1, 40), st.integers(2, 30), st.integers(0, 500), st.integers(0, 2**64))
def test_spread_rows_are_slices_apart_from_each_other_over_the_whole_stream(
    n_rows: int, length: int, spare: int, seed: int
) -> None:
    tokens = n_rows * length + spare
    ids = list(range(10, 10 + tokens))
    rows = cut(ids, n_rows, length, seed).ids
    starts = [int(row[1]) - 11 for row in rows]
    for row, start in zip(rows.tolist(), starts, strict=True):
        assert row == [9, *ids[start + 1 : start + length]]
    share = tokens / n_rows
    for i, start in enumerate(starts):  # one in each equal part, up to rounding
        assert i * share - 1 <= start <= (i + 1) * share - length + 1
    assert all(b - a >= length for a, b in pairwise([*starts, tokens]))
    assert torch.equal(rows, cut(ids, n_rows, length, seed).ids)


def test_another_seed_gives_other_windows() -> None:
    assert len({int(cut(list(range(10_000)), 8, 10, seed).ids[0, 1]) for seed in range(20)}) > 10


def test_first_rows_are_the_first_tokens_reshaped(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(ROWS * 20)
    stream = read_stream(path, tokenizer)
    rows = calibration.token_rows(path, tokenizer, 8, 32, "hash", mode="first")
    plain = torch.from_numpy(stream.ids[: 8 * 32]).view(8, 32).long()
    assert torch.equal(rows.ids[:, 1:], plain[:, 1:])
    assert rows.ids[:, 0].eq(BOS).all()


def test_no_row_opens_with_two_bos() -> None:
    ids = [9, 1, 2, 3, 4, 9, 5, 6, 7, 8, 1, 2, 3]
    assert cut(ids, 3, 4, mode="first").ids.tolist() == [[9, 1, 2, 3], [9, 5, 6, 7], [9, 8, 1, 2]]


@pytest.mark.parametrize("n_rows", [*range(1, 18), 100])
def test_one_row_in_eight_is_held_out(n_rows: int) -> None:
    heldout = calibration.heldout_mask(n_rows)
    assert heldout.shape == (n_rows,)
    assert heldout.sum() == max(n_rows // 8, int(n_rows > 1))
    assert not heldout[:-1][:7].any()


def test_the_record_says_where_the_rows_are_from(write: Write, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write([*ROWS * 20, None], "body")
    rows = calibration.token_rows(path, tokenizer, 100, 32, "hash", seed=3, text_column="body")
    found = json.loads(json.dumps(asdict(rows.record)))
    tokens = found.pop("tokens")
    fitting = tokens // 32
    assert rows.ids.shape == (fitting, 32)
    assert rows.ids.dtype == torch.int64
    assert rows.heldout.dtype == torch.bool
    assert found == {
        "file": "body.parquet",
        "sha256": sha256(path.read_bytes()).hexdigest(),
        "column": "body",
        "kind": "text",
        "rows": fitting,
        "row_length": 32,
        "documents": 80,
        "seed": 3,
        "mode": "spread",
        "parse_special": False,
        "bos_id": BOS,
        "tokenizer_sha256": "hash",
        "notes": [
            f"{fitting} of 100 rows: the file holds {tokens} tokens, 3200 wanted",
            "1 of 121 rows are null and left out",
        ],
    }


def test_evaluation_chunks_are_those_of_llama_perplexity(
    write: Write, tokenizer: PreTrainedTokenizerBase, oracle: Oracle
) -> None:
    path = write(ROWS * 5)
    tokens = [BOS, *oracle(joined(ROWS * 5))]
    chunks = calibration.evaluation_chunks(path, tokenizer, 16)
    assert chunks.tolist() == [[BOS, *tokens[i + 1 : i + 16]] for i in range(0, len(tokens) - 15, 16)]
    assert torch.equal(calibration.evaluation_chunks(path, tokenizer, 16, max_chunks=2), chunks[:2])
    with pytest.raises(
        CalibrationError, match=rf"{len(tokens)} tokens found in column text, 1000 are needed"
    ):
        calibration.evaluation_chunks(path, tokenizer, 500)


def test_row_length_keeps_to_the_model() -> None:
    assert calibration.row_length(None, 512) == 512
    assert calibration.row_length(None, 131072) == 2048
    assert calibration.row_length(4096, 8192) == 4096
    with pytest.raises(ConfigError, match=r"rows of 513 tokens .* 2 to 512 \(max_position_embeddings\)"):
        calibration.row_length(513, 512)


def test_random_rows_are_of_ordinary_tokens_behind_the_same_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    like = cut(list(range(1000)), 16, 50)
    found = calibration.random_rows(tokenizer, like, 0.5, 200, seed=3)
    assert found.shape == (7, 50), "half as many as are not held out"
    assert set(found[:, 0].tolist()) == {9}
    drawn = found[:, 1:]
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 200
    assert not set(drawn.flatten().tolist()) & set(tokenizer.all_special_ids)
    assert len(set(drawn.flatten().tolist())) > 100
    assert torch.equal(found, calibration.random_rows(tokenizer, like, 0.5, 200, seed=3))
    assert not torch.equal(found, calibration.random_rows(tokenizer, like, 0.5, 200, seed=4))


def test_no_share_is_no_random_row(tokenizer: PreTrainedTokenizerBase) -> None:
    assert calibration.random_rows(tokenizer, cut(list(range(1000)), 16, 50), 0.0, 200, 0).shape == (0, 50)
