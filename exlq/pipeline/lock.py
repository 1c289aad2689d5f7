"""One process at a time in a job's directory."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from exlq import faults
from exlq.errors import ConfigError

LOCK = "job.lock"
UNWRITTEN_S = 2.0  # after which a lock without an owner is one whose owner died while making it


class Owner(NamedTuple):
    """A process: no other has all of these, on any machine, at any time."""

    host: str
    pid: int
    started: str  # as the system tells it; empty where it does not


class Lock:
    """A file that names the process at work.

    Raises, when made:
        ConfigError: if another process is at work, or one on another host may be.
        OSError: if the directory cannot be written to.
    """

    def __init__(self, out_dir: Path) -> None:
        self.path = out_dir / LOCK
        out_dir.mkdir(parents=True, exist_ok=True)
        while not _made(self.path, _this_process()):
            owner = _owner(self.path)
            if owner is not None and _is_alive(owner, self.path):
                raise ConfigError(
                    f"{out_dir} is being worked on by process {owner.pid}: wait for it, or choose another -o"
                )
            _removed(self.path, owner)

    def release(self) -> None:
        """Lets others in; does nothing where the lock is no longer this process's."""
        if _owner(self.path) == _this_process():
            self.path.unlink()


def _made(path: Path, owner: Owner) -> bool:
    """Makes the file; False if there is one."""
    try:
        with path.open("xb") as file:
            faults.point("lock made")
            file.write(json.dumps(owner._asdict()).encode())
    except FileExistsError:
        return False
    return True


def _owner(path: Path) -> Owner | None:
    """Whose lock it is; None if it is gone, or was never finished."""
    while True:
        try:
            return Owner(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            try:
                age = time.time() - path.stat().st_mtime
            except FileNotFoundError:
                return None
            if not 0 <= age < UNWRITTEN_S:
                return None
            time.sleep(UNWRITTEN_S / 10)


def _is_alive(owner: Owner, path: Path) -> bool:
    """Whether the process still runs.

    Raises:
        ConfigError: if it is one of another host, where that cannot be known.
    """
    if owner.host != _host():
        raise ConfigError(
            f"{path.parent} was last worked on from another host ({owner.host}, process {owner.pid}): "
            f"if exlq no longer runs there, delete {path}"
        )
    return _started(owner.pid) == owner.started if owner.started else _started(owner.pid) != ""


def _removed(path: Path, owner: Owner | None) -> None:
    """Takes a dead process's lock away, unless another has just done so and put its own in its place."""
    mine = path.with_name(f"{path.name}.{os.getpid()}.stale")
    try:
        path.rename(mine)
    except FileNotFoundError:
        return
    if _owner(mine) == owner:
        mine.unlink()
    else:
        mine.rename(path)


def _this_process() -> Owner:
    return Owner(_host(), os.getpid(), _started(os.getpid()))


def _host() -> str:
    """The machine's name, and which of its process tables is meant: containers have their own."""
    table = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {table.readlink()}" if table.is_symlink() else socket.gethostname()


def _started(pid: int) -> str:
    """When a process was started; empty if there is none."""
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        except OSError:
            return ""
        return "" if fields[0] in "ZX" else f"{fields[19]} ticks after boot {boot}"
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    if sys.platform == "win32":
        command = ["powershell", "-Command", f"(Get-Process -Id {pid}).StartTime.ToFileTime()"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
