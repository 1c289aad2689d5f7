"""Hidden states between two blocks, in files that a killed process leaves whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exlq import faults
from exlq.files import atomic_write_json, read_json
from exlq.workspace import Workspace

RECORD = "states.json"
SIDES = ("", "-after")  # of a name, in turn: what a block receives and what it hands on


@dataclass
class HiddenStates:
    """Tensors of one shape, each twice: before a block, and room for what the block makes of it.

    A record says which of the two holds what, by a mark that the caller gives each place in the
    model. It is written once the files are on the disk, so that it is true whenever it is there.
    """

    workspace: Workspace
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    side: int = 0

    def resume(self, marks: Sequence[str]) -> int | None:
        """The place of the recorded mark among `marks`, from which on there are states; None if nowhere."""
        try:
            found = read_json(self.workspace.directory / RECORD)
            mark, side = found["mark"], int(found["side"])
            place = marks.index(mark)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        wanted = torch.Size(self.shape).numel() * self.dtype.itemsize
        paths = [self.workspace.path(name + SIDES[side]) for name in self.names]
        if not all(path.is_file() and path.stat().st_size == wanted for path in paths):
            return None
        self.side = side
        return place

    def begin(self) -> None:
        """Forgets what the files hold."""
        (self.workspace.directory / RECORD).unlink(missing_ok=True)
        for name in self.names:
            for side in SIDES:
                self.workspace.remove(name + side)
        self.side = 0

    def before(self, name: str) -> Tensor:
        """What the block receives, mapped from its file."""
        return self.workspace.tensor(name + SIDES[self.side], self.shape, self.dtype)

    def after(self, name: str) -> Tensor:
        """Room for what the block hands on, likewise."""
        return self.workspace.tensor(name + SIDES[1 - self.side], self.shape, self.dtype)

    def turn(self, mark: str) -> None:
        """What was handed on is what the next block receives; recorded under `mark`."""
        for name in self.names:
            _sync(self.workspace, name + SIDES[1 - self.side])
        faults.point("states written")
        self.side = 1 - self.side
        atomic_write_json(self.workspace.directory / RECORD, {"mark": mark, "side": self.side})


def _sync(workspace: Workspace, name: str) -> None:
    """Brings a mapped file to the disk: a record must not outlive what it speaks of."""
    with workspace.path(name).open("rb+") as file:
        os.fsync(file.fileno())
