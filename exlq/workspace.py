"""Large tensors kept in files instead of memory."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import Tensor


class Workspace:
    """Memory-mapped tensors under one directory, which exists and is the caller's to remove."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor `name`, mapped from its file, which is made where it is missing.

        What an earlier tensor of that name and size left in the file is there again.
        """
        numel = torch.Size(shape).numel()
        path = self.directory / f"{name}.bin"
        mapped = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
        return mapped.view(shape)

    def remove(self, name: str) -> None:
        """Deletes the file of a tensor, if there is one; the tensor itself must be out of use."""
        with contextlib.suppress(
            PermissionError
        ):  # Windows keeps a mapped file: left to the directory's owner
            (self.directory / f"{name}.bin").unlink(missing_ok=True)
