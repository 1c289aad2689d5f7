"""One weight file, opened lazily."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from exlq.checkpoint.files import SAFETENSORS, header_bytes
from exlq.errors import ModelError, panics_as_errors

MOST_PICKLE_BYTES = 1 << 23  # a tensor takes some 200; memory and time grow with them
_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Shard(Protocol):
    """One file of named tensors; `dtype` raises ModelError for what is not bf16, fp16 or fp32."""

    def keys(self) -> Collection[str]: ...
    def shape(self, key: str) -> tuple[int, ...]: ...
    def dtype(self, key: str) -> torch.dtype: ...
    def read(self, key: str, rows: slice | Tensor | None) -> Tensor: ...


def open_shard(path: Path) -> Shard:
    """The file's reader by its suffix; raises ModelError for a truncated or unreadable file."""
    return _Safetensors(path) if path.name.endswith(SAFETENSORS) else _StateDict(path)


class _Safetensors:
    """A safetensors file; tensors are views of the mapped file, so only the rows asked for are read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        header_bytes(path)
        try:
            with panics_as_errors():
                opened: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError, RuntimeError) as exc:
            raise ModelError(f"{path} is not a whole safetensors file ({exc}); download it again") from exc
        self._file = opened
        self._keys = frozenset(opened.keys())

    def keys(self) -> Collection[str]:
        return self._keys

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(key).get_shape())

    def dtype(self, key: str) -> torch.dtype:
        name = self._file.get_slice(key).get_dtype()
        if name not in _DTYPES:
            raise _unusable(key, self._path, name)
        return _DTYPES[name]

    def read(self, key: str, rows: slice | Tensor | None) -> Tensor:
        if isinstance(rows, slice):
            part: Tensor = self._file.get_slice(key)[rows]
            return part
        whole: Tensor = self._file.get_tensor(key)
        return whole if rows is None else whole[rows.cpu()]


class _StateDict:
    """A torch state dict; the zip file is mapped, not read, and nothing but tensors is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tensors = _load_state_dict(path)

    def keys(self) -> Collection[str]:
        return self._tensors.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensors[key].shape)

    def dtype(self, key: str) -> torch.dtype:
        dtype = self._tensors[key].dtype
        if dtype not in _DTYPES.values():
            raise _unusable(key, self._path, str(dtype).removeprefix("torch."))
        return dtype

    def read(self, key: str, rows: slice | Tensor | None) -> Tensor:
        whole = self._tensors[key]
        if rows is None:
            return whole
        return whole[rows] if isinstance(rows, slice) else whole[rows.cpu()]


def _load_state_dict(path: Path) -> Mapping[str, Tensor]:
    _require_plain_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as exc:
        raise ModelError(
            f"{path} holds more than tensors and is not unpickled; save it as safetensors"
        ) from exc
    except Exception as exc:  # of a broken pickle torch raises nearly every kind
        reason = str(exc).partition("\n")[0]
        raise ModelError(
            f"{path} is not a whole torch state dict ({reason}); save it as safetensors"
        ) from exc
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__}; wanted a state dict of named tensors")
    for key, value in content.items():
        if not isinstance(key, str) or type(value) not in (Tensor, torch.nn.Parameter):
            kind = type(value).__name__
            raise ModelError(f"{path} holds a {kind} under {str(key)[:80]!r}; wanted a named tensor")
        if not _is_plain(value):
            raise ModelError(f"{path}: {key} is no plain tensor with all its data; save it as safetensors")
    return content


def _require_plain_archive(path: Path) -> None:
    """Refuses what torch.save never writes: an archive that unpacks to more than it is, or a huge pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OSError) as exc:
        raise ModelError(f"{path} is not a whole torch state dict ({exc}); save it as safetensors") from exc
    for member in members:
        limit = MOST_PICKLE_BYTES if member.filename.endswith(".pkl") else path.stat().st_size
        if member.compress_type != zipfile.ZIP_STORED or member.file_size > limit:
            raise ModelError(
                f"{path} is not a whole torch state dict: {member.filename!r} unpacks to "
                f"{member.file_size:,} bytes; save it as safetensors"
            )


def _is_plain(value: Tensor) -> bool:
    """Whether every weight has a place of its own in the file: none is made of a stride of 0."""
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized:
        return False
    return value.untyped_storage().nbytes() >= value.numel() * value.element_size()


def _unusable(key: str, path: Path, dtype: str) -> ModelError:
    return ModelError(f"{key} in {path} is {dtype}; wanted bf16, fp16 or fp32 (an unquantized model)")
