"""Metadata of a requantized file: the input's own, with what the new types change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType

from exlq.errors import ConfigError, ModelError
from exlq.formats.gguf.imatrix import Imatrix
from exlq.formats.gguf.recipes import Shape
from exlq.formats.gguf.values import KeyValue

FILE_TYPE, VERSION = "general.file_type", "general.quantization_version"
LAYOUT = ("split.", "general.alignment")  # keys the writer sets by itself
WANTED_ITEM = "want KEY=TYPE:VALUE with a type of int, float, bool, str"
LARGEST_UINT32 = 2**32 - 1


def shape_of(metadata: Mapping[str, KeyValue]) -> Shape:
    """What recipes ask of a model, from its metadata; heads are those of the first block.

    Raises:
        ModelError: if the file does not tell its architecture or the number of its blocks.
    """
    architecture = _value(metadata, "general.architecture")
    if not isinstance(architecture, str):
        raise ModelError("the file has no general.architecture, which every GGUF file has; copy it again")
    n_blocks = _number(metadata, f"{architecture}.block_count")
    if n_blocks is None:
        raise ModelError(
            f"the file has no {architecture}.block_count, which recipes ask; give --pure or a model"
        )
    n_heads = _number(metadata, f"{architecture}.attention.head_count") or 0
    n_kv_heads = _number(metadata, f"{architecture}.attention.head_count_kv")
    n_experts = _number(metadata, f"{architecture}.expert_count") or 0
    return Shape(architecture, n_blocks, n_heads, n_heads if n_kv_heads is None else n_kv_heads, n_experts)


def carried(
    metadata: Mapping[str, KeyValue], file_type: int | None, changed: Sequence[KeyValue]
) -> list[KeyValue]:
    """The input's entries in their order, without its layout, with what is new.

    Arrays of no elements, which the writer refuses, are left out.

    Args:
        file_type: number of the recipe; None where no type changes.
        changed: entries that replace those of their keys, or are added.
    """
    new = [] if file_type is None else [_uint32(VERSION, GGML_QUANT_VERSION), _uint32(FILE_TYPE, file_type)]
    entries = dict(metadata) | {entry.key: entry for entry in (*new, *changed)}
    return [entry for entry in entries.values() if not entry.key.startswith(LAYOUT) and not _is_empty(entry)]


def imatrix_entries(path: Path, imatrix: Imatrix) -> list[KeyValue]:
    """Where the importance came from, as llama-quantize says it, but for the directory of the file."""
    entries = [_string("quantize.imatrix.file", path.name)]
    if imatrix.datasets:
        entries.append(_string("quantize.imatrix.dataset", imatrix.datasets[0]))
    entries.append(_uint32("quantize.imatrix.entries_count", len(imatrix.entries)))
    if imatrix.chunk_count > 0:
        entries.append(_uint32("quantize.imatrix.chunks_count", imatrix.chunk_count))
    return entries


def parse_override_kv(items: Sequence[str]) -> list[KeyValue]:
    """The entries of `--override-kv` items KEY=TYPE:VALUE.

    Whole numbers become uint32, as in llama-quantize, and int32 below zero.

    Raises:
        ConfigError: for an item of another form, or a key that describes the file's layout.
    """
    return [_parse_item(item) for item in items]


def _parse_item(item: str) -> KeyValue:
    key, equals, typed = item.partition("=")
    kind, colon, text = typed.partition(":")
    if not key or not equals or not colon or kind not in _PARSERS:
        raise ConfigError(f"--override-kv {item!r}: {WANTED_ITEM}, as llama.rope.freq_base=float:10000")
    if key.startswith(LAYOUT):
        raise ConfigError(f"--override-kv {item!r}: {key} follows from the shards; leave it out")
    try:
        return _PARSERS[kind](key, text)
    except (ValueError, KeyError) as exc:
        raise ConfigError(f"--override-kv {item!r}: {text!r} is no {kind}; {WANTED_ITEM}") from exc


def _integer(key: str, text: str) -> KeyValue:
    value = int(text)
    if not -(2**31) <= value <= LARGEST_UINT32:
        raise ValueError(value)
    return KeyValue(key, value, GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32)


def _float(key: str, text: str) -> KeyValue:
    return KeyValue(key, float(text), GGUFValueType.FLOAT32)


def _bool(key: str, text: str) -> KeyValue:
    return KeyValue(key, {"true": True, "false": False}[text], GGUFValueType.BOOL)


def _string(key: str, text: str) -> KeyValue:
    return KeyValue(key, text, GGUFValueType.STRING)


def _uint32(key: str, value: int) -> KeyValue:
    return KeyValue(key, value, GGUFValueType.UINT32)


def _value(metadata: Mapping[str, KeyValue], key: str) -> Any:
    return metadata[key].value if key in metadata else None


def _number(metadata: Mapping[str, KeyValue], key: str) -> int | None:
    """A whole number, or the first of a list of one for each block."""
    value = _value(metadata, key)
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, int) else None


def _is_empty(entry: KeyValue) -> bool:
    return entry.type == GGUFValueType.ARRAY and not len(entry.value)


_PARSERS: dict[str, Callable[[str, str], KeyValue]] = {
    "int": _integer,
    "float": _float,
    "bool": _bool,
    "str": _string,
}
