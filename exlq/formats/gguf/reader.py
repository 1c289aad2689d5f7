"""Reading GGUF files, whole or in shards, ours or others'."""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from exlq.errors import FormatError
from exlq.formats.gguf.header import BrokenHeaderError, Header, Listed, read_header
from exlq.formats.gguf.values import KeyValue, TensorInfo

_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


class GgufFile:
    """A GGUF file, or all shards of one given by the first; also a context manager.

    `metadata` maps keys to `KeyValue`s of the first shard, decoded when asked for; a string that is not
    UTF-8 is given as bytes. `tensors` maps names to `TensorInfo`s in the order of the file; the type of
    one the gguf package does not know is its number in digits. `n_bytes` is that of all shards.

    Raises:
        FormatError: for a file that is missing, cut short, of another byte order or version, or that
            breaks the rules of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shards: list[_Shard] = []
        try:
            self._shards.append(_Shard(path))
            self._shards += [_Shard(other) for other in _other_shards(path, self._shards[0])]
            self._places = _merged(self._shards)
        except BaseException:
            self.close()
            raise
        self.metadata: Mapping[str, KeyValue] = self._shards[0].metadata
        self.tensors: Mapping[str, TensorInfo] = {name: place.info for name, place in self._places.items()}
        self.n_bytes = sum(shard.size for shard in self._shards)

    def read(self, name: str, rows: slice | Tensor | None = None) -> Tensor:
        """(..., rows, row_bytes) uint8, a copy: the tensor's shape with bytes in place of the last dimension.

        `rows` picks from the first dimension of a tensor that has two or more.

        Raises:
            FormatError: for an unknown name, or a type whose size is not known.
        """
        if name not in self._places:
            raise FormatError(f"{self.path} has no tensor {name} among its {len(self._places)}")
        place = self._places[name]
        if place.row_bytes is None:
            raise FormatError(
                f"{self.path}: {name} is of ggml type {place.info.type}, whose size is not known"
            )
        shape = (*place.info.shape[:-1], place.row_bytes)
        stored = np.frombuffer(place.data, np.uint8, prod(shape), place.begin).reshape(shape)
        if rows is None:
            return torch.from_numpy(stored.copy())
        assert len(shape) > 1, f"{name} has no rows to pick from"
        picked = stored[rows.cpu().numpy()] if isinstance(rows, Tensor) else stored[rows]
        return torch.from_numpy(picked.copy())

    def close(self) -> None:
        """Closes the files; what was read stays."""
        for shard in self._shards:
            with suppress(BufferError):  # a view that an exception still holds; the map goes with it
                shard.data.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()


class _Shard:
    """One file: its metadata and the places of its tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as exc:  # ValueError: mmap takes no empty file
            raise FormatError(f"{path} cannot be read as a GGUF file: {exc}") from exc
        self.size = len(self.data)
        try:
            header = read_header(self.data)
            self.metadata = header.metadata
            self.places = [self._place(listed, header) for listed in header.tensors]
        except BrokenHeaderError as exc:
            self.data.close()
            raise FormatError(f"{path} is not a whole GGUF file: {exc}; copy it again") from exc

    def number(self, key: str, default: int) -> int:
        """A whole number of the metadata."""
        value = self.metadata[key].value if key in self.metadata else default
        if not isinstance(value, int):
            raise FormatError(f"{self.path}: {key} is {value!r}, a number was wanted")
        return value

    def _place(self, listed: Listed, header: Header) -> _Place:
        name, offset = listed.info.name, listed.offset
        if offset % header.alignment:
            raise BrokenHeaderError(f"{name} begins at {offset}, no multiple of {header.alignment}")
        begin = -(-header.end // header.alignment) * header.alignment + offset
        end = begin + prod(listed.info.shape[:-1]) * (listed.row_bytes or 0)
        if end > self.size:
            raise BrokenHeaderError(f"{name} ends at byte {end} of {self.size}")
        return _Place(listed.info, self.data, begin, listed.row_bytes)


@dataclass(frozen=True)
class _Place:
    """Where a tensor is; `row_bytes` is None for a type whose size is not known."""

    info: TensorInfo
    data: mmap.mmap
    begin: int
    row_bytes: int | None


def _other_shards(path: Path, first: _Shard) -> list[Path]:
    """The other files of a split, found by name, as llama.cpp does."""
    count, number = first.number("split.count", 1), first.number("split.no", 0)
    if count <= 1:
        return []
    match = _SHARD.fullmatch(path.name)
    if number != 0:
        raise FormatError(f"{path} is shard {number + 1} of {count}; give the first")
    if match is None or int(match["count"]) != count:
        raise FormatError(f"{path} is the first of {count} shards; wanted a name with -00001-of-{count:05d}")
    return [path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(2, count + 1)]


def _merged(shards: list[_Shard]) -> dict[str, _Place]:
    places: dict[str, _Place] = {}
    for index, shard in enumerate(shards):
        number = shard.number("split.no", 0)
        if number != index:
            raise FormatError(f"{shard.path} calls itself shard {number + 1}, its name says {index + 1}")
        for place in shard.places:
            if place.info.name in places:
                raise FormatError(f"{shard.path} holds {place.info.name} twice, or another shard does too")
            places[place.info.name] = place
    declared = shards[0].number("split.tensors.count", len(places))
    if declared != len(places):
        raise FormatError(f"{shards[0].path} and its shards hold {len(places)} of {declared} tensors")
    return places
