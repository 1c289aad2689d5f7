"""The bundled calibration text: what its README claims, its kinds and languages, its way into the wheel."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from exlq import default_calibration
from exlq.errors import CalibrationError
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "calibration"
README = (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    table: list[dict[str, str]] = pq.read_table(FOLDER / "default.parquet").to_pylist()
    return table


def claimed(name: str) -> str:
    """The value of one line of the README's first table."""
    (value,) = re.findall(rf"^\| {re.escape(name)} \| `?([^`|]+?)`? \|$", README, re.MULTILINE)
    return str(value)


def test_the_file_found_is_the_committed_one() -> None:
    assert default_calibration.default_calibration() == FOLDER / "default.parquet"


def test_a_missing_file_is_an_error_that_names_both_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(default_calibration, "_PACKAGE", tmp_path / "exlq")
    with pytest.raises(CalibrationError, match=r"exlq.data.*calibration.*-c"):
        default_calibration.default_calibration()


def test_the_readme_states_the_file(rows: list[dict[str, str]]) -> None:
    data = (FOLDER / "default.parquet").read_bytes()
    text = "".join(row["text"] for row in rows)
    assert claimed("sha256") == hashlib.sha256(data).hexdigest()
    assert claimed("sha256 of the joined text") == hashlib.sha256(text.encode()).hexdigest()
    assert int(claimed("rows")) == len(rows)
    assert int(claimed("characters")) == len(text)
    assert int(claimed("bytes of the file")) == len(data) < 1_500_000


def test_the_readme_counts_the_tokens_of_the_bundled_model(
    rows: list[dict[str, str]], tiny_llama: Path
) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_llama / "tokenizer.json"))
    count = len(tokenizer.encode("".join(row["text"] for row in rows), add_special_tokens=False).ids)
    assert int(claimed("tokens, tiny-llama")) == count > 128 * 2048


def test_the_readme_states_every_share(rows: list[dict[str, str]]) -> None:
    for column in ("kind", "language"):
        for name, count in Counter(row[column] for row in rows).items():
            size = sum(len(row["text"]) for row in rows if row[column] == name)
            assert f"\n| {name} | {count} | {size} | " in README


def test_it_holds_the_kinds_and_languages_asked_for(rows: list[dict[str, str]]) -> None:
    assert {row["kind"] for row in rows} == {"prose", "code", "dialogue", "multilingual", "random"}
    assert len({row["language"] for row in rows if row["kind"] == "multilingual"}) >= 5
    assert set(rows[0]) == {"text", "source", "package", "kind", "language", "licence"}
    assert all(all(row.values()) and row["text"].endswith("\n") for row in rows)


def test_every_quarter_of_the_stream_has_the_mix_of_the_whole(rows: list[dict[str, str]]) -> None:
    size = len(rows) // 4
    whole = Counter(row["kind"] for row in rows)
    for i in range(4):
        part = Counter(row["kind"] for row in rows[i * size : (i + 1) * size])
        for kind, count in whole.items():
            assert abs(part[kind] - count / 4) <= 2 + 0.2 * count / 4, f"quarter {i}: {part[kind]} of {kind}"


def test_no_passage_comes_twice(rows: list[dict[str, str]]) -> None:
    assert len({row["text"] for row in rows}) == len(rows)


def test_every_package_has_its_notice(rows: list[dict[str, str]]) -> None:
    notices = (FOLDER / "licences.txt").read_text(encoding="utf-8")
    for package in {row["package"] for row in rows} - {"none"}:
        assert re.search(rf"^{re.escape(package)} \S+$", notices, re.MULTILINE), package


def test_the_wheel_carries_the_file(tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # a build leaves files beside the sources
    for folder in ("exlq", "calibration"):
        shutil.copytree(REPOSITORY / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in REPOSITORY.iterdir():
        if path.is_file():
            shutil.copy(path, copy)
    flags = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(copy), *flags], check=True)
    (wheel,) = tmp_path.glob("exlq-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in ("default.parquet", "README.md", "licences.txt"):
            assert archive.read(f"exlq/data/{name}") == (FOLDER / name).read_bytes()
        archive.extractall(tmp_path / "site")
    ask = "import exlq.default_calibration as d; print(d.default_calibration())"
    found = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "site", check=True, capture_output=True, text=True
    )
    assert Path(found.stdout.strip()) == tmp_path / "site" / "exlq" / "data" / "default.parquet"
