"""Writing GGUF files: everything but the weights first, then one tensor at a time."""

from __future__ import annotations

import io
import itertools
import os
import struct
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import gguf
import numpy as np
import torch
from gguf import GGUFValueType
from torch import Tensor

from exlq import faults
from exlq.errors import FormatError
from exlq.files import naming
from exlq.formats.gguf.values import KeyValue, TensorInfo

Split: TypeAlias = "int | Sequence[int] | None"
_ARCHITECTURE = "general.architecture"
# How the file an entry was read from is laid out; the writer has its own layout.
_OF_THE_LAYOUT = ("general.alignment", "split.no", "split.count", "split.tensors.count")


class GgufWriter:
    """Writes one GGUF file, or its shards, as tensors come; none is kept in memory.

    Args:
        path: of a single file, in a directory that exists; shards are named after it.
        metadata: with `general.architecture`; keys of another file's layout (`split.*`, alignment) are
            left out.
        tensors: all of them, in the order in which they will be added.
        split: no shard holds more bytes of tensors than this, or it holds one tensor; or how many tensors
            each shard holds, in their order; None for one file.

    Raises:
        FormatError: for metadata or tensors that a GGUF file cannot hold.
    """

    def __init__(
        self,
        path: Path,
        metadata: Sequence[KeyValue],
        tensors: Sequence[TensorInfo],
        split: Split = None,
    ) -> None:
        self._writer = _declared(metadata, tensors, split)
        self._paths = tuple(self._writer.format_shard_names(path))
        self._awaited = deque((info.name, tensor_bytes(info)) for info in tensors)
        try:
            with naming(path):
                _write_head(self._writer, path)
        except BaseException:
            self.abandon()
            raise

    def add(self, name: str, data: Tensor) -> None:
        """Appends the next tensor, whose bytes in memory are those of the file.

        Raises:
            FormatError: for a tensor out of order or of another size than declared.
        """
        if not self._awaited or self._awaited[0][0] != name:
            wanted = self._awaited[0][0] if self._awaited else "no more tensors"
            raise FormatError(f"{name} was added, {wanted} was wanted; add tensors in the order declared")
        found, wanted_bytes = data.numel() * data.element_size(), self._awaited[0][1]
        if found != wanted_bytes:
            raise FormatError(f"{name} has {found} bytes, {wanted_bytes} were declared")
        self._awaited.popleft()
        stored = data.detach().cpu().contiguous().flatten().view(torch.uint8)
        with naming(self._paths[0]):
            self._writer.write_tensor_data(stored.numpy())
        faults.point("gguf data")  # the last of it is still in the buffer of the file

    def close(self) -> tuple[Path, ...]:
        """Flushes every shard to the disk and returns their paths.

        Raises:
            FormatError: if a tensor was not added.
        """
        if self._awaited:
            raise FormatError(
                f"{len(self._awaited)} tensors were declared and not added, the first {self._awaited[0][0]}"
            )
        with naming(self._paths[0]):
            for file in self._writer.fout or ():
                file.flush()
                os.fsync(file.fileno())
            self._writer.close()
        return self._paths

    def abandon(self) -> None:
        """Closes and removes what was written so far; also after `close`."""
        for file in self._writer.fout or ():
            with suppress(OSError):  # of what could not be written before, and need not be now
                file.close()
        self._writer.fout = None
        for path in self._paths:
            path.unlink(missing_ok=True)


def file_bytes(metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo], split: Split = None) -> int:
    """Bytes of all shards together, exactly, that `GgufWriter` would write; raises as it does."""
    writer = _declared(metadata, tensors, split)
    shards = [io.BytesIO() for _ in writer.tensors]
    writer.fout, writer.state = shards, gguf.gguf_writer.WriterState.EMPTY
    _write_head(writer)
    total = 0
    for shard, stored in zip(shards, writer.tensors, strict=True):
        header = len(shard.getbuffer())
        total += _padded(header) if stored else header
        total += sum(_padded(info.nbytes) for info in stored.values())
    return total


def tensor_bytes(info: TensorInfo) -> int:
    """Bytes of a tensor's blocks, without padding; raises FormatError for rows that are no whole blocks."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[_type(info)]
    row_length = info.shape[-1]
    if row_length % block_size:
        raise FormatError(
            f"{info.name} has rows of {row_length} weights, {info.type} stores blocks of {block_size}; "
            "choose a type whose block divides them"
        )
    return prod(info.shape) // int(block_size) * int(type_size)


def _declared(metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo], split: Split) -> Any:
    """A writer of the gguf package that knows all but the data, with no file open yet."""
    entries = {entry.key: entry for entry in metadata if entry.key not in _OF_THE_LAYOUT}
    _check(entries, metadata, tensors)
    split_bytes, starts = split if isinstance(split, int) else 0, Counter[int]()
    if isinstance(split, Sequence):
        assert sum(split) == len(tensors), (split, len(tensors))
        starts = Counter(itertools.accumulate(split[:-1]))
    writer = gguf.GGUFWriter(None, entries.pop(_ARCHITECTURE).value, split_max_size=split_bytes)
    for entry in entries.values():
        writer.add_key_value(entry.key, entry.value, entry.type, sub_type=entry.element)
    for index, info in enumerate(tensors):
        writer.tensors += [{} for _ in range(starts[index])]
        # any dtype but uint8 says that the shape is that of the weights, not of their bytes
        writer.add_tensor_info(
            info.name, info.shape, np.dtype(np.float32), tensor_bytes(info), raw_dtype=_type(info)
        )
    writer.tensors += [{} for _ in range(starts[len(tensors)])]
    if len(writer.tensors) == 1:
        writer.split_max_size = 0  # it would warn that it does not split
    return writer


def _write_head(writer: Any, path: Path | None = None) -> None:
    writer.write_header_to_file(path)
    try:
        writer.write_kv_data_to_file()
    except (struct.error, TypeError, ValueError, AttributeError, OverflowError) as exc:
        raise FormatError(f"a metadata value does not fit its type ({exc}); check types and ranges") from exc
    writer.write_ti_data_to_file()


def _check(entries: dict[str, KeyValue], metadata: Sequence[KeyValue], tensors: Sequence[TensorInfo]) -> None:
    if _ARCHITECTURE not in entries:
        raise FormatError(f"no {_ARCHITECTURE} in the metadata, which every GGUF file has")
    kept = [entry.key for entry in metadata if entry.key not in _OF_THE_LAYOUT]
    for kind, names in {"metadata key": kept, "tensor": [info.name for info in tensors]}.items():
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise FormatError(f"{kind} {twice} is given twice, wanted once")
    for entry in entries.values():
        if entry.type == GGUFValueType.ARRAY and (entry.element is None or not len(entry.value)):
            raise FormatError(f"the array {entry.key} is empty or has no element type; leave it out")


def _type(info: TensorInfo) -> gguf.GGMLQuantizationType:
    try:
        return gguf.GGMLQuantizationType[info.type]
    except KeyError as exc:
        raise FormatError(
            f"{info.name} is of type {info.type!r}, which the gguf package does not know"
        ) from exc


def _padded(n_bytes: int) -> int:
    return int(gguf.GGUFWriter.ggml_pad(n_bytes, gguf.GGUF_DEFAULT_ALIGNMENT))
