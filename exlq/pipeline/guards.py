"""Disk and memory: looked at before a conversion starts, and the disk again before every block."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from exlq import memory
from exlq.errors import ConfigError
from exlq.pipeline.estimate import disk_bytes
from exlq.pipeline.output import Output
from exlq.pipeline.plan import Plan
from exlq.pipeline.progress import Progress
from exlq.sizes import format_bytes
from exlq.sizing import work

RESERVE_BYTES = 16 << 20  # that a conversion leaves free


def require_disk(plan: Plan, outputs: Sequence[Output]) -> None:
    """Refuses a conversion for which the disk is too small.

    What an earlier run of the job has left in its work directory counts as free: it is used or replaced.

    Raises:
        ConfigError: naming the place, what is free there and what is wanted.
    """
    place, config = _existing(plan.config.out_dir), plan.config
    wanted = disk_bytes(plan, outputs) + RESERVE_BYTES
    _require(place, wanted - held_bytes(config.out_dir / "work"))
    if config.compile_full is not None:
        other = _existing(config.compile_full.parent)
        if other.stat().st_dev != place.stat().st_dev:
            _require(other, sum(output.estimated_bytes() for output in outputs) + RESERVE_BYTES)


def _require(place: Path, wanted: int) -> None:
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ConfigError(
            f"{place} has {format_bytes(free)} free, about {format_bytes(wanted)} is wanted: "
            "make room, choose another -o or take fewer rows (-r)"
        )


def memory_notes(plan: Plan) -> tuple[str, ...]:
    """A line where the conversion will want more memory than is free now.

    Raises:
        ConfigError: if it will want more than there is at all.
    """
    there = memory.room()
    if there is None or plan.model.device.type != "cpu":
        return ()
    wanted = work.memory_bytes(plan.linears, plan.model.hidden_size)
    if wanted > there.total:
        raise ConfigError(
            f"about {format_bytes(wanted)} of memory is wanted, {format_bytes(there.total)} is all there is: "
            "take a machine or a container with more, or a smaller model"
        )
    if wanted <= there.free:
        return ()
    return (
        f"memory: about {format_bytes(wanted)} is wanted, {format_bytes(there.free)} is free now; "
        "other programs may have to be closed",
    )


class DiskWatch:
    """A `Progress` that passes on what it is told, and stops the work where the disk gets full.

    After every block, and so before the next one's files, what the job still wants must be free. It ends
    with the error a full disk would give later, while what was done so far is whole.

    Args:
        wanted: bytes that the job's directory will hold at most, beside what is there when this is made.
    """

    def __init__(self, progress: Progress, out_dir: Path, wanted: int) -> None:
        self._progress, self._place = progress, out_dir
        self._most = held_bytes(out_dir) + wanted

    @classmethod
    def of(cls, progress: Progress, plan: Plan, outputs: Sequence[Output]) -> DiskWatch:
        """For a job that `require_disk` has let through."""
        held = held_bytes(plan.config.out_dir / "work")
        return cls(progress, plan.config.out_dir, disk_bytes(plan, outputs) - held)

    def __call__(self, stage: str, done: int, total: int) -> None:
        self._progress(stage, done, total)
        if done < total:
            wanted = self._most - held_bytes(self._place)
            if wanted > 0 and shutil.disk_usage(self._place).free < wanted:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._place))


def held_bytes(directory: Path) -> int:
    """Bytes of all files below a directory, 0 where there is none; files may go meanwhile."""
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            try:
                total += os.lstat(Path(parent, name)).st_size
            except FileNotFoundError:
                continue
    return total


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place
