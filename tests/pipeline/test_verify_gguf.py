"""A GGUF file read again with the gguf package: any other byte of a tensor is found, and any other type."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from exlq.errors import VerifyError
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.pipeline.verify import verify_gguf, verify_types

INFOS = [
    TensorInfo("a.weight", (4, 64), "Q8_0"),
    TensorInfo("b.weight", (48,), "F32"),
    TensorInfo("c.weight", (8, 32), "F16"),
]
TYPES = {info.name: info.type for info in INFOS}


class Written:
    """A file, or shards, of three tensors of random bytes."""

    def __init__(self, directory: Path, split_bytes: int | None) -> None:
        generator = torch.Generator().manual_seed(0)
        metadata = [KeyValue("general.architecture", "llama", gguf.GGUFValueType.STRING)]
        writer = GgufWriter(directory / "m.gguf", metadata, INFOS, split_bytes)
        self.digests = {}
        for info, size in zip(INFOS, (4 * 68, 4 * 48, 2 * 256), strict=True):
            data = torch.randint(0, 100, (size,), dtype=torch.uint8, generator=generator)
            writer.add(info.name, data)
            self.digests[info.name] = hashlib.sha256(data.numpy().tobytes()).hexdigest()
        self.paths = writer.close()

    def place(self, name: str) -> tuple[Path, int]:
        """The file and the place in it of a tensor's first byte."""
        for path in self.paths:
            for tensor in gguf.GGUFReader(path).tensors:
                if tensor.name == name:
                    return path, int(tensor.data_offset)
        raise AssertionError(name)


@pytest.fixture(params=[None, 300], ids=["one file", "shards"])
def written(tmp_path: Path, request: pytest.FixtureRequest) -> Written:
    return Written(tmp_path, request.param)


def test_what_was_written_passes(written: Written) -> None:
    verify_gguf(written.paths, TYPES, written.digests)


@pytest.mark.parametrize("name", TYPES)
def test_one_flipped_bit_is_found_and_its_tensor_named(written: Written, name: str) -> None:
    path, at = written.place(name)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(VerifyError, match=f"{name} is not what was written; check the disk"):
        verify_gguf(written.paths, TYPES, written.digests)


def test_another_type_of_as_many_bytes_is_found(written: Written) -> None:
    with pytest.raises(VerifyError, match=r"c\.weight is not what was written"):
        verify_gguf(written.paths, {**TYPES, "c.weight": "BF16"}, written.digests)


def test_a_tensor_that_is_not_there_or_too_many_are_found(written: Written) -> None:
    with pytest.raises(VerifyError, match=r"d\.weight is not what was written"):
        verify_gguf(written.paths, {**TYPES, "d.weight": "F32"}, {**written.digests, "d.weight": "0"})
    fewer = {name: digest for name, digest in written.digests.items() if name != "b.weight"}
    with pytest.raises(VerifyError, match="holds 3 tensors, 2 were written"):
        verify_gguf(written.paths, TYPES, fewer)


def test_another_list_of_types_is_found(tmp_path: Path) -> None:
    path = tmp_path / "m.types.txt"
    path.write_text("a=Q8_0\n", encoding="utf-8")
    verify_types(path, "a=Q8_0\n")
    for broken in (b"a=Q8_1\n", b"a=Q8_0", b"\xff"):
        path.write_bytes(broken)
        with pytest.raises(VerifyError, match="is not what was written"):
            verify_types(path, "a=Q8_0\n")
    path.unlink()
    with pytest.raises(VerifyError, match="is not what was written"):
        verify_types(path, "a=Q8_0\n")


BREAKAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut short": lambda data: data[:-200],
    "without a magic number": lambda data: b"FUGG" + data[4:],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("how", BREAKAGES)
def test_a_file_that_cannot_be_read_is_found(written: Written, tmp_path: Path, how: str) -> None:
    path = written.paths[-1]
    shutil.copy(path, tmp_path / "copy")
    path.write_bytes(BREAKAGES[how]((tmp_path / "copy").read_bytes()))
    with pytest.raises(VerifyError, match="cannot be read back"):
        verify_gguf(written.paths, TYPES, written.digests)
