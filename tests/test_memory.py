"""The peak is of this process's own memory, and only of what was held meanwhile."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from exlq.memory import INTERVAL_S, PeakMemory, anonymous_bytes, room

MIB = 1 << 20

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell")


@needs_proc
def test_what_is_held_for_a_while_is_counted_and_what_was_before_is_not() -> None:
    before = torch.ones(64 * MIB, dtype=torch.uint8)
    with PeakMemory() as memory:
        held = torch.ones(256 * MIB, dtype=torch.uint8)
        time.sleep(10 * INTERVAL_S)
        del held
        time.sleep(2 * INTERVAL_S)
    assert 200 * MIB < memory.bytes - memory.before < 300 * MIB
    assert memory.before > len(before)


@needs_proc
def test_a_mapped_file_is_not_counted(tmp_path: Path) -> None:
    before = anonymous_bytes()
    mapped = torch.from_file(str(tmp_path / "a.bin"), shared=True, size=128 * MIB, dtype=torch.uint8)
    mapped.fill_(1)
    assert anonymous_bytes() - before < 32 * MIB


def machine(root: Path, group: str, **files: int | str) -> Path:
    """A made file system of a machine with 8 GiB, 6 of them free; `files` by path with __ for /, in MiB."""
    (root / "proc/self").mkdir(parents=True)
    meminfo = f"MemTotal: {8 << 20} kB\nMemFree: {1 << 20} kB\nMemAvailable: {6 << 20} kB\n"
    (root / "proc/meminfo").write_text(meminfo)
    (root / "proc/self/cgroup").write_text(group)
    for name, value in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("DOT", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value * MIB}\n" if isinstance(value, int) else value)
    return root


def test_without_groups_it_is_the_machines(tmp_path: Path) -> None:
    assert room(machine(tmp_path, "")) == (8 << 30, 6 << 30)
    assert room(tmp_path / "absent") is None


def test_a_group_of_version_2_limits_it_and_so_does_any_above(tmp_path: Path) -> None:
    inner: dict[str, int | str] = {
        "a__b__memoryDOTmax": "max\n",
        "a__b__memoryDOTcurrent": 100,
        "a__memoryDOTmax": 1024,
        "a__memoryDOTcurrent": 700,
        "a__memoryDOTstat": f"anon 5\ninactive_file {200 * MIB}\n",
    }
    assert room(machine(tmp_path, "0::/a/b\n", **inner)) == (1024 * MIB, 524 * MIB)


def test_a_group_of_version_1_limits_it_where_it_has_a_limit(tmp_path: Path) -> None:
    files: dict[str, int | str] = {
        "memory__x__memoryDOTlimit_in_bytes": 2048,
        "memory__x__memoryDOTusage_in_bytes": 2000,
        "memory__memoryDOTlimit_in_bytes": "9223372036854771712\n",
    }
    assert room(machine(tmp_path, "4:memory:/x\n0::/\n", **files)) == (2048 * MIB, 48 * MIB)


def test_inside_a_container_the_groups_own_path_may_be_missing(tmp_path: Path) -> None:
    files: dict[str, int | str] = {"memoryDOTmax": 512, "memoryDOTcurrent": 12}
    assert room(machine(tmp_path, "0::/outside/it\n", **files)) == (512 * MIB, 500 * MIB)


@needs_proc
def test_here_some_of_it_is_free() -> None:
    found = room()
    assert found is not None
    assert 0 < found.free <= found.total
