from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import sys
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


def test_an_error_of_a_write_names_its_file_and_others_keep_theirs(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space") as full, files.naming(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert full.value.filename == str(tmp_path / "a")
    with pytest.raises(FileNotFoundError) as absent, files.naming(tmp_path / "a"):
        (tmp_path / "b").read_bytes()
    assert absent.value.filename == str(tmp_path / "b")
    with pytest.raises(OSError, match="Input/output") as short, files.naming(tmp_path / "a"):
        raise OSError("8192 requested and 4000 written")  # as numpy says it
    assert (short.value.errno, short.value.filename) == (errno.EIO, str(tmp_path / "a"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the mapping makes the file")
def test_reserved_bytes_have_their_place_on_the_disk_and_what_was_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "states.bin"
    path.write_bytes(b"begun")
    files.reserve(path, 100_000)
    assert path.stat().st_size == 100_000
    assert path.stat().st_blocks * 512 >= 100_000
    assert path.read_bytes()[:6] == b"begun\0"
    files.reserve(path, 10)
    assert path.stat().st_size == 100_000


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the mapping makes the file")
def test_a_disk_too_small_for_states_is_an_error_before_they_are_mapped(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(OSError, match="No space") as full:
        files.reserve(tmp_path / "states.bin", free + (1 << 40))
    assert full.value.filename == str(tmp_path / "states.bin")
    assert (tmp_path / "states.bin").stat().st_size == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ("[" + "9" * 41 + "]", "41 digits, at most 40"),
        (" " * files.MOST_JSON_BYTES + "1", "longer than"),
    ],
)
def test_json_that_would_fill_memory_or_stack_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.parse_json(text)


def test_json_as_deep_and_numbers_as_long_as_real_files_have_are_read() -> None:
    assert files.parse_json("[" * 64 + "]" * 64)
    assert files.parse_json("1000000000000000019884624838656") == 1000000000000000019884624838656


def test_a_name_given_twice_among_very_many_is_found_at_once() -> None:
    names = [f'"{i}": 1' for i in range(100_000)]
    with pytest.raises(ValueError, match="'99999' is given twice"):
        files.parse_json("{" + ", ".join([*names, names[-1]]) + "}")
