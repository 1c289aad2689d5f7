"""How much memory this process holds, and how much there is for it."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INTERVAL_S = 0.01
ROOT = Path("/")
UNLIMITED = 1 << 60  # what control groups without a limit say is about 2⁶³


class Room(NamedTuple):
    """Bytes of memory that the machine has, or the control group of this process, and what is free of it."""

    total: int
    free: int


def room(root: Path = ROOT) -> Room | None:
    """The memory there is for this process; None where the system does not tell (not Linux).

    The least of the machine's and of every control group's, version 1 or 2, that this process is in. Pages
    of files that can be dropped count as free.
    """
    machine = _fields(root / "proc/meminfo")
    if "MemTotal" not in machine:
        return None
    rooms = [Room(1024 * machine["MemTotal"], 1024 * machine.get("MemAvailable", machine["MemTotal"]))]
    rooms += _group_rooms(root)
    return Room(min(each.total for each in rooms), max(0, min(each.free for each in rooms)))


def _group_rooms(root: Path) -> Iterator[Room]:
    """Of the control groups that limit memory, from this process's own to the topmost."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mount, limit, used = VERSION_1 if controllers else VERSION_2
        group = root / mount / path.strip("/")
        for place in (group, *group.parents):
            if place == root:
                break
            most, now = _number(place / limit), _number(place / used)
            if most is not None and most < UNLIMITED:
                dropped = _fields(place / "memory.stat").get("inactive_file", 0)
                yield Room(most, most - (now or 0) + dropped)


VERSION_1 = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
VERSION_2 = ("sys/fs/cgroup", "memory.max", "memory.current")


def _fields(path: Path) -> dict[str, int]:
    """Of lines of a name and a number."""
    pairs = (line.replace(":", " ").split() for line in _lines(path))
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) > 1 and pair[1].isdigit()}


def _number(path: Path) -> int | None:
    """None where there is none, or it is `max`."""
    found = "".join(_lines(path)).strip()
    return int(found) if found.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def anonymous_bytes() -> int:
    """RssAnon of this process: memory that no file backs. 0 where the system does not tell (not Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def release() -> None:
    """Hands memory that is free but kept by the C library back to the system, where that is glibc.

    Tensors of a few megabytes that come and go leave its heap full of holes, which it keeps.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most anonymous memory held inside a `with`, sampled a hundred times a second."""

    def __init__(self) -> None:
        self.before = self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL_S):
            self.bytes = max(self.bytes, anonymous_bytes())
