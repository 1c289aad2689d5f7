"""The GGUF form of an importance matrix: two tensors of float32 for each weight.

Source: llama.cpp, common/imatrix-loader.cpp and tools/imatrix/imatrix.cpp (2026-10), restated.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFValueType
from torch import Tensor

from exlq.errors import FormatError, ModelError
from exlq.formats.gguf.imatrix_entries import Entry, Imatrix
from exlq.formats.gguf.reader import GgufFile
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf.writer import GgufWriter

MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME without the zero at its end
SUMS, COUNTS = ".in_sum2", ".counts"
TYPE = "imatrix"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


def read_gguf(path: Path) -> Imatrix:
    """The importance matrix in a GGUF file; what it does not say of its chunks is 0.

    Raises:
        ModelError: if it holds none.
    """
    try:
        with GgufFile(path) as file:
            names = [name for name in file.tensors if name.endswith((SUMS, COUNTS))]
            tensors = {name: _floats(file, name) for name in names}
            values = {key: file.metadata[key].value for key in _KEYS if key in file.metadata}
    except FormatError as exc:
        raise ModelError(str(exc)) from exc
    weights = sorted({name.removesuffix(SUMS).removesuffix(COUNTS) for name in tensors})
    entries = {name: _entry(name, tensors.get(name + SUMS), tensors.get(name + COUNTS)) for name in weights}
    datasets = values.get(DATASETS)
    return Imatrix(
        entries,
        tuple(str(name) for name in datasets if name) if isinstance(datasets, list) else (),
        _count(values, CHUNK_COUNT),
        _count(values, CHUNK_SIZE),
    )


def write_gguf(imatrix: Imatrix, path: Path) -> None:
    """Write beside `path`, then take its name.

    Raises:
        ModelError: for a name longer than ggml's.
    """
    tensors = _stored(imatrix)
    too_long = next((name for name in tensors if len(name.encode()) > MAX_NAME_BYTES), None)
    if too_long is not None:
        raise ModelError(f"{too_long} has more than the {MAX_NAME_BYTES} bytes of a GGUF name; shorten it")
    infos = [TensorInfo(name, tuple(tensor.shape), "F32") for name, tensor in tensors.items()]
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        part = Path(scratch) / path.name
        writer = GgufWriter(part, _metadata(imatrix), infos)
        try:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
            writer.close()
        except BaseException:
            writer.abandon()
            raise
        part.replace(path)


def _metadata(imatrix: Imatrix) -> list[KeyValue]:
    # llama-quantize wants the list of datasets, and the gguf package writes none that is empty
    datasets = list(imatrix.datasets) or [""]
    return [
        KeyValue("general.architecture", TYPE, GGUFValueType.STRING),
        KeyValue("general.type", TYPE, GGUFValueType.STRING),
        KeyValue(DATASETS, datasets, GGUFValueType.ARRAY, GGUFValueType.STRING),
        KeyValue(CHUNK_COUNT, imatrix.chunk_count, GGUFValueType.UINT32),
        KeyValue(CHUNK_SIZE, imatrix.chunk_size, GGUFValueType.UINT32),
    ]


def _stored(imatrix: Imatrix) -> dict[str, Tensor]:
    """Sums (n_mat, n_in) and counts (n_mat, 1) by the names of the file, in its order."""
    return {
        name + suffix: tensor
        for name, entry in sorted(imatrix.entries.items())
        for suffix, tensor in ((SUMS, entry.sums), (COUNTS, entry.counts.unsqueeze(-1)))
    }


def _floats(file: GgufFile, name: str) -> Tensor:
    """(numel,) float32."""
    if file.tensors[name].type != "F32":
        raise ModelError(f"{file.path}: {name} is of type {file.tensors[name].type}, want F32")
    return file.read(name).flatten().view(torch.float32)


def _entry(name: str, sums: Tensor | None, counts: Tensor | None) -> Entry:
    if sums is None or counts is None or len(sums) % len(counts):
        found = [0 if part is None else len(part) for part in (sums, counts)]
        raise ModelError(
            f"{name} has {found[0]} sums and {found[1]} counts, want as many sums for each count"
        )
    return Entry(sums.reshape(len(counts), -1), counts.round())


def _count(values: dict[str, Any], key: str) -> int:
    value = values.get(key, 0)
    if not isinstance(value, int):
        raise ModelError(f"{key} is {value!r}, want a whole number")
    return value


_KEYS = (DATASETS, CHUNK_COUNT, CHUNK_SIZE)
