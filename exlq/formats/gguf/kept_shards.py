"""Files split as another one is: which of its tensors lie in which shard, and writing them so."""

from __future__ import annotations

import io
import mmap
import os
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from exlq.formats.gguf.header import read_header
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import file_bytes, tensor_bytes

ARCHITECTURE, LAYOUT = "general.architecture", ("split.", "general.alignment")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def shard_paths(file: GgufFile) -> list[Path]:
    """All shards of a file, itself where it is one."""
    count = file.metadata["split.count"].value if "split.count" in file.metadata else 1
    match = SHARD.fullmatch(file.path.name)
    if match is None or count <= 1:
        return [file.path]
    return [file.path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]


def without_number(path: Path) -> Path:
    """The name a split file has as a whole."""
    match = SHARD.fullmatch(path.name)
    return path if match is None else path.with_name(f"{match[1]}.gguf")


def tensors_by_shard(file: GgufFile) -> list[int]:
    """How many tensors each shard of a file holds."""
    return [_n_tensors(path) for path in shard_paths(file)]


class KeptShards:
    """Writes shards that hold as many tensors each as is given; else as `GgufWriter`.

    Raises:
        FormatError: for metadata or tensors that a GGUF file cannot hold.
    """

    def __init__(
        self, path: Path, metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo], shards: Sequence[int]
    ) -> None:
        self._writer = _declared(metadata, tensors, shards)
        self._paths = tuple(self._writer.format_shard_names(path))
        self._awaited = deque(info.name for info in tensors)
        try:
            _write_head(self._writer, path)
        except BaseException:
            self.abandon()
            raise

    def add(self, name: str, data: Tensor) -> None:
        """Appends the next tensor, whose bytes in memory are those of the file."""
        wanted = self._awaited.popleft()
        assert wanted == name, (wanted, name)
        self._writer.write_tensor_data(data.contiguous().flatten().view(torch.uint8).numpy())

    def close(self) -> tuple[Path, ...]:
        """Flushes every shard to the disk and returns their paths."""
        assert not self._awaited, self._awaited
        for file in self._writer.fout or ():
            file.flush()
            os.fsync(file.fileno())
        self._writer.close()
        return self._paths

    def abandon(self) -> None:
        """Closes and removes what was written so far."""
        self._writer.close()
        for path in self._paths:
            path.unlink(missing_ok=True)


def kept_bytes(metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo], shards: Sequence[int]) -> int:
    """Bytes of all shards together, exactly, that `KeptShards` would write; raises as it does."""
    writer = _declared(metadata, tensors, shards)
    heads = [io.BytesIO() for _ in writer.tensors]
    writer.fout, writer.state = heads, gguf.gguf_writer.WriterState.EMPTY
    _write_head(writer)
    total = 0
    for head, stored in zip(heads, writer.tensors, strict=True):
        size = len(head.getbuffer())
        total += _padded(size) if stored else size
        total += sum(_padded(info.nbytes) for info in stored.values())
    return total


def _declared(metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo], shards: Sequence[int]) -> Any:
    """A writer of the gguf package that knows all but the data, with no file open yet."""
    assert sum(shards) == len(tensors), (shards, len(tensors))
    file_bytes(metadata, tensors)  # raises for what no file can hold
    entries = {entry.key: entry for entry in metadata if not entry.key.startswith(LAYOUT)}
    writer = gguf.GGUFWriter(None, entries.pop(ARCHITECTURE).value)
    for entry in entries.values():
        writer.add_key_value(entry.key, entry.value, entry.type, sub_type=entry.element)
    waiting = deque(tensors)
    for index, count in enumerate(shards):
        if index:
            writer.tensors.append({})
        for info in (waiting.popleft() for _ in range(count)):
            kind = gguf.GGMLQuantizationType[info.type]
            # any dtype but uint8 says that the shape is that of the weights, not of their bytes
            writer.add_tensor_info(
                info.name, info.shape, np.dtype(np.float32), tensor_bytes(info), raw_dtype=kind
            )
    return writer


def _write_head(writer: Any, path: Path | None = None) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def _n_tensors(path: Path) -> int:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return len(read_header(data).tensors)


def _padded(n_bytes: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(n_bytes, gguf.GGUF_DEFAULT_ALIGNMENT))
