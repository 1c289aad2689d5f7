"""Tensors that a GPU has room for, and their way to the files that a killed job goes on from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from exlq.workspace import Workspace

SHARE = 2  # tensors kept from block to block may take the free memory's half: the rest is for the blocks


def fits(device: torch.device, n_bytes: int) -> bool:
    """Whether so many bytes may be kept on the device beside a block's work; never on the CPU."""
    return device.type == "cuda" and SHARE * n_bytes <= free_bytes(device)


def free_bytes(device: torch.device) -> int:
    """What is free of a GPU's memory, that which torch holds without need included."""
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free) + unused


def keeping(
    workspace: Workspace, device: torch.device, prefix: str = ""
) -> Callable[[str, tuple[int, ...]], Tensor]:
    """Makes float32 tensors for what a staged pass keeps: on a GPU that has room for them, else in files."""

    def keep(name: str, shape: tuple[int, ...]) -> Tensor:
        if fits(device, torch.Size(shape).numel() * torch.float32.itemsize):
            return torch.empty(shape, device=device)
        return workspace.tensor(f"{prefix}{name}", shape)

    return keep


class Copies:
    """Copies on a device of tensors in files, which are brought up to date on a thread beside."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(1, "states")
        self._writing: Future[None] | None = None

    def of(self, name: str, mapped: Tensor, read: bool) -> Tensor:
        """The copy of a file's tensor, made where there is none yet, with its values if they are read."""
        if name not in self._held:
            held = torch.empty(mapped.shape, dtype=mapped.dtype, device=self.device)
            self._held[name] = held.copy_(mapped) if read else held
        return self._held[name]

    def write(self, mapped: dict[str, Tensor], then: Callable[[], None]) -> None:
        """Begins to write copies to their files, and does `then` after.

        What was begun before is ended first: the files of two turns are not written at once.

        Raises:
            OSError: what an earlier writing has met.
        """
        self.wait()
        self._writing = self._thread.submit(self._write, mapped, then)

    def wait(self) -> None:
        """Returns once all is written; raises as `write`."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def clear(self) -> None:
        """Forgets all copies, once they are written."""
        self.wait()
        self._held.clear()

    def _write(self, mapped: dict[str, Tensor], then: Callable[[], None]) -> None:
        for name, file in mapped.items():
            file.copy_(self._held[name])
        then()
