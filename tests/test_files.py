from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import pytest

from exlq import files


def test_a_written_file_holds_the_data_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    files.atomic_write_bytes(path, b"\x00new")
    assert path.read_bytes() == b"\x00new"
    assert [other.name for other in tmp_path.iterdir()] == ["a.bin"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    files.atomic_write_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert [other.name for other in tmp_path.iterdir()] == ["a.txt"]


def test_the_name_is_taken_only_once_the_data_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    seen: list[tuple[bool, bytes]] = []

    def look(descriptor: int) -> None:
        beside = [other for other in tmp_path.iterdir() if other != path]
        seen.append((path.exists(), beside[0].read_bytes()))

    monkeypatch.setattr(os, "fsync", look)
    files.atomic_write_text(path, "é\n")
    assert seen == [(False, "é\n".encode())]


def test_a_missing_directory_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.atomic_write_text(tmp_path / "absent" / "a.txt", "x")


def test_json_keeps_key_order_and_floats_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"z": 0.1 + 0.2, "a": [1, 5e-324, "é"], "m": None}
    files.atomic_write_json(path, value)
    text = path.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert "é" in text
    assert json.loads(text) == value == files.read_json(path)
    assert list(json.loads(text)) == ["z", "a", "m"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.atomic_write_json(path, math.nan)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b"[-Infinity]", "-Infinity is not"),
        (b"[1e999]", "1e999 is not"),
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b"[" * 200_000, "nested too deeply|Expecting"),
        (b"[" + b"9" * 5000 + b"]", "digit|limit"),
        (b'"\xff"', "utf-8"),
        (b'{"a": ', "Expecting value"),
    ],
)
def test_json_that_is_not_strict_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        files.read_json(tmp_path / "a.json")


@pytest.mark.parametrize("size", [0, 1, files.CHUNK_BYTES, 2 * files.CHUNK_BYTES + 3])
def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path: Path, size: int) -> None:
    data = bytes(i % 251 for i in range(size))
    (tmp_path / "a").write_bytes(data)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
