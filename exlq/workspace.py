"""Large tensors kept in files instead of memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from exlq import faults
from exlq.files import reserve


class Workspace:
    """Memory-mapped tensors under one directory, which exists and is the caller's to remove."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, name: str) -> Path:
        """The file of a tensor."""
        return self.directory / f"{name}.bin"

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor `name`, mapped from its file, which is made where it is missing.

        What an earlier tensor of that name and size left in the file is there again. Its first byte is
        that of a page, so that arithmetic on it does not depend on where it was mapped.

        Raises:
            OSError: where the disk has no room for it.
        """
        numel = torch.Size(shape).numel()
        path = self.path(name)
        reserve(path, numel * dtype.itemsize)
        mapped = torch.from_file(str(path), shared=True, size=numel, dtype=dtype)
        return mapped.view(shape)

    def whole(self, name: str, shape: tuple[int, ...], fill: Callable[[Tensor], None]) -> Tensor:
        """The float32 tensor `name` from its file, or made by `fill`; the file has its name only then."""
        if not self.has(name, shape):
            part = f"{name}-part"
            fill(self.tensor(part, shape))
            with self.path(part).open("rb+") as file:
                os.fsync(file.fileno())
            faults.point(f"{name} written")
            self.path(part).replace(self.path(name))
        return self.tensor(name, shape)

    def has(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether there is a float32 tensor of that name and shape."""
        wanted = torch.Size(shape).numel() * torch.float32.itemsize
        return self.path(name).is_file() and self.path(name).stat().st_size == wanted

    def remove(self, name: str) -> None:
        """Deletes the file of a tensor, if there is one; the tensor itself must be out of use."""
        with contextlib.suppress(
            PermissionError
        ):  # Windows keeps a mapped file: left to the directory's owner
            self.path(name).unlink(missing_ok=True)
