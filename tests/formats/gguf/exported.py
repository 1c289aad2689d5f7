"""Model directories as GGUF files, written tensor by tensor with the package's own parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from torch import Tensor

from exlq.checkpoint.open import open_checkpoint
from exlq.formats.gguf.metadata import general, hyper_parameters
from exlq.formats.gguf.tensors import Entry, file_tensors, shifted, to_file
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter
from exlq.models.model import Model
from exlq.models.open import open_model
from exlq.types import GgufFamily

# Where a test is not about the tokenizer: ids alone, {architecture}.vocab_size of them.
NO_VOCABULARY = KeyValue("tokenizer.ggml.model", "no_vocab", GGUFValueType.STRING)


def raw_config(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return config


def opened(directory: Path) -> Model:
    return open_model(directory, open_checkpoint(directory), device=torch.device("cpu"))


def family_of(model: Model) -> GgufFamily:
    assert model.family.gguf is not None
    return model.family.gguf


def ties_of(model: Model) -> dict[str, str]:
    linears = [linear for index in range(model.n_blocks) for linear in model.linears(index)]
    return {linear.spec.key: linear.tie for linear in linears if linear.tie}


def entries_of(model: Model, config: dict[str, Any]) -> tuple[Entry, ...]:
    return file_tensors(model.weights, config, family_of(model), ties_of(model), model.tied)


def stored(model: Model, entry: Entry) -> Tensor:
    """What an F32 file holds of an entry."""
    if entry.value is not None:
        return entry.value
    rows = torch.cat([model.weights.read(source).float() for source in entry.sources])
    return shifted(entry, to_file(entry, rows))


def metadata_of(model: Model, directory: Path, config: dict[str, Any]) -> list[KeyValue]:
    family = family_of(model)
    described = general(directory, "tiny", family.architecture, 123_456, 0)
    return [*described, *hyper_parameters(config, family), NO_VOCABULARY]


def write_f32(
    directory: Path, path: Path, *, config: dict[str, Any] | None = None, split_bytes: int | None = None
) -> Sequence[Path]:
    """Writes a model directory as an F32 file; `config` stands in for its config.json."""
    model, config = opened(directory), config or raw_config(directory)
    entries = entries_of(model, config)
    infos = [TensorInfo(entry.name, entry.shape, "F32") for entry in entries]
    writer = GgufWriter(path, metadata_of(model, directory, config), infos, split_bytes)
    for entry in entries:
        writer.add(entry.name, stored(model, entry))
    return writer.close()
