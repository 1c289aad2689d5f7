"""Hidden states between two blocks, in files that a killed process leaves whole."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exlq import faults
from exlq.files import atomic_write_json, read_json
from exlq.pipeline.on_device import Copies, fits
from exlq.workspace import Workspace

RECORD = "states.json"
CPU = torch.device("cpu")
SIDES = ("", "-after", "-ahead")  # of a name, in turn: what a block receives and what it hands on


@dataclass
class HiddenStates:
    """Tensors of one shape, each twice: before a block, and room for what the block makes of it.

    A record says which of the two holds what, by a mark that the caller gives each place in the
    model. It is written once the files are on the disk, so that it is true whenever it is there.
    With three sides, the record may stay a block behind.

    On a GPU with room for them the tensors are copies there; files and record follow while the next block
    computes, so that a killed job may go on one block earlier.
    """

    workspace: Workspace
    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    side: int = 0
    sides: int = 2
    device: torch.device = CPU
    _copies: Copies | None = field(init=False)

    def __post_init__(self) -> None:
        n_bytes = self.sides * len(self.names) * torch.Size(self.shape).numel() * self.dtype.itemsize
        self._copies = Copies(self.device) if fits(self.device, n_bytes) else None

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
        if self._copies is not None:
            self._copies.clear()
        (self.workspace.directory / RECORD).unlink(missing_ok=True)
        for name in self.names:
            for side in SIDES:
                self.workspace.remove(name + side)
        self.side = 0

    def before(self, name: str) -> Tensor:
        """What the block receives, mapped from its file or on the GPU."""
        return self._tensor(name + SIDES[self.side], read=True)

    def after(self, name: str) -> Tensor:
        """Room for what the block hands on, likewise."""
        return self._tensor(name + SIDES[self._next], read=False)

    def turn(self, mark: str) -> None:
        """What was handed on is what the next block receives; recorded under `mark`.

        Raises:
            OSError: where a file, or that of an earlier turn, cannot be written.
        """
        self.advance()
        self.record(mark)

    def advance(self) -> None:
        """What was handed on is what the next block receives."""
        self.side = self._next

    def record(self, mark: str, behind: int = 0) -> None:
        """Records under `mark` what the next block receives, or what was received so many blocks before.

        Raises:
            OSError: as `turn`.
        """
        side = (self.side - behind) % self.sides
        names = [name + SIDES[side] for name in self.names]
        if self._copies is None:
            self._record(names, mark, side)
        else:
            self._copies.write({n: self._mapped(n) for n in names}, lambda: self._record(names, mark, side))

    def _record(self, names: Sequence[str], mark: str, side: int) -> None:
        for name in names:
            _sync(self.workspace, name)
        faults.point("states written")
        atomic_write_json(self.workspace.directory / RECORD, {"mark": mark, "side": side})

    def _mapped(self, name: str) -> Tensor:
        return self.workspace.tensor(name, self.shape, self.dtype)

    def _tensor(self, name: str, read: bool) -> Tensor:
        mapped = self._mapped(name)
        return mapped if self._copies is None else self._copies.of(name, mapped, read)

    @property
    def _next(self) -> int:
        return (self.side + 1) % self.sides


def _sync(workspace: Workspace, name: str) -> None:
    """Brings a mapped file to the disk: a record must not outlive what it speaks of."""
    with workspace.path(name).open("rb+") as file:
        os.fsync(file.fileno())
