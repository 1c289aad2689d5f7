"""Tensors of a model as a GGUF file made by llama.cpp's own converter has them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from exlq.errors import ModelError
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.recipes import Shape
from exlq.formats.gguf.tensors import (
    Entry,
    file_place,
    file_shape,
    find_name,
    name_map,
    pair_order,
    stored_names,
)
from exlq.formats.gguf.values import KeyValue
from exlq.formats.gguf_blocks import FLOAT_TYPES
from exlq.types import GgufFamily, Weights

COMPARED_COLUMNS = 64
TOLERANCES = {"F32": 1e-6, "F16": 1e-3, "BF16": 1e-2}  # of the largest value: what the type's rounding may do
NORM_SHIFTS = (0.0, 1.0)  # Gemma's converter adds one
OWN_KEYS = ("split.", "exlq.", "general.file_type", "general.quantization_version")


def template_shape(template: GgufFile) -> Shape:
    """What recipes want to know of the model.

    Raises:
        ModelError: if the template does not say.
    """
    architecture = str(_value(template, "general.architecture"))

    def number(key: str, default: int | None = None) -> int:
        found = _value(template, f"{architecture}.{key}", default)
        return int(found[0] if isinstance(found, list) else found)

    heads = number("attention.head_count")
    kv_heads = number("attention.head_count_kv", heads)
    return Shape(architecture, number("block_count"), heads, kv_heads, number("expert_count", 0))


def template_metadata(template: GgufFile) -> list[KeyValue]:
    """All that does not hang on the tensors' types, as it stands there."""
    return [entry for key, entry in template.metadata.items() if not key.startswith(OWN_KEYS)]


def template_tensors(weights: Weights, template: GgufFile, ties: Mapping[str, str]) -> tuple[Entry, ...]:
    """Every tensor of the template and the model's tensors it is made of, in our order.

    How rows were ordered and norms shifted is found by comparing values. What the model does not have
    (as rope factors) is taken over.

    Raises:
        ModelError: if a matrix cannot be matched by its name, or its values are not the model's.
    """
    shape = template_shape(template)
    names = name_map(GgufFamily(shape.architecture), shape.n_blocks)
    sources = {
        find_name(names, stored, shape.architecture): found
        for stored, found in stored_names(weights.keys(), ties).items()
    }
    entries = [_entry(weights, template, name, sources.get(name, ()), shape) for name in template.tensors]
    return tuple(sorted(entries, key=lambda entry: file_place(entry.name)))


def _entry(weights: Weights, template: GgufFile, name: str, sources: tuple[str, ...], shape: Shape) -> Entry:
    info = template.tensors[name]
    if info.type not in FLOAT_TYPES:
        raise ModelError(f"{template.path}: {name} is {info.type}; the template must be F32, F16 or BF16")
    if not sources:
        if len(info.shape) > 1:
            raise ModelError(
                f"{template.path}: {name} matches no tensor of the model, so it cannot be quantized"
            )
        values = FLOAT_TYPES[info.type].unpack(template.read(name))
        return Entry(name, (), (), info.shape, value=values)
    rows = tuple(weights.shape(source)[0] for source in sources)
    if info.shape != file_shape(name, [weights.shape(source) for source in sources]):
        raise ModelError(f"{template.path}: {name} is {info.shape}, the model's is of another size")
    order, shift = _transformation(weights, template, name, sources, shape)
    return Entry(name, sources, rows, info.shape, order=order, shift=shift)


def _transformation(
    weights: Weights, template: GgufFile, name: str, sources: tuple[str, ...], shape: Shape
) -> tuple[Tensor | None, float]:
    """The order of rows and the shift that make the template's tensor of the model's."""
    kind = template.tensors[name].type
    given = torch.cat([_some_columns(weights.read(source).float()) for source in sources])
    stored = template.read(name)
    values = FLOAT_TYPES[kind].unpack(stored.reshape(-1, stored.shape[-1]))
    wanted = _some_columns(values.reshape(len(given), -1))
    allowed = TOLERANCES[kind] * float(wanted.abs().max().clamp_min(1e-30))
    for order in _orders(name, len(given), shape):
        turned = given if order is None else given[order]
        for shift in NORM_SHIFTS if given.shape[-1] == 1 else NORM_SHIFTS[:1]:
            if (turned + shift - wanted).abs().max() <= allowed:
                return order, shift
    raise ModelError(
        f"{template.path}: {name} does not hold the values of {', '.join(sources)}: "
        "give a template made of this model"
    )


def _orders(name: str, rows: int, shape: Shape) -> Iterator[Tensor | None]:
    yield None
    yield pair_order(name, rows, shape.n_heads, shape.n_kv_heads)


def _some_columns(values: Tensor) -> Tensor:
    """(rows, columns) of the first columns; a vector is one column."""
    return values.reshape(len(values), -1)[:, :COMPARED_COLUMNS]


def _value(template: GgufFile, key: str, default: Any = None) -> Any:
    if key in template.metadata:
        return template.metadata[key].value
    if default is None:
        raise ModelError(f"{template.path} has no {key}; give a model's GGUF as the template")
    return default
