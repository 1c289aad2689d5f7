"""A disk that is full or may not be written to ends the work in one line; with room again it goes on.

The final files are those of a run that was never stopped.
"""

from __future__ import annotations

import errno
import itertools
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from exlq import files, workspace
from exlq.cli import main
from exlq.formats import shards
from exlq.formats.gguf import writer
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.pipeline import guards
from exlq.pipeline.progress import silent
from tests.conftest import REPOSITORY
from tests.pipeline.helpers import Place, contents

BOTH = ("--format", "exl2,gguf", "--measure", "exl2,gguf", "--quiet")
MIB = 1 << 20


@pytest.fixture(scope="module")
def uninterrupted(llama: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the command makes, by place."""
    place = Place(tmp_path_factory.mktemp("uninterrupted"), llama, ids_file)
    assert main(place.arguments(*BOTH)) == 0
    return made(place.out)


@pytest.fixture
def place(tmp_path: Path, llama: Path, ids_file: Path) -> Place:
    return Place(tmp_path, llama, ids_file)


def made(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: contents(out / name) for name in ("exl2", "gguf")}
    return {**found, "measurement": (out / "measurement.json").read_bytes()}


def assert_stopped(place: Place, capsys: pytest.CaptureFixture[str], wanted: dict[str, Any]) -> str:
    """The command fails in one line; what is in the final places is whole. Gives the line."""
    assert main(place.arguments(*BOTH)) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1, line
    assert_nothing_half_written(place, wanted)
    return line


def assert_nothing_half_written(place: Place, wanted: dict[str, Any]) -> None:
    assert not (place.out / "summary.json").exists()
    for name in ("exl2", "gguf"):
        assert contents(place.out / name) in ({}, wanted[name])


class Full:
    """Stands for a function that writes: the `at`-th call, and none after it, finds the disk full."""

    def __init__(self, real: Callable[..., Any], at: int) -> None:
        self._real, self._calls, self._at = real, itertools.count(1), at
        self.failed = False

    def __call__(self, *given: Any, **named: Any) -> Any:
        if next(self._calls) == self._at:
            self.failed = True
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._real(*given, **named)


FAULTS: list[tuple[Any, str, int]] = [  # in the order in which one job meets them
    (os, "fsync", 3),  # the gradients' files
    (workspace, "reserve", 2),
    (os, "fsync", 8),
    (workspace, "reserve", 9),
    (os, "fsync", 30),  # a part of the measurement, or the states after a block
    (shards, "naming", 3),
    (shards, "naming", 30),
    (writer, "naming", 1),
    (writer, "naming", 12),
    (os, "fsync", 3),
]


def test_one_job_that_finds_the_disk_full_at_many_places_ends_as_if_it_never_had(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    for module, name, at in FAULTS:
        with monkeypatch.context() as patch:
            full = Full(getattr(module, name), at)
            patch.setattr(module, name, full)
            assert main(place.arguments(*BOTH)) == 1, (name, at)
            assert full.failed
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        assert line.startswith(f"error: {place.out}")
        assert line.endswith(
            ": No space left on device; make room, then give the command again: what is done is kept\n"
        ), line
        assert_nothing_half_written(place, uninterrupted)
    assert main(place.arguments(*BOTH)) == 0
    assert made(place.out) == uninterrupted


def test_the_summary_that_finds_no_room_is_written_the_next_time(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    real = files.atomic_write_bytes

    def full(path: Path, data: bytes) -> None:
        if path.name == "summary.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(files, "atomic_write_bytes", full)
        assert f"{place.out / 'summary.json'}: No space" in assert_stopped(place, capsys, uninterrupted)
    assert main(place.arguments(*BOTH)) == 0
    assert made(place.out) == uninterrupted


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A file system in memory of so many bytes, mounted at a directory; gives what makes it larger."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield lambda larger: remount(directory, f"size={larger}")
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(directory: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(directory)], check=True)


def test_a_real_disk_is_full_again_and_again_until_it_is_large_enough(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    monkeypatch.setattr(guards, "require_disk", lambda *_: None)  # which would not let it begin
    monkeypatch.setattr(guards.DiskWatch, "of", lambda *_: silent)
    place.out.mkdir()
    sizes, stopped = [MIB * n // 4 for n in range(1, 200)], 0
    with small_disk(place.out, sizes[0]) as grow:
        for size in sizes:
            grow(size)
            if main(place.arguments(*BOTH)) == 0:
                break
            stopped += 1
            line = capsys.readouterr().err
            assert line.count("\n") == 1
            assert f"error: {place.out}" in line
            assert ": No space left on device" in line or "cannot be written to (No space left" in line
            assert_nothing_half_written(place, uninterrupted)
        assert stopped >= 5
        assert made(place.out) == uninterrupted


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.mkdir()
    with small_disk(place.out, 2 * MIB):
        assert main(place.arguments(*BOTH)) == 2
        assert f"error: {place.out} has " in capsys.readouterr().err
        assert not list(place.out.iterdir())


def test_a_directory_that_may_only_be_read_is_refused_in_one_line(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.out.mkdir()
    with small_disk(place.out, 200 * MIB):
        remount(place.out, "ro")
        assert main(place.arguments(*BOTH)) == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert str(place.out) in line
        assert "Read-only file system" in line
        assert not list(place.out.iterdir())


def test_a_disk_that_becomes_read_only_stops_the_work_which_goes_on_later(
    place: Place,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: dict[str, Any],
) -> None:
    def read_only(path: Path, n_bytes: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "reserve", read_only)
        line = assert_stopped(place, capsys, uninterrupted)
        assert line.startswith(f"error: {place.out / 'work'}")
        assert "Read-only file system; choose a place that can be written to" in line
    assert main(place.arguments(*BOTH)) == 0
    assert made(place.out) == uninterrupted


@pytest.mark.skipif(os.name != "posix", reason="the system has no such limit")
def test_files_that_may_not_grow_stop_the_command_without_a_signal_or_a_traceback(place: Place) -> None:
    code = "import sys; from exlq.cli import main; sys.exit(main(sys.argv[1:]))"
    limit = 64 << 10  # the hidden states of 24 rows take 384 KiB
    done = subprocess.run(
        [sys.executable, "-c", code, *place.arguments("--quiet", "--threads", "1")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"error: {place.out / 'work'}" in done.stderr
    assert "File too large; lift the limit" in done.stderr
    assert not (place.out / "exl2").exists()


def test_files_are_made_in_the_job_directory_alone(place: Place, tmp_path: Path) -> None:
    """Home, caches and the place for temporary files stay as they are."""
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir()
    temporary.mkdir()
    code = "import sys; from exlq.cli import main; sys.exit(main(sys.argv[1:]))"
    caches = {name: str(home / name) for name in ("HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TORCH_HOME")}
    done = subprocess.run(
        [sys.executable, "-c", code, *place.arguments("--quiet", "--threads", "1")],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={
            **os.environ,
            **caches,
            "HOME": str(home),
            "TMPDIR": str(temporary),
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": "1",
        },
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert contents(home) == contents(temporary) == {}
    assert {path.name for path in place.directory.iterdir()} == {"out", "home", "temporary"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_writers_that_are_given_up_leave_nothing_even_if_what_they_hold_cannot_be_written(
    tmp_path: Path,
) -> None:
    metadata = [KeyValue("general.architecture", "llama", gguf.GGUFValueType.STRING)]
    one = writer.GgufWriter(tmp_path / "m.gguf", metadata, [TensorInfo("a", (64,), "F32")])
    other = shards.ShardWriter(tmp_path)
    other.add("a", torch.ones(64))
    for files_of in (one._writer.fout, other._data):
        for at in range(len(files_of)) if isinstance(files_of, list) else list(files_of):
            files_of[at] = Path("/dev/full").open("wb")  # noqa: SIM115
            files_of[at].write(b"a")
    one.abandon()
    other.abandon()
    assert not list(tmp_path.iterdir())
