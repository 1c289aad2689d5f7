"""Files with one planted fault each, which the doctor must name; a clean one, of which it has none."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from exlq.calibration import cut_rows, heldout_mask, load_tokenizer, read_stream
from exlq.cli import main
from exlq.default_calibration import default_calibration
from exlq.doctor import Diagnosis, diagnose, sample
from exlq.errors import CalibrationError, ConfigError

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def clean() -> list[str]:
    """Rows of the bundled text of several kinds, without special tokens and repetitions."""
    table = pq.read_table(default_calibration(), columns=["text", "kind"]).to_pydict()
    kept = [text for text, kind in zip(table["text"], table["kind"], strict=True) if kind != "dialogue"]
    return kept[:40]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_parquet(values: list[Any], column: str = "text", kind: pa.DataType | None = None) -> Path:
        path = tmp_path / "given.parquet"
        pq.write_table(pa.table({column: pa.array(values, kind)}), path)
        return path

    return write_parquet


def codes(found: Diagnosis) -> list[str]:
    return [advice.code for advice in found.advice]


def test_a_clean_file_gets_no_advice(clean: list[str], write: Write, tiny_llama: Path) -> None:
    assert codes(diagnose(write(clean), tiny_llama, rows=24)) == []


PLANTED: dict[str, Callable[[list[str]], list[str | None]]] = {
    "exact duplicates": lambda rows: [*rows, *rows[:20]],
    "near duplicates": lambda rows: [*rows, *(f"Again: {row.upper()}" for row in rows[:20])],
    "null rows": lambda rows: [*rows, None],
    "empty rows": lambda rows: [*rows, *[" \n"] * (2 * len(rows))],
    "special tokens": lambda rows: [*rows, "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"],
    "control characters": lambda rows: [*rows, "a page\x0c\x00 and another"],
    "replacement characters": lambda rows: [*rows, "caf\ufffd"],
    "invisible characters": lambda rows: [*rows, "\ufeffA text with a mark before it."],
    "one character repeated": lambda rows: [*rows, "." * 300],
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_and_nothing_else(
    fault: str, clean: list[str], write: Write, tiny_llama: Path
) -> None:
    assert codes(diagnose(write(PLANTED[fault](clean)), tiny_llama, rows=24)) == [fault]


def test_text_of_one_sort_is_named(clean: list[str], write: Write) -> None:
    english = "The cat of the house sat on the mat and it was not to be moved by anyone in there.\n"
    found = diagnose(write([f"{english} {i} {english[i:]}" for i in range(30)]))
    assert "one sort of text" in codes(found)
    assert list(found.languages) == ["English"]
    code = "def f(x):\n    return g(x)\n\nfor i in range(3):\n    print(f(i))\n"
    assert diagnose(write([code])).code == 1


def test_the_weightiest_advice_comes_first(clean: list[str], write: Write, tiny_llama: Path) -> None:
    found = diagnose(write([*clean, *clean, None, "." * 300]), tiny_llama, rows=24)
    weights = [advice.weight for advice in found.advice]
    assert codes(found)[0] == "exact duplicates"
    assert weights == sorted(weights, reverse=True)


def test_tokens_and_rows_are_those_a_conversion_takes(
    clean: list[str], write: Write, tiny_llama: Path
) -> None:
    path = write(clean)
    stream = read_stream(path, load_tokenizer(tiny_llama))
    rows = cut_rows(stream, 1000, 128, "")
    found = diagnose(path, tiny_llama, rows=1000, length=128).tokens
    assert found is not None
    assert (found.tokens, found.rows, found.row_length) == (len(stream.ids), len(rows.ids), 128)
    assert found.heldout == int(rows.heldout.sum())
    assert found.widest == 768
    assert found.per_channel == pytest.approx(128 * int((~rows.heldout).sum()) / 768)
    assert found.distinct == len(set(stream.ids.tolist()))


@pytest.mark.parametrize(("rows", "fault"), [(8, "singular Hessian"), (25, "few tokens"), (60, "few tokens")])
def test_too_few_tokens_for_the_width_are_named(
    rows: int, fault: str, clean: list[str], write: Write, tiny_llama: Path
) -> None:
    found = diagnose(write(clean), tiny_llama, rows=rows, length=100)
    assert codes(found)[0] == fault
    assert found.tokens is not None
    wanted = int(found.advice[0].text.split("-r ")[1].split()[0])
    more = diagnose(write(clean), tiny_llama, rows=wanted, length=100).tokens
    assert more is not None
    assert 10 <= more.per_channel < 10.5


def test_a_short_file_that_a_conversion_still_takes_is_named(
    clean: list[str], write: Write, tiny_llama: Path
) -> None:
    assert "few rows" in codes(diagnose(write(clean), tiny_llama, rows=100_000, length=256))


def test_chats_and_ids_are_read_as_a_conversion_reads_them(write: Write, tiny_llama: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"What is {i} and {i * i}?"},
            {"role": "assistant", "content": f"No. {i}"},
        ]
        for i in range(300)
    ]
    found = diagnose(write(chats, "messages"), tiny_llama, rows=8, length=64)
    assert (found.kind, found.column) == ("messages", "messages")
    assert found.tokens is not None
    ids = read_stream(write(chats, "messages"), load_tokenizer(tiny_llama)).ids.tolist()
    assert found.tokens.tokens == len(ids)
    again = diagnose(write([ids], "input_ids"), tiny_llama, rows=8, length=64)
    assert again.tokens == found.tokens
    broken = [*chats, [{"role": "user", "content": "Go on.<|eot_id|>"}]]
    assert "special tokens" in codes(diagnose(write(broken, "messages"), tiny_llama, rows=8, length=64))


def test_lone_surrogates_cannot_be_used(write: Write, tiny_llama: Path) -> None:
    chat = '[{"role": "user", "content": "half \\ud83d a pair"}]'
    with pytest.raises(CalibrationError, match="lone surrogate"):
        diagnose(write([chat] * 20, "messages"), tiny_llama)


def test_a_large_file_is_sampled_by_lot(clean: list[str], write: Write) -> None:
    rows = [f"{i} {text}" for i in range(5) for text in clean]
    path = write(rows)
    share = sum(len(text.encode()) for text in rows) // 4
    drawn_texts = []
    for seed in (0, 1, 1):
        with sample.sampled(path, None, seed, share) as drawn:
            drawn_texts.append(sample.texts_of(drawn.source))
            assert (drawn.sampled, drawn.rows, drawn.source.rows) == (True, 200, len(drawn_texts[-1]))
    assert all(30 <= len(texts) <= 70 and set(texts) <= set(rows) for texts in drawn_texts)
    assert drawn_texts[0] != drawn_texts[1] == drawn_texts[2]
    with sample.sampled(path, None, 0, 1) as drawn:
        assert drawn.source.rows >= 1


def test_a_sample_says_so_and_scales_tokens(
    clean: list[str], write: Write, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(clean * 3)
    whole = diagnose(path, tiny_llama).tokens
    monkeypatch.setattr(sample.sampled.__wrapped__, "__defaults__", (60_000,))  # type: ignore[attr-defined]
    found = diagnose(path, tiny_llama)
    assert found.sampled
    assert "sampled" in codes(found)
    assert found.tokens is not None
    assert whole is not None
    assert found.tokens.tokens == pytest.approx(whole.tokens, rel=0.3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["missing.parquet"], "no such file"),
        (["{file}", "--text-column", "other"], "no column other"),
        (["{file}", "-r", "8"], "give --model"),
        (["{file}", "--model", "nowhere"], "no such directory"),
        (["{file}", "--model", "{model}"], "tokens found in column text"),
    ],
)
def test_what_cannot_be_used_is_one_line(
    arguments: list[str], told: str, write: Write, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(["a few words"])
    assert main(["doctor", *(a.format(file=file, model=tiny_llama) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_rows_need_a_model(write: Write) -> None:
    with pytest.raises(ConfigError):
        diagnose(write(["a"]), rows=8)


def test_the_bundled_text_is_looked_at_by_default(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--model", str(tiny_llama), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 957
    assert found["tokens"]["tokens"] == 857_603  # as conversions of it record
    assert found["tokens"]["heldout"] == int(heldout_mask(400).sum())
    assert [advice["code"] for advice in found["advice"]] == ["special tokens"]
    assert main(["doctor"]) == 0
    assert "957" in capsys.readouterr().out


def test_a_diagnosis_is_ready_for_json(clean: list[str], write: Write) -> None:
    found = asdict(diagnose(write(clean)))
    assert json.loads(json.dumps(found))["characters"] == sum(map(len, clean))
