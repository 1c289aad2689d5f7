"""The tensors of a model directory under their stored names."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from exlq.checkpoint.files import WeightFiles, find_weight_files
from exlq.checkpoint.shard import Shard, open_shard
from exlq.errors import ModelError


class Checkpoint:
    """`Weights` over the files of one directory; tensors are read when asked for and must not be modified."""

    def __init__(self, directory: Path, shards: dict[str, Shard]) -> None:
        self.directory = directory
        self._shards = shards

    def keys(self) -> Collection[str]:
        return self._shards.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape without reading the data; raises ModelError for an unknown key."""
        return self._shard(key).shape(key)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype; raises ModelError for an unknown key or anything but bf16, fp16 and fp32."""
        return self._shard(key).dtype(key)

    def read(self, key: str, rows: slice | Tensor | None = None) -> Tensor:
        """The tensor in its stored dtype, or only the given rows of its first dimension.

        Raises ModelError as `dtype` does.
        """
        self.dtype(key)
        return self._shard(key).read(key, rows)

    def _shard(self, key: str) -> Shard:
        if key not in self._shards:
            raise ModelError(f"no tensor {key} in {self.directory}; it has {len(self._shards)} others")
        return self._shards[key]


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open the weights of a model directory without reading them.

    A single safetensors file, a sharded index, or torch state dicts with Hugging Face's names.

    Raises:
        ModelError: no weights, a missing or truncated file, a tensor that the index promises and
            its file lacks, or one that two files hold.
    """
    files = find_weight_files(directory)
    shards: dict[str, Shard] = {}
    for name in files.names:
        shard = open_shard(directory / name)
        for key in sorted(shard.keys()):
            if key in shards:
                raise ModelError(f"{directory} holds {key} in {name} and in another file; wanted it once")
            shards[key] = shard
        _require_promised(files, name, shard)
    return Checkpoint(directory, shards)


def _require_promised(files: WeightFiles, name: str, shard: Shard) -> None:
    present = set(shard.keys())
    for key, promised in (files.promised or {}).items():
        if promised == name and key not in present:
            raise ModelError(f"{files.directory / name} lacks {key}, which {files.index} says it holds")
