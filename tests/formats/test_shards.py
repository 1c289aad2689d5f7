"""Shards, read by the safetensors library and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.shards import DTYPES, ShardWriter

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
TENSORS = st.lists(
    st.tuples(st.text(min_size=1, max_size=10), st.sampled_from(list(DTYPES)), SHAPES), min_size=1, max_size=8
)


def made(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random bit patterns without NaN, so that equality means equal bits."""
    values = torch.randint(-1000, 1000, shape, generator=torch.Generator().manual_seed(seed))
    return (values / 16).to(dtype)


def written(directory: Path, tensors: dict[str, Tensor], shard_bytes: int | None = None) -> tuple[Path, ...]:
    directory.mkdir(exist_ok=True)
    writer = ShardWriter(directory, shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    return writer.close()


def read_back(files: tuple[Path, ...]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=TENSORS, shard_bytes=st.sampled_from([None, 900, 1500]))
def test_the_safetensors_library_reads_what_was_added(
    specs: list[tuple[str, torch.dtype, tuple[int, ...]]],
    shard_bytes: int | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    tensors = {name: made(dtype, shape, seed) for seed, (name, dtype, shape) in enumerate(specs)}
    tensors.pop("__metadata__", None)
    directory = tmp_path_factory.mktemp("shards")

    found = read_back(written(directory, tensors | {"x": made(torch.int16, (3,), 99)}, shard_bytes))

    assert found.keys() == tensors.keys() | {"x"}
    for name, tensor in tensors.items():
        if name != "x":
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)
    assert not [path for path in directory.iterdir() if path.suffix != ".safetensors"]


def test_the_layout_is_length_padded_header_and_aligned_data_without_holes(tmp_path: Path) -> None:
    tensors = {
        "odd": made(torch.int16, (3,), 0),
        "words": made(torch.int32, (2, 5), 1),
        "half": made(torch.float16, (8,), 2),
        "real": made(torch.float32, (3,), 3),
    }

    (path,) = written(tmp_path, tensors)

    raw = path.read_bytes()
    length = int(np.frombuffer(raw[:8], "<u8")[0])
    header = json.loads(raw[8 : 8 + length])
    spans = [(entry["data_offsets"], entry["dtype"]) for entry in header.values()]
    assert path.name == "output.safetensors"
    assert length % 8 == 0
    assert "__metadata__" not in header
    assert [begin for (begin, _), _ in spans] == [0] + [end for (_, end), _ in spans][:-1]
    assert spans[-1][0][1] == len(raw) - 8 - length
    assert all(begin % (int(dtype[1:]) // 8) == 0 for (begin, _), dtype in spans)


def test_a_shard_is_cut_when_the_next_tensor_would_not_fit(tmp_path: Path) -> None:
    tensors = {f"layer.{i}": made(torch.float16, (1000,), i) for i in range(7)}

    files = written(tmp_path, tensors, shard_bytes=7000)

    assert [path.name for path in files] == [f"output-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [len(read_back((path,))) for path in files] == [3, 3, 1]
    assert max(path.stat().st_size for path in files) <= 7000
    assert list(read_back(files)) == list(tensors)


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    tensors = {f"t{i}": made(dtype, (4, 9), i) for i, dtype in enumerate(DTYPES)}

    first = written(tmp_path / "a", tensors, 1500)
    second = written(tmp_path / "b", tensors, 1500)

    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    view = made(torch.int32, (4, 6), 0).T[1:4:2]

    assert torch.equal(read_back(written(tmp_path, {"view": view}))["view"], view)


def test_a_tensor_larger_than_a_shard_is_refused_by_name_and_size(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, shard_bytes=1 << 20)

    with pytest.raises(FormatError, match=r"lm_head\.q_weight takes 2\.00 MiB, a shard holds 1\.00 MiB"):
        writer.add("lm_head.q_weight", torch.zeros(1 << 19, dtype=torch.int32))


def test_what_the_loader_cannot_read_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("a", torch.zeros(2))

    with pytest.raises(FormatError, match="a was added twice"):
        writer.add("a", torch.zeros(2))
    with pytest.raises(FormatError, match=r"b is torch\.int64, ExLlamaV2 reads I32"):
        writer.add("b", torch.zeros(2, dtype=torch.int64))
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_nothing_added_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no tensor was added"):
        ShardWriter(tmp_path).close()
