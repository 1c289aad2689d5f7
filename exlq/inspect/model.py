"""What a Hugging Face model directory, or one safetensors file, holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from exlq.checkpoint.files import PICKLES, SAFETENSORS, find_weight_files
from exlq.errors import ModelError
from exlq.inspect.record import Entry, Inspection
from exlq.inspect.safetensors import Stored, read_headers
from exlq.models.config import read_json
from exlq.sizing.advice import writable
from exlq.sizing.shapes import ModelShape, read_shape

SETTINGS = {
    "blocks": "num_hidden_layers",
    "hidden size": "hidden_size",
    "MLP size": "intermediate_size",
    "heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "vocabulary": "vocab_size",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def inspect_model(directory: Path) -> Inspection:
    """A model directory from config.json and the heads of its weight files.

    Raises:
        ModelError: for no config.json, or files that are not whole or not as the index says.
    """
    config = read_json(directory)
    notes: list[str] = []
    shape, known = _family(directory, notes)
    stored = _stored(directory, notes)
    if shape is not None:
        notes += _contradictions(shape, stored)
    facts = {
        "architecture": str(config.get("architectures")).strip("[]'"),
        **known,
        **_sizes(stored, shape),
        **_experts(shape),
        **{name: config[key] for name, key in SETTINGS.items() if config.get(key) is not None},
        "tokenizer": next((name for name in TOKENIZERS if (directory / name).is_file()), "none"),
    }
    return Inspection(str(directory), "model", facts, entries_of(stored), tuple(notes))


def inspect_safetensors(path: Path) -> Inspection:
    """One file of tensors; raises ModelError where it is not whole."""
    stored = read_headers([path])
    return Inspection(str(path), "safetensors", _sizes(stored, None), entries_of(stored))


def entries_of(stored: Mapping[str, Stored]) -> tuple[Entry, ...]:
    """Each tensor as it stands."""
    return tuple(
        Entry(name, t.dtype, t.shape, t.numel, 8 * t.n_bytes / t.numel if t.numel else None, t.n_bytes)
        for name, t in stored.items()
    )


def _family(directory: Path, notes: list[str]) -> tuple[ModelShape | None, dict[str, str]]:
    """The shape config.json describes; the family and what it can become, or why it is not supported."""
    try:
        shape = read_shape(directory)
        formats, reasons = writable(shape)
    except ModelError as exc:
        return None, {"family": f"not supported: {exc}"}
    notes += reasons
    return shape, {"family": shape.family.name, "becomes": ", ".join(formats)}


def _stored(directory: Path, notes: list[str]) -> dict[str, Stored]:
    """The tensors listed by safetensors headers; why there are none goes to `notes`."""
    files = [path.name for path in directory.iterdir() if path.is_file()]
    if not any(name.removesuffix(".index.json").endswith((SAFETENSORS, *PICKLES)) for name in files):
        notes.append("there are no weights here; sizes are those that config.json describes")
        return {}
    found = find_weight_files(directory)
    if not all(name.endswith(SAFETENSORS) for name in found.names):
        notes.append(
            f"the tensors of {len(found.names)} pickled files are not listed; sizes are config.json's"
        )
        return {}
    stored = read_headers(directory / name for name in found.names)
    for name, file in (found.promised or {}).items():
        if name not in stored or stored[name].path.name != file:
            raise ModelError(f"{directory / file} lacks {name}, which {found.index} says it holds")
    return stored


def _sizes(stored: Mapping[str, Stored], shape: ModelShape | None) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if stored:
        weights = sum(tensor.numel for tensor in stored.values())
        facts["parameters"] = weights
        facts["dtypes"] = ", ".join(dict.fromkeys(tensor.dtype for tensor in stored.values()))
        facts["bytes"] = sum(tensor.n_bytes for tensor in stored.values())
        facts["files"] = len({tensor.path for tensor in stored.values()})
    elif shape is not None:
        matrices = shape.numel + shape.embedding.numel * (1 if shape.tied else 2)
        facts["parameters"] = matrices + sum(vector.numel for vector in shape.vectors)
    if shape is not None:
        facts["parameters of the decoder's linears"] = shape.numel
    return facts


def _experts(shape: ModelShape | None) -> dict[str, str]:
    """What the blocks have in place of one MLP."""
    if shape is None or not shape.sparse.count:
        return {}
    sparse = shape.sparse
    beside = f", beside one of {sparse.shared} channels" if sparse.shared else ""
    return {"experts": f"{sparse.count} of {sparse.width} channels, {sparse.per_token} to a token{beside}"}


def _contradictions(shape: ModelShape, stored: Mapping[str, Stored]) -> Iterator[str]:
    """Where the weights are not of the shape that config.json describes."""
    for spec in (*shape.linears, shape.embedding):
        found, wanted = stored.get(f"{spec.key}.weight"), (spec.out_features, spec.in_features)
        if found is not None and found.shape != wanted:
            yield f"{spec.key}.weight is {found.shape}, config.json describes {wanted}"
            return
