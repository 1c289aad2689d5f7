"""Weights that are wanted next, read while others are computed with."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from exlq import memory
from exlq.types import Weights

PAGE_BYTES = 4096
ROOM = 2  # times what is read ahead must be free, or nothing is


class ReadAhead:
    """Reads the tensors that are expected next on a thread of its own, one set of them at a time.

    For the CPU the pages of their files are touched: they are in the system's cache then, which gives them
    up where memory is short. For CUDA they are copied into page-locked memory, in the stored dtype; what was
    not taken goes when others are expected. What cannot be read ahead is read, and fails, where it is
    wanted.

    Args:
        weights: what tensors are taken from, each looked at when it is read.
        bare: the same without the look.
    """

    def __init__(self, weights: Weights, bare: Weights, device: torch.device) -> None:
        self._weights, self._bare = weights, bare
        self._pins = device.type == "cuda"
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._reading: Future[dict[str, Tensor]] | None = None
        self._held: dict[str, Tensor] = {}

    def expect(self, names: Iterable[str]) -> None:
        """These tensors are likely to be wanted next."""
        self._arrived().clear()
        self._reading = self._thread.submit(self._read, tuple(names))

    def take(self, name: str) -> Tensor:
        """The tensor in its stored dtype, on the CPU; raises as `read` of the weights does."""
        held = self._arrived().pop(name, None)
        return self._weights.read(name) if held is None else held

    def _arrived(self) -> dict[str, Tensor]:
        """What was read ahead, once that is done."""
        if self._reading is not None:
            self._held, self._reading = self._reading.result(), None
        return self._held

    def _read(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        try:
            if not self._has_room(names):
                return found
            for name in names:
                if self._pins:
                    found[name] = self._weights.read(name).pin_memory()
                else:
                    touch(self._bare.read(name))
        except Exception:  # of whatever kind: reading the tensor where it is wanted raises it again
            return found
        return found

    def _has_room(self, names: Iterable[str]) -> bool:
        room = memory.room()
        shapes = ((torch.Size(self._bare.shape(name)), self._bare.dtype(name)) for name in names)
        wanted = sum(shape.numel() * dtype.itemsize for shape, dtype in shapes)
        return room is None or room.free >= ROOM * wanted


def touch(mapped: Tensor) -> None:
    """Has the system read a tensor that is mapped from a file: one value of every page is looked at."""
    mapped.flatten()[:: PAGE_BYTES // mapped.itemsize].sum()


def moved(stored: Tensor, device: torch.device) -> Tensor:
    """A copy in float32 on the device; a GPU converts for itself, so that half as much is sent to it."""
    if device.type == "cpu":
        return stored.to(device, torch.float32, copy=True)
    return stored.to(device, non_blocking=True).float()
