"""Shards of a split GGUF file: their names, and which tensors lie in which."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

from exlq.formats.gguf.header import read_header
from exlq.formats.gguf.reader import GgufFile

_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def shard_paths(file: GgufFile) -> list[Path]:
    """All shards of a file, itself where it is one."""
    count = file.metadata["split.count"].value if "split.count" in file.metadata else 1
    match = _SHARD.fullmatch(file.path.name)
    if match is None or count <= 1:
        return [file.path]
    return [file.path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def without_number(path: Path) -> Path:
    """The name a split file has as a whole."""
    match = _SHARD.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}.gguf")


def tensors_by_shard(file: GgufFile) -> list[int]:
    """How many tensors each shard of a file holds."""
    return [_n_tensors(path) for path in shard_paths(file)]


def _n_tensors(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return len(read_header(data).tensors)
