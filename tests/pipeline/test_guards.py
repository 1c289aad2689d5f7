"""Room on the disk and in memory is looked at before the work, and the disk before every block."""

from __future__ import annotations

import errno
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest

from exlq import memory
from exlq.errors import ConfigError
from exlq.memory import Room
from exlq.pipeline import guards, job
from exlq.pipeline.estimate import disk_bytes, estimate
from exlq.pipeline.outputs import make_outputs
from exlq.pipeline.plan import Plan, make_plan
from exlq.pipeline.progress import silent
from tests.pipeline.helpers import Events, settings

Usage = namedtuple("Usage", ("total", "used", "free"))
MIB = 1 << 20


@pytest.fixture
def plan(llama: Path, ids_file: Path, tmp_path: Path) -> Plan:
    return make_plan(settings(llama, tmp_path / "out", ids_file))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says that so many bytes are free."""

    def say(free: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _place: Usage(1 << 40, 0, free))

    return say


def test_a_disk_too_small_is_refused_with_what_is_free_and_wanted(
    plan: Plan, disk: Callable[[int], None], tmp_path: Path
) -> None:
    outputs, _ = make_outputs(plan)
    wanted = disk_bytes(plan, outputs) + guards.RESERVE_BYTES
    disk(wanted)
    guards.require_disk(plan, outputs)
    disk(wanted - 1)
    with pytest.raises(ConfigError, match=rf"^{tmp_path} has .* free, about .* is wanted: make room"):
        guards.require_disk(plan, outputs)
    with pytest.raises(ConfigError, match="is wanted: make room"):
        job.begin(plan.config, silent, "a command")
    assert not plan.config.out_dir.exists()


def test_what_an_earlier_run_has_left_counts_as_free(plan: Plan, disk: Callable[[int], None]) -> None:
    outputs, _ = make_outputs(plan)
    work = plan.config.out_dir / "work"
    work.mkdir(parents=True)
    (work / "states.bin").write_bytes(bytes(MIB))
    disk(disk_bytes(plan, outputs) + guards.RESERVE_BYTES - MIB)
    guards.require_disk(plan, outputs)


def test_a_disk_that_gets_full_stops_the_work_after_the_block(
    disk: Callable[[int], None], tmp_path: Path
) -> None:
    events = Events()
    disk(10 * MIB)
    watch = guards.DiskWatch(events, tmp_path, 9 * MIB)
    watch("measuring", 1, 3)
    (tmp_path / "states.bin").write_bytes(bytes(4 * MIB))
    disk(5 * MIB)
    watch("measuring", 2, 3)
    disk(5 * MIB - 1)
    watch("measuring", 3, 3)
    with pytest.raises(OSError, match="No space left") as full:
        watch("quantizing exl2", 1, 3)
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, str(tmp_path))
    assert events.seen[-1] == ("quantizing exl2", 1)
    (tmp_path / "output").write_bytes(bytes(5 * MIB))
    disk(0)
    watch("quantizing exl2", 2, 3)


def test_more_memory_than_there_is_is_refused_and_more_than_is_free_is_said(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = estimate(plan, make_outputs(plan)[0]).memory_bytes

    def notes(total: int, free: int) -> tuple[str, ...]:
        monkeypatch.setattr(memory, "room", lambda: Room(total, free))
        return guards.memory_notes(plan)

    assert notes(wanted, wanted) == ()
    (line,) = notes(wanted, wanted - 1)
    assert line.startswith("memory: about ")
    with pytest.raises(ConfigError, match=r"of memory is wanted, .* is all there is"):
        notes(wanted - 1, 0)
    monkeypatch.setattr(memory, "room", lambda: None)
    assert guards.memory_notes(plan) == ()


def test_bytes_held_are_those_of_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_bytes(bytes(100))
    (tmp_path / "d").write_bytes(bytes(20))
    assert guards.held_bytes(tmp_path) == 120
    assert guards.held_bytes(tmp_path / "absent") == 0
