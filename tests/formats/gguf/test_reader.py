"""The reader against the gguf package, on whole files and on broken ones."""

from __future__ import annotations

import struct
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType

from exlq.errors import FormatError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import KeyValue, TensorInfo
from tests.formats.gguf.test_writer import ARCHITECTURE, METADATA, TENSORS, random_data, write

T = GGUFValueType


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file written by the gguf package, with every type of value."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in _VALUES.items():
        writer.add_key_value(f"x.{name}", value, T[name])
    for name, value in _VALUES.items():
        writer.add_key_value(f"x.array.{name}", [value, value], T.ARRAY, sub_type=T[name])
    rng = np.random.default_rng(0)
    writer.add_tensor("matrix", rng.standard_normal((5, 64)).astype(np.float32))
    writer.add_tensor("vector", rng.standard_normal(7).astype(np.float16))
    blocks = gguf.quants.quantize(
        rng.standard_normal((2, 3, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0
    )
    writer.add_tensor("experts", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_VALUES: dict[str, Any] = {
    "UINT8": 200,
    "INT8": -100,
    "UINT16": 60000,
    "INT16": -30000,
    "UINT32": 2**32 - 1,
    "INT32": -(2**31),
    "FLOAT32": 0.375,
    "BOOL": True,
    "STRING": "naïve ▁",
    "UINT64": 2**64 - 1,
    "INT64": -(2**63),
    "FLOAT64": 0.1,
}


def test_metadata_and_tensors_are_those_the_gguf_package_wrote(path: Path) -> None:
    with GgufFile(path) as file:
        assert file.metadata["general.architecture"] == ARCHITECTURE
        for name, value in _VALUES.items():
            assert file.metadata[f"x.{name}"] == KeyValue(f"x.{name}", value, T[name])
            array = f"x.array.{name}"
            assert file.metadata[array] == KeyValue(array, [value, value], T.ARRAY, T[name])
        assert len(file.metadata) == 1 + 2 * len(_VALUES)
        assert "missing" not in file.metadata
        assert list(file.tensors.values()) == [
            TensorInfo("matrix", (5, 64), "F32"),
            TensorInfo("vector", (7,), "F16"),
            TensorInfo("experts", (2, 3, 64), "Q8_0"),
        ]
        assert file.n_bytes == path.stat().st_size
        for tensor in gguf.GGUFReader(path).tensors:
            data = np.ascontiguousarray(tensor.data).view(np.uint8)
            assert np.array_equal(file.read(tensor.name).numpy(), data)


def test_rows_are_read_alone(path: Path) -> None:
    with GgufFile(path) as file:
        for name in ("matrix", "experts"):
            whole = file.read(name)
            assert torch.equal(file.read(name, slice(1, None)), whole[1:])
            assert torch.equal(file.read(name, slice(None, None, 2)), whole[::2])
            assert torch.equal(file.read(name, torch.tensor([1, 0, 1])), whole[[1, 0, 1]])
        read = file.read("matrix")
    assert read.shape == (5, 256)  # still there, the file is closed
    assert read.sum() > 0


def test_an_error_of_the_caller_is_not_hidden_by_closing(path: Path) -> None:
    with pytest.raises(IndexError), GgufFile(path) as file:
        file.read("matrix", torch.tensor([99]))


@pytest.mark.parametrize("split_bytes", [None, 1, 600])
def test_shards_are_found_by_the_first(split_bytes: int | None, tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", split_bytes=split_bytes)
    with GgufFile(paths[0]) as file:
        assert list(file.tensors.values()) == TENSORS
        for name, data in random_data(TENSORS).items():
            assert torch.equal(file.read(name).flatten(), data)
        assert all(file.metadata[entry.key] == entry for entry in METADATA)
        assert file.n_bytes == sum(path.stat().st_size for path in paths)


def test_a_shard_that_is_missing_misnamed_or_not_the_first_is_refused(tmp_path: Path) -> None:
    first, second, third = write(tmp_path / "model.gguf", split_bytes=600)
    with pytest.raises(FormatError, match="is shard 2 of 3; give the first"):
        GgufFile(second)
    renamed = first.rename(tmp_path / "other.gguf")
    with pytest.raises(FormatError, match="wanted a name with -00001-of-00003"):
        GgufFile(renamed)
    renamed.rename(first)
    swapped = second.rename(tmp_path / "kept")
    third.rename(second)
    swapped.rename(third)
    with pytest.raises(FormatError, match="calls itself shard 3, its name says 2"):
        GgufFile(first)
    third.unlink()
    second.unlink()
    with pytest.raises(FormatError, match=second.name):
        GgufFile(first)


def test_a_string_that_is_not_utf8_is_given_as_bytes(tmp_path: Path) -> None:
    tokens = KeyValue("tokens", ["a", b"\xff\xfe"], T.ARRAY, T.STRING)
    (path,) = write(tmp_path / "model.gguf", [ARCHITECTURE, tokens], [])
    with GgufFile(path) as file:
        assert file.metadata["tokens"] == tokens


def test_a_large_vocabulary_costs_little_until_it_is_asked_for(tmp_path: Path) -> None:
    words = KeyValue("tokens", [f"token {i}" for i in range(128_000)], T.ARRAY, T.STRING)
    (path,) = write(tmp_path / "model.gguf", [ARCHITECTURE, words], [])
    begin = time.process_time()
    with GgufFile(path) as file:
        took = time.process_time() - begin
        assert file.metadata["tokens"] == words
    assert took < 0.5, f"{took:.2f} s"


def test_a_type_nobody_knows_is_listed_and_not_read(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"matrix") + len("matrix") + 4 + 16
    path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
    with GgufFile(path) as file:
        assert file.tensors["matrix"] == TensorInfo("matrix", (5, 64), "999")
        assert file.read("vector").shape == (14,)
        with pytest.raises(FormatError, match="matrix is of ggml type 999"):
            file.read("matrix")
        with pytest.raises(FormatError, match="has no tensor none among its 3"):
            file.read("none")


def head(version: int = 3, n_tensors: int = 0, n_entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + rest


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


BROKEN = {
    "empty": (b"", "cannot be read"),
    "short": (b"GGUF\3", "ends beyond"),
    "other": (b"PK\3\4" + bytes(40), "begins with"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "old": (head(1), "version 1"),
    "counts": (head(n_tensors=2**63), "do not fit"),
    "entries": (head(n_entries=2**64 - 1), "do not fit"),
    "key length": (head(n_entries=1, rest=struct.pack("<Q", 2**63) + bytes(40)), "ends beyond"),
    "key": (head(n_entries=1, rest=text(b"\xff") + bytes(40)), "not UTF-8"),
    "value type": (head(n_entries=1, rest=text(b"a") + struct.pack("<I", 77) + bytes(9)), "unknown type 77"),
    "array length": (
        head(n_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 10, 2**61) + bytes(9)),
        "ends beyond",
    ),
    "string array": (
        head(n_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 2**62) + bytes(64)),
        "ends beyond",
    ),
    "last string": (
        head(n_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 8, 1) + struct.pack("<Q", 999)),
        "ends beyond",
    ),
    "array of arrays": (
        head(n_entries=1, rest=text(b"a") + struct.pack("<IIQ", 9, 9, 1) + bytes(9)),
        "array of arrays",
    ),
    "twice": (head(n_entries=2, rest=2 * (text(b"a") + struct.pack("<IB", 0, 1)) + bytes(9)), "a twice"),
    "alignment": (
        head(n_entries=1, rest=text(b"general.alignment") + struct.pack("<II", 4, 24)),
        "aligns tensors to 24",
    ),
    "no dimensions": (head(n_tensors=1, rest=tensor(b"a", (), 0, 0) + bytes(99)), "0 dimensions"),
    "dimensions": (head(n_tensors=1, rest=tensor(b"a", (1,) * 9, 0, 0) + bytes(99)), "9 dimensions"),
    "shape": (head(n_tensors=1, rest=tensor(b"a", (4, 0), 0, 0) + bytes(99)), "shape"),
    "blocks": (head(n_tensors=1, rest=tensor(b"a", (31, 2), 8, 0) + bytes(99)), "blocks of 32"),
    "offset": (head(n_tensors=1, rest=tensor(b"a", (1,), 0, 4) + bytes(99)), "no multiple of 32"),
    "data": (head(n_tensors=1, rest=tensor(b"a", (99,), 0, 0) + bytes(99)), "ends at byte"),
    "product": (head(n_tensors=1, rest=tensor(b"a", (2**40, 2**40), 0, 0) + bytes(99)), "ends at byte"),
    "tensor twice": (head(n_tensors=2, rest=2 * tensor(b"a", (1,), 0, 0) + bytes(99)), "holds a twice"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_and_refused(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as refused:
        GgufFile(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"none\.gguf cannot be read"):
        GgufFile(tmp_path / "none.gguf")


def test_a_file_cut_short_anywhere_is_refused(path: Path) -> None:
    content = path.read_bytes()
    cut = path.with_name("cut.gguf")
    data = 6 * 34  # the last tensor, padded to a multiple of 32
    for length in [*range(0, len(content) - (-(-data // 32) * 32 - data), 17)]:
        cut.write_bytes(content[:length])
        with pytest.raises(FormatError):
            GgufFile(cut)


def test_flipped_bits_never_raise_anything_else(path: Path) -> None:
    content, rng = path.read_bytes(), np.random.default_rng(1)
    flipped = path.with_name("flipped.gguf")
    refused = 0
    for _ in range(200):
        broken = bytearray(content)
        broken[rng.integers(0, 1200)] ^= 1 << rng.integers(0, 8)
        flipped.write_bytes(broken)
        try:
            with GgufFile(flipped) as file:
                _ = [file.metadata[key] for key in file.metadata]
                _ = [file.read(name) for name, info in file.tensors.items() if not info.type.isdigit()]
        except FormatError:
            refused += 1
    assert refused > 25
