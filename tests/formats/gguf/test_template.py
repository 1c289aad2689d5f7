"""A float GGUF as the pattern: its names and metadata, our rows found by its values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from exlq.errors import ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.template import template_metadata, template_shape, template_tensors
from exlq.formats.gguf.values import TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.formats.gguf_blocks import FLOAT_TYPES
from tests.formats.gguf.exported import entries_of, opened, raw_config, stored, ties_of, write_f32
from tests.helpers import make_model

FAMILIES = ("llama", "qwen2", "gemma3", "phi3")


def with_matrices_as(path: Path, kind: str, target: Path) -> Path:
    """A copy with its matrices in another float type."""
    with GgufFile(path) as file:
        infos = [
            TensorInfo(info.name, info.shape, kind if len(info.shape) == 2 else "F32")
            for info in file.tensors.values()
        ]
        writer = GgufWriter(target, list(file.metadata.values()), infos)
        for info in infos:
            values = FLOAT_TYPES["F32"].unpack(file.read(info.name))
            writer.add(info.name, FLOAT_TYPES[info.type].pack(values))
        writer.close()
    return target


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_entries_are_those_of_our_own_conversion(family: str, kind: str, tmp_path: Path) -> None:
    directory = make_model(family, tmp_path / "model", tied=family == "gemma3")
    (path,) = write_f32(directory, tmp_path / "f32.gguf")
    model = opened(directory)
    ours = {entry.name: entry for entry in entries_of(model, raw_config(directory))}
    with GgufFile(with_matrices_as(path, kind, tmp_path / "template.gguf")) as file:
        found = template_tensors(model.weights, file, ties_of(model))
    assert [entry.name for entry in found] == list(ours)
    for entry in found:
        own = ours[entry.name]
        assert (entry.sources, entry.rows, entry.shape) == (own.sources, own.rows, own.shape)
        assert torch.equal(stored(model, entry), stored(model, own))
        assert entry.matrix == own.matrix


def test_metadata_is_taken_over_but_for_what_hangs_on_the_types(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path / "model", tied=False)
    (path,) = write_f32(directory, tmp_path / "f32.gguf")
    with GgufFile(path) as file:
        taken = {entry.key: entry.value for entry in template_metadata(file)}
        dropped = set(file.metadata) - set(taken)
        shape = template_shape(file)
    assert dropped == {"general.file_type", "general.quantization_version"}
    assert (shape.architecture, shape.n_blocks, shape.n_heads, shape.n_kv_heads) == ("llama", 2, 4, 2)


def test_a_template_of_another_model_is_refused(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path / "model", tied=False)
    other = make_model("llama", tmp_path / "other", tied=False, seed=5)
    (path,) = write_f32(other, tmp_path / "f32.gguf")
    model = opened(directory)
    with GgufFile(path) as file, pytest.raises(ModelError, match="does not hold the values of"):
        template_tensors(model.weights, file, ties_of(model))


def test_a_quantized_template_is_refused(tmp_path: Path) -> None:
    directory = make_model("llama", tmp_path / "model", tied=False)
    model = opened(directory)
    entries = entries_of(model, raw_config(directory))
    (path,) = write_f32(directory, tmp_path / "f32.gguf")
    with GgufFile(path) as file:
        infos = [
            TensorInfo(e.name, e.shape, "Q8_0" if e.name == "blk.0.attn_q.weight" else "F32") for e in entries
        ]
        writer = GgufWriter(tmp_path / "q.gguf", list(file.metadata.values()), infos)
        for entry, info in zip(entries, infos, strict=True):
            size = (64, 68) if info.type == "Q8_0" else None
            writer.add(entry.name, torch.zeros(size, dtype=torch.uint8) if size else stored(model, entry))
        writer.close()
    with GgufFile(tmp_path / "q.gguf") as file, pytest.raises(ModelError, match="must be F32, F16 or BF16"):
        template_tensors(model.weights, file, ties_of(model))
