"""Hidden states between blocks: in files, or on a device with the files close behind."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from exlq.pipeline import on_device, states
from exlq.pipeline.on_device import keeping
from exlq.pipeline.states import HiddenStates
from exlq.workspace import Workspace

SHAPE = (3, 5, 8)
GPU = torch.device("cuda", 0)


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room that is the CPU in truth."""
    monkeypatch.setattr(states, "fits", lambda device, n_bytes: True)


def held(directory: Path) -> HiddenStates:
    directory.mkdir(exist_ok=True)
    return HiddenStates(Workspace(directory), ("a", "b"), SHAPE, torch.float32)


def walk(of: HiddenStates, blocks: Sequence[int]) -> None:
    """Every block adds one to `a` and two to `b`, in place of what its room held."""
    for index in blocks:
        for name, step in (("a", 1), ("b", 2)):
            of.after(name).copy_(of.before(name) + step)
        of.turn(f"before {index + 1}")


def begun(of: HiddenStates) -> HiddenStates:
    of.begin()
    for name in ("a", "b"):
        of.workspace.tensor(name, SHAPE).zero_()
    return of


def test_copies_hold_what_files_hold(roomy: None, tmp_path: Path) -> None:
    of = begun(held(tmp_path))
    walk(of, range(5))
    assert (of.before("a") == 5).all()
    assert (of.before("b") == 10).all()


@pytest.mark.parametrize("on_files", [True, False])
def test_another_process_goes_on_where_the_record_says(
    on_files: bool, roomy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = begun(held(tmp_path))
    walk(first, range(3))
    assert first._copies is not None
    first._copies.wait()
    monkeypatch.setattr(states, "fits", lambda device, n_bytes: not on_files)
    second = held(tmp_path)
    marks = [f"before {index}" for index in range(6)]
    assert second.resume(marks) == 3
    walk(second, range(3, 5))
    assert (second.before("a") == 5).all()
    assert (second.before("b") == 10).all()


def test_the_record_speaks_of_whole_files_while_the_next_are_written(
    roomy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the second turn is being written, a job goes on from the first."""
    of, gate, reached = begun(held(tmp_path)), threading.Event(), threading.Event()
    walk(of, range(1))
    assert of._copies is not None
    of._copies.wait()

    def stopped(*_: object) -> None:
        reached.set()
        gate.wait(10)

    monkeypatch.setattr(states, "_sync", stopped)
    walk(of, range(1, 2))
    of.after("a").fill_(-1)  # the block after has begun
    reached.wait(10)
    other = held(tmp_path)
    assert other.resume(["before 0", "before 1", "before 2"]) == 1
    assert (other.before("a") == 1).all()
    gate.set()
    of._copies.wait()
    assert held(tmp_path).resume(["before 0", "before 1", "before 2"]) == 2


def test_what_cannot_be_written_is_told_at_the_next_turn(
    roomy: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    of = begun(held(tmp_path))
    monkeypatch.setattr(states, "_sync", full)
    walk(of, range(1))
    with pytest.raises(OSError, match="No space"):
        walk(of, range(1, 2))


def test_a_gpu_keeps_what_takes_half_of_its_free_memory_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (900, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert on_device.fits(GPU, 500)
    assert not on_device.fits(GPU, 501)
    assert not on_device.fits(torch.device("cpu"), 1)


def test_what_does_not_fit_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = keeping(Workspace(tmp_path), torch.device("cpu"), "base-")
    keep("o_proj", (2, 3))
    assert (tmp_path / "base-o_proj.bin").stat().st_size == 24
    monkeypatch.setattr(on_device, "fits", lambda device, n_bytes: n_bytes == 24)
    assert keep("down_proj", (2, 3)).shape == (2, 3)
    assert not (tmp_path / "base-down_proj.bin").exists()
