"""Processes of Ray: the bytes of one process, also when they are killed at work."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from exlq.errors import ConfigError, WorkerError
from exlq.pipeline import workers_ray
from exlq.pipeline.workers_ray import RayWorkers
from tests.conftest import REPOSITORY
from tests.pipeline.conftest import Finished
from tests.pipeline.test_kills import command, sums

WITH_RAY = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install 'exlq[ray]'"
)
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="/proc tells the processes")
pytestmark = [WITH_RAY, pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")
AT_WORK = b"ray::_done"


def started(finished: Finished, out: Path) -> subprocess.Popen[str]:
    """The command of a conversion, with two workers."""
    config = finished.config
    assert config.calibration is not None
    arguments = command(config.in_dir, out, config.calibration, "-b", str(config.bits), "--workers", "2")
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    return subprocess.Popen(
        arguments, env=place, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(pid: int) -> list[int]:
    """Processes below one, as /proc knows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if parent == pid:
            found += [int(path.parent.name), *children(int(path.parent.name))]
    return found


def at_work(pid: int) -> list[int]:
    """Workers below a process that have a unit in hand."""
    found = []
    for child in children(pid):
        try:
            name = Path(f"/proc/{child}/cmdline").read_bytes()
        except OSError:
            continue
        found += [child] if name.startswith(AT_WORK) else []
    return found


def kill_one_at_work(pid: int, after: Path) -> None:
    """Kills a worker once `after` is there."""
    for _ in range(3000):
        if after.exists() and (found := at_work(pid)):
            os.kill(found[0], signal.SIGKILL)
            return
        time.sleep(0.02)
    raise AssertionError("no worker was seen at work")


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, pytest.param(True, marks=ON_LINUX)])
def test_two_workers_deliver_the_bytes_of_one_process(both: Finished, tmp_path: Path, killed: bool) -> None:
    out = tmp_path / "out"
    with started(both, out) as process:
        if killed:
            kill_one_at_work(process.pid, out / "work" / "measurement.partial.json")
        _, told = process.communicate()
    assert (process.returncode, told) == (0, "")
    assert sums(out) == sums(both.config.out_dir)


def test_a_worker_of_another_program_is_refused_unless_that_is_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = {**workers_ray._program(CPU), "torch": "0.1"}
    monkeypatch.setattr(workers_ray, "_program", lambda _: other)
    workers = RayWorkers("1", CPU)
    with workers, pytest.raises(ConfigError, match=r"^a worker has torch \S+, this process 0\.1: "):
        workers.result(workers.submit(abs, -1))
    workers = RayWorkers("1", CPU, any_machine=True)
    with workers:
        assert workers.result(workers.submit(abs, -1)) == 1


def test_workers_have_the_threads_of_the_process_they_work_for() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        workers = RayWorkers("1", CPU)
        with workers:
            assert workers.result(workers.submit(torch.get_num_threads)) == 3
    finally:
        torch.set_num_threads(threads)


def test_work_that_kills_its_workers_ends_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_ray, "RETRIES", 0)
    workers = RayWorkers("1", CPU)
    with workers, pytest.raises(WorkerError, match=r"^--workers 1: .*; give the command again") as caught:
        workers.result(workers.submit(signal.raise_signal, int(signal.SIGKILL)))
    assert "\n" not in str(caught.value)


def test_where_no_ray_runs_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))  # where Ray looks for a cluster of this machine
    with pytest.raises(ConfigError, match=r"^--workers ray: no Ray there .*`ray start`"):
        RayWorkers("ray", CPU).__enter__()
