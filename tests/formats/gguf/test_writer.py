"""Files of the writer, read by the gguf package."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter, file_bytes, tensor_bytes

ARCHITECTURE = KeyValue("general.architecture", "llama", GGUFValueType.STRING)
METADATA = [
    KeyValue("llama.block_count", 3, GGUFValueType.UINT32),
    ARCHITECTURE,
    KeyValue("general.file_type", 0, GGUFValueType.UINT32),
    KeyValue("exlq.target", 5.25, GGUFValueType.FLOAT64),
    KeyValue("exlq.wide", 2**40, GGUFValueType.UINT64),
    KeyValue("exlq.truth", False, GGUFValueType.BOOL),
    KeyValue("exlq.empty", "", GGUFValueType.STRING),
    KeyValue("tokenizer.ggml.tokens", ["a", "é", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
    KeyValue("tokenizer.ggml.scores", [0.5, -1.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
    KeyValue("tokenizer.ggml.token_type", [1, 2], GGUFValueType.ARRAY, GGUFValueType.INT32),
]
TENSORS = [
    TensorInfo("token_embd.weight", (5, 64), "Q4_0"),
    TensorInfo("output_norm.weight", (33,), "F32"),
    TensorInfo("blk.0.attn_q.weight", (3, 256), "Q4_K"),
    TensorInfo("blk.0.ffn_up_exps.weight", (2, 3, 32), "Q8_0"),
    TensorInfo("blk.0.ffn_up.weight", (3, 7), "BF16"),
]


def random_data(tensors: Sequence[TensorInfo], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        info.name: torch.randint(0, 120, (tensor_bytes(info),), generator=generator).to(torch.uint8)
        for info in tensors
    }


def write(
    path: Path,
    metadata: Sequence[KeyValue] = METADATA,
    tensors: Sequence[TensorInfo] = TENSORS,
    split_bytes: int | None = None,
) -> tuple[Path, ...]:
    writer = GgufWriter(path, metadata, tensors, split_bytes)
    for name, data in random_data(tensors).items():
        writer.add(name, data)
    return writer.close()


@pytest.mark.parametrize("split_bytes", [None, 1, 600, 10**6])
def test_the_gguf_package_reads_what_was_written(split_bytes: int | None, tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", split_bytes=split_bytes)

    readers = [gguf.GGUFReader(path) for path in paths]
    found = [tensor for reader in readers for tensor in reader.tensors]
    assert [tensor.name for tensor in found] == [info.name for info in TENSORS]
    for tensor, (info, data) in zip(
        found, zip(TENSORS, random_data(TENSORS).values(), strict=True), strict=True
    ):
        assert tuple(reversed(tensor.shape.tolist())) == info.shape
        assert tensor.tensor_type == gguf.GGMLQuantizationType[info.type]
        assert np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8).ravel(), data.numpy())
    for entry in METADATA:
        field = readers[0].fields[entry.key]
        assert field.contents() == entry.value
        assert field.types == [entry.type, *([entry.element] if entry.element else [])][: len(field.types)]
    keys = [key for key in readers[0].fields if not key.startswith(("GGUF.", "split."))]
    assert keys == ["general.architecture", *(e.key for e in METADATA if e is not ARCHITECTURE)]


def test_shards_are_numbered_from_one_and_hold_no_more_than_asked(tmp_path: Path) -> None:
    paths = write(tmp_path / "model.gguf", split_bytes=600)
    assert [path.name for path in paths] == [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for index, path in enumerate(paths):
        reader = gguf.GGUFReader(path)
        assert reader.fields["split.no"].contents() == index
        assert reader.fields["split.tensors.count"].contents() == len(TENSORS)
        assert sum(int(t.n_bytes) for t in reader.tensors) <= 600 or len(reader.tensors) == 1


def test_one_shard_is_no_split_and_nothing_is_said_of_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        paths = write(tmp_path / "model.gguf", split_bytes=10**9)
    assert paths == (tmp_path / "model.gguf",)
    assert "split.count" not in gguf.GGUFReader(paths[0]).fields
    assert not caplog.records


def test_the_layout_of_the_file_that_entries_came_from_is_left_out(tmp_path: Path) -> None:
    split = KeyValue("split.count", 9, GGUFValueType.UINT16)
    alignment = KeyValue("general.alignment", 64, GGUFValueType.UINT32)
    (with_layout,) = write(tmp_path / "with.gguf", [*METADATA, split, alignment])
    (without,) = write(tmp_path / "without.gguf")
    assert with_layout.read_bytes() == without.read_bytes()


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    (first,), (second,) = write(tmp_path / "a.gguf"), write(tmp_path / "b.gguf")
    assert first.read_bytes() == second.read_bytes()


def test_floats_are_stored_as_their_bytes(tmp_path: Path) -> None:
    values = torch.randn(4, 3)
    info = TensorInfo("a", (3, 4), "F32")
    writer = GgufWriter(tmp_path / "model.gguf", [ARCHITECTURE], [info])
    writer.add("a", values.T)  # not contiguous
    (path,) = writer.close()
    assert np.array_equal(gguf.GGUFReader(path).tensors[0].data, values.T.numpy())


cases = st.lists(
    st.tuples(
        st.sampled_from(["F32", "F16", "Q4_0", "Q8_0", "Q6_K"]),
        st.lists(st.integers(1, 3), min_size=0, max_size=2),
        st.integers(1, 2),
    ),
    min_size=0,
    max_size=6,
)
texts = st.dictionaries(st.text(max_size=8), st.text(max_size=40), max_size=4)


@given(cases, texts, st.one_of(st.none(), st.integers(1, 4000)))
@settings(max_examples=60, deadline=None)
def test_file_bytes_are_known_before_writing(
    tmp_path_factory: pytest.TempPathFactory,
    cases: list[tuple[str, list[int], int]],
    texts: dict[str, str],
    split_bytes: int | None,
) -> None:
    tensors = [
        TensorInfo(f"t{i}", (*rows, blocks * gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0]), kind)
        for i, (kind, rows, blocks) in enumerate(cases)
    ]
    metadata = [ARCHITECTURE]
    metadata += [KeyValue(f"x.{key}", value, GGUFValueType.STRING) for key, value in texts.items()]
    directory = tmp_path_factory.mktemp("bytes")

    paths = write(directory / "model.gguf", metadata, tensors, split_bytes)

    assert file_bytes(metadata, tensors, split_bytes) == sum(path.stat().st_size for path in paths)
    stored = [tensor for path in paths for tensor in gguf.GGUFReader(path).tensors]
    for tensor, data in zip(stored, random_data(tensors).values(), strict=True):
        assert np.array_equal(np.ascontiguousarray(tensor.data).view(np.uint8).ravel(), data.numpy())


def test_no_tensor_is_kept(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "model.gguf", METADATA, TENSORS)
    data = random_data(TENSORS)[TENSORS[0].name]
    kept = weakref.ref(data)
    writer.add(TENSORS[0].name, data)
    del data
    gc.collect()
    assert kept() is None
    writer.abandon()


def test_order_and_sizes_are_held_to_what_was_declared(tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "model.gguf", METADATA, TENSORS)
    data = random_data(TENSORS)
    with pytest.raises(FormatError, match=r"output_norm\.weight was added, token_embd\.weight was wanted"):
        writer.add("output_norm.weight", data["output_norm.weight"])
    with pytest.raises(FormatError, match=r"token_embd\.weight has 179 bytes, 180 were declared"):
        writer.add("token_embd.weight", data["token_embd.weight"][1:])
    writer.add("token_embd.weight", data["token_embd.weight"])
    with pytest.raises(FormatError, match=r"4 tensors were declared and not added, the first output_norm"):
        writer.close()
    writer.abandon()


@pytest.mark.parametrize("split_bytes", [None, 1])
def test_abandoning_leaves_no_file(split_bytes: int | None, tmp_path: Path) -> None:
    writer = GgufWriter(tmp_path / "model.gguf", METADATA, TENSORS, split_bytes)
    writer.add(TENSORS[0].name, random_data(TENSORS)[TENSORS[0].name])
    assert list(tmp_path.iterdir())
    writer.abandon()
    writer.abandon()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ([], [], "no general.architecture"),
        ([ARCHITECTURE, METADATA[0], METADATA[0]], [], "metadata key llama.block_count is given twice"),
        ([ARCHITECTURE], [TENSORS[0], TENSORS[0]], "tensor token_embd.weight is given twice"),
        ([ARCHITECTURE], [TensorInfo("a", (2, 40), "Q4_0")], "a has rows of 40 weights, Q4_0 stores blocks"),
        ([ARCHITECTURE], [TensorInfo("a", (2, 40), "Q9")], "a is of type 'Q9'"),
        (
            [ARCHITECTURE, KeyValue("x.y", [], GGUFValueType.ARRAY, GGUFValueType.STRING)],
            [],
            "the array x.y is empty",
        ),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    metadata: list[KeyValue], tensors: list[TensorInfo], message: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=message):
        GgufWriter(tmp_path / "model.gguf", metadata, tensors)
    with pytest.raises(FormatError, match=message):
        file_bytes(metadata, tensors)
    assert not list(tmp_path.iterdir())


def test_metadata_that_cannot_be_packed_leaves_no_file(tmp_path: Path) -> None:
    wrong = KeyValue("x.y", -1, GGUFValueType.UINT32)
    with pytest.raises(FormatError, match="does not fit its type"):
        GgufWriter(tmp_path / "model.gguf", [ARCHITECTURE, wrong], [])
    assert not list(tmp_path.iterdir())
