"""A written file read back under the checkpoint's names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exlq.checkpoint.open import open_checkpoint
from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.tensors import Entry
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf.weights import GgufWeights
from exlq.formats.gguf.writer import GgufWriter
from exlq.models.families import FAMILIES
from exlq.models.open import open_model
from tests.conftest import TinyMaker
from tests.formats.gguf.exported import entries_of, opened, raw_config, write_f32
from tests.formats.gguf.test_writer import ARCHITECTURE

CASES = [
    (family, tied)
    for family in FAMILIES
    for tied in (True, False)
    if (family, tied) not in (("gemma", False), ("gemma2", False), ("qwen2_moe", True))
]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_an_f32_file_gives_the_checkpoint_back(
    family: str, tied: bool, tiny: TinyMaker, tmp_path: Path
) -> None:
    directory = tiny(family, tied)
    write_f32(directory, tmp_path / "model.gguf")
    model = opened(directory)
    entries = entries_of(model, raw_config(directory))
    shifts = {source: entry.shift for entry in entries for source in entry.sources}
    with GgufFile(tmp_path / "model.gguf") as file:
        weights = GgufWeights(file, entries)
        again = open_model(directory, weights, device=torch.device("cpu"))
        assert set(again.weights.keys()) == set(model.weights.keys())
        for key in model.weights.keys():  # noqa: SIM118
            wanted, found = model.weights.read(key), again.weights.read(key)
            assert found.dtype == torch.float32 == again.weights.dtype(key)
            assert again.weights.shape(key) == tuple(found.shape)
            if shifts.get(key):
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-7)  # one was added and taken away
            else:
                assert torch.equal(found, wanted)
        checkpoint = open_checkpoint(directory)
        ids = torch.tensor([[3, 7, 200, 7]])
        plain = open_model(directory, checkpoint, device=torch.device("cpu")).embed(ids)
        assert torch.equal(again.embed(ids), plain)


def test_rows_are_those_of_the_whole(tmp_path: Path) -> None:
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    entries = [
        Entry("a", ("q", "k"), (6, 2), (8, 4), order, shift=1.0),
        Entry("b", ("n",), (3,), (3,), shift=1.0),
    ]
    infos = [TensorInfo("a", (8, 4), "F16"), TensorInfo("b", (3,), "F32")]
    values = torch.arange(32).view(8, 4).half()
    writer = GgufWriter(tmp_path / "model.gguf", [ARCHITECTURE], infos)
    writer.add("a", values[order] + 1)
    writer.add("b", torch.tensor([1.0, 2.0, 3.0]))
    writer.close()
    with GgufFile(tmp_path / "model.gguf") as file:
        for rows in (slice(1, 4), slice(None, None, 2), torch.tensor([1, 0, 1])):
            fresh, warm = GgufWeights(file, entries), GgufWeights(file, entries)
            warm.read("k")
            for weights in (fresh, warm):
                assert torch.equal(weights.read("q", rows), values[:6][rows].float())
        assert torch.equal(GgufWeights(file, entries).read("n", slice(1, 3)), torch.tensor([1.0, 2.0]))


def test_only_asked_rows_of_a_matrix_are_unpacked(
    tiny: TinyMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny("llama", True)
    write_f32(directory, tmp_path / "model.gguf")
    entries = entries_of(opened(directory), raw_config(directory))
    with GgufFile(tmp_path / "model.gguf") as file:
        read: list[tuple[int, ...]] = []
        original = file.read
        monkeypatch.setattr(file, "read", lambda name, rows=None: _noted(read, original(name, rows)))
        weights = GgufWeights(file, entries)
        weights.read("model.embed_tokens.weight", torch.tensor([5, 9]))
        for _ in range(3):
            weights.read("model.embed_tokens.weight")
    assert read == [(2, 256), (272, 256)]


def _noted(read: list[tuple[int, ...]], value: torch.Tensor) -> torch.Tensor:
    read.append(tuple(value.shape))
    return value


def test_a_file_that_lacks_what_the_model_wants_is_refused(tmp_path: Path) -> None:
    infos = [TensorInfo("a", (2, 32), "F32"), TensorInfo("b", (2, 256), "IQ2_XXS")]
    writer = GgufWriter(tmp_path / "model.gguf", [ARCHITECTURE], infos)
    writer.add("a", torch.zeros(2, 32))
    writer.add("b", torch.zeros(2, 66, dtype=torch.uint8))
    writer.close()
    with GgufFile(tmp_path / "model.gguf") as file:
        with pytest.raises(FormatError, match="has no tensor c"):
            GgufWeights(file, [Entry("c", ("x",), (2,), (2, 32))])
        with pytest.raises(FormatError, match=r"a has the shape \(2, 32\), wanted \(3, 32\)"):
            GgufWeights(file, [Entry("a", ("x",), (3,), (3, 32))])
        with pytest.raises(FormatError, match="b is IQ2_XXS, wanted one of F32"):
            GgufWeights(file, [Entry("b", ("x",), (2,), (2, 256))])
        weights = GgufWeights(file, [Entry("a", ("x",), (2,), (2, 32))])
        with pytest.raises(ModelError, match="no tensor y"):
            weights.read("y")
