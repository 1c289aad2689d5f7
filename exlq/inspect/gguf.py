"""What a GGUF file holds, with all its shards, from the heads of the files."""

from __future__ import annotations

import math
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from gguf import LlamaFileType

from exlq.errors import ModelError
from exlq.formats.gguf.header import BrokenHeaderError, Header, Listed, read_header
from exlq.formats.gguf.values import KeyValue
from exlq.inspect.measured import chosen
from exlq.inspect.record import Entry, Inspection
from exlq.sizing.tables import FILE_LINEARS

SHARD = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
KEYS = {
    stored: name for name, stored in FILE_LINEARS.items() if not name.endswith(("qkv_proj", "gate_up_proj"))
}
ENDS = {"token_embd.weight": "model.embed_tokens", "output.weight": "lm_head"}
MOST_ITEMS, MOST_CHARACTERS = 8, 300  # of a metadata value that are shown
SIZES = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "expert_count",
    "expert_used_count",
    "vocab_size",
)


@dataclass(frozen=True)
class Shard:
    """One file: what it says of itself and its tensors."""

    n_bytes: int
    header: Header
    metadata: Mapping[str, Any]
    entries: tuple[Entry, ...]


def inspect_gguf(path: Path) -> Inspection:
    """A GGUF file; of a split one, given by its first, all shards.

    Raises:
        ModelError: for a file that is missing, not whole or breaks the rules of the format.
    """
    first = _shard(path)
    shards = [first, *(_shard(other) for other in _others(path, first.metadata))]
    entries = [entry for shard in shards for entry in shard.entries]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        [(twice, _)] = Counter(names).most_common(1)
        raise ModelError(f"{path} holds {twice} twice, or two shards do; copy it again")
    declared = first.metadata.get("split.tensors.count", len(names))
    if declared != len(names):
        raise ModelError(f"{path} and its shards hold {len(names)} of {declared} tensors; copy them again")
    figured, notes = _with_figures(entries, path)
    return Inspection(str(path), "gguf", _facts(shards, entries), figured, notes, first.metadata)


def _shard(path: Path) -> Shard:
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:  # ValueError: mmap takes no empty file
        raise ModelError(f"{path} cannot be read as a GGUF file: {exc}") from exc
    try:
        header = read_header(data)
        entries = tuple(_entry(listed, header, len(data)) for listed in header.tensors)
        metadata = {key: shortened(header.metadata[key]) for key in header.metadata}
    except BrokenHeaderError as exc:
        raise ModelError(f"{path} is not a whole GGUF file: {exc}; copy it again") from exc
    finally:
        with suppress(BufferError):  # a view that an exception still holds; the map goes with it
            data.close()
    return Shard(path.stat().st_size, header, metadata, entries)


def _entry(listed: Listed, header: Header, size: int) -> Entry:
    """A tensor that lies inside the file."""
    info, weights = listed.info, prod(listed.info.shape)
    if listed.offset % header.alignment:
        raise BrokenHeaderError(f"{info.name} begins at {listed.offset}, no multiple of {header.alignment}")
    n_bytes = prod(info.shape[:-1]) * (listed.row_bytes or 0)
    end = -(-header.end // header.alignment) * header.alignment + listed.offset + n_bytes
    if end > size:
        raise BrokenHeaderError(f"{info.name} ends at byte {end} of {size}")
    if listed.row_bytes is None:
        return Entry(info.name, f"type {info.type}", info.shape, weights)
    return Entry(info.name, info.type, info.shape, weights, 8 * n_bytes / weights, n_bytes)


def _others(path: Path, metadata: Mapping[str, Any]) -> list[Path]:
    """The other files of a split, found by name, as llama.cpp does."""
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int:
        raise ModelError(f"{path}: split.count is {count!r} and split.no {number!r}, numbers were wanted")
    if count <= 1:
        return []
    if number != 0:
        raise ModelError(f"{path} is shard {number + 1} of {count}; give the first")
    match = SHARD.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelError(f"{path} is the first of {count} shards; wanted a name with -00001-of-{count:05d}")
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]


def shortened(entry: KeyValue) -> Any:
    """A metadata value, of a long array or text only the beginning and how long it is."""
    value = entry.value
    if isinstance(value, list) and len(value) > MOST_ITEMS:
        first = ", ".join(str(item)[:MOST_CHARACTERS] for item in value[:MOST_ITEMS])
        return f"{first}, … ({len(value):,} in all)"
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        value = repr(value)
    if isinstance(value, str) and len(value) > MOST_CHARACTERS:
        return f"{value[:MOST_CHARACTERS]}… ({len(value):,} characters)"
    return value


def _facts(shards: list[Shard], entries: list[Entry]) -> dict[str, Any]:
    metadata = shards[0].metadata
    architecture = metadata.get("general.architecture", "unknown")
    weights, n_bytes = sum(entry.weights for entry in entries), sum(shard.n_bytes for shard in shards)
    sizes = ((name, metadata.get(f"{architecture}.{name}")) for name in SIZES)
    return {
        "name": metadata.get("general.name", "none"),
        "architecture": architecture,
        "file type": _file_type(metadata.get("general.file_type")),
        "parameters": weights,
        "bytes": n_bytes,
        "files": len(shards),
        "bits per weight": round(8 * n_bytes / max(1, weights), 4),
        "tensors": len(entries),
        **{name.replace("_", " "): value for name, value in sizes if value is not None},
        "metadata entries": len(metadata),
    }


def _file_type(number: Any) -> str:
    try:
        return str(LlamaFileType(number).name).removeprefix("MOSTLY_")
    except ValueError:
        return "none" if number is None else str(number)


def _with_figures(entries: list[Entry], path: Path) -> tuple[tuple[Entry, ...], tuple[str, ...]]:
    """Errors of the job that this file lies in, if its types are those the job chose."""
    found, notes = chosen(path.absolute().parent.parent, "gguf")
    pairs = [(entry, found.get(_key(entry.name, entries))) for entry in entries]
    if any(pair is not None and pair[1].desc != entry.type for entry, pair in pairs):
        return tuple(entries), ("the measurement beside it is of another file, so errors are not shown",)
    return tuple(_figured(pairs)), notes


def _figured(pairs: list[tuple[Entry, Any]]) -> Iterator[Entry]:
    for entry, pair in pairs:
        if pair is None:
            yield entry
        else:
            linear, option = pair
            yield replace(entry, error=option.err, loss=option.loss, sensitivity=linear.sensitivity)


def _key(name: str, entries: list[Entry]) -> str:
    """The linear a tensor is, as a measurement names it; what is fused has none of its own."""
    block = BLOCK.fullmatch(name)
    if block is None:
        return ENDS.get(name, "")
    return f"model.layers.{block[1]}.{KEYS.get(block[2], '')}"
