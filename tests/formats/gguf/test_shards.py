"""Shards of given numbers of tensors, read by the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from exlq.errors import FormatError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.shards import shard_paths, tensors_by_shard, without_number
from exlq.formats.gguf.values import KeyValue
from exlq.formats.gguf.writer import GgufWriter, file_bytes
from tests.formats.gguf.test_writer import METADATA, TENSORS, random_data


def write(path: Path, shards: list[int]) -> tuple[Path, ...]:
    writer = GgufWriter(path, METADATA, TENSORS, shards)
    for name, data in random_data(TENSORS).items():
        writer.add(name, data)
    return writer.close()


@pytest.mark.parametrize("shards", [[5], [2, 3], [1, 3, 1], [0, 5], [0, 4, 1]])
def test_every_shard_holds_as_many_tensors_as_asked(shards: list[int], tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", shards)
    readers = [gguf.GGUFReader(path) for path in paths]
    assert [len(reader.tensors) for reader in readers] == shards
    found = {t.name: t.data.tobytes() for reader in readers for t in reader.tensors}
    assert found == {name: data.numpy().tobytes() for name, data in random_data(TENSORS).items()}
    for entry in METADATA:
        assert readers[0].fields[entry.key].contents() == entry.value
    if len(shards) > 1:
        numbers = [reader.fields["split.no"].contents() for reader in readers]
        assert numbers == list(np.arange(len(shards)))
    with GgufFile(paths[0]) as file:
        assert shard_paths(file) == list(paths)
        assert tensors_by_shard(file) == shards


@pytest.mark.parametrize("shards", [[5], [2, 3], [0, 4, 1]])
def test_sizes_are_known_before_anything_is_written(shards: list[int], tmp_path: Path) -> None:
    size = file_bytes(METADATA, TENSORS, shards)
    assert list(tmp_path.iterdir()) == []
    assert sum(path.stat().st_size for path in write(tmp_path / "model.gguf", shards)) == size
    if shards == [5]:
        assert size == file_bytes(METADATA, TENSORS)


def test_what_no_file_can_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    wrong = [*METADATA, KeyValue("exlq.number", 2**40, gguf.GGUFValueType.UINT32)]
    with pytest.raises(FormatError):
        GgufWriter(tmp_path / "model.gguf", wrong, TENSORS, [2, 3])
    assert list(tmp_path.iterdir()) == []


def test_abandoned_shards_are_removed(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "model.gguf", METADATA, TENSORS, [2, 3])
    name, data = next(iter(random_data(TENSORS).items()))
    writer.add(name, data)
    writer.abandon()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "whole"),
    [("a-00001-of-00003.gguf", "a.gguf"), ("a.gguf", "a.gguf"), ("a-1-of-3.gguf", "a-1-of-3.gguf")],
)
def test_the_name_of_the_whole(name: str, whole: str) -> None:
    assert without_number(Path("d") / name) == Path("d") / whole
