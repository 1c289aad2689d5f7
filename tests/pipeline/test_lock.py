"""One process at a time works in a directory; a dead one's lock is taken over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from exlq.errors import ConfigError
from exlq.pipeline import lock
from exlq.pipeline.lock import LOCK, Lock
from tests.conftest import REPOSITORY
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, contents, convert
from tests.pipeline.test_kills import command, ran

HOLD = """
import sys, time
from pathlib import Path
from exlq.pipeline.lock import Lock
Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
TAKE = """
import sys
from pathlib import Path
from exlq.errors import ConfigError
from exlq.pipeline.lock import Lock
print("ready", flush=True)
sys.stdin.readline()
try:
    Lock(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.readline()
except ConfigError:
    print("refused", flush=True)
"""


def started(code: str, out: Path) -> subprocess.Popen[str]:
    """A process that has printed its first line."""
    pipe = subprocess.PIPE
    found = subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY
    )
    assert found.stdout is not None
    found.stdout.readline()
    return found


def ended(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_a_second_process_gets_one_line_and_the_first_goes_on(finished: Finished, tmp_path: Path) -> None:
    config = finished.config
    assert config.calibration is not None
    out = tmp_path / "out"
    holder = started(HOLD, out)
    try:
        found = ran(command(config.in_dir, out, config.calibration))
        assert (found.returncode, found.stdout) == (2, "")
        assert found.stderr == (
            f"error: {out} is being worked on by process {holder.pid}: wait for it, or choose another -o\n"
        )
        assert list(out.iterdir()) == [out / LOCK]
    finally:
        ended(holder)
    Lock(out).release()
    assert list(out.iterdir()) == []


def test_of_many_that_find_a_dead_ones_lock_one_takes_it(tmp_path: Path) -> None:
    ended(started(HOLD, tmp_path))
    takers = [started(TAKE, tmp_path) for _ in range(6)]
    try:
        for taker in takers:
            assert taker.stdin is not None
            taker.stdin.write("go\n")
            taker.stdin.flush()
        said = [taker.stdout.readline().strip() for taker in takers if taker.stdout is not None]
        assert sorted(said) == ["refused"] * 5 + ["taken"]
    finally:
        for taker in takers:
            ended(taker)


def test_a_process_that_has_only_the_number_of_the_owner_is_not_taken_for_it(tmp_path: Path) -> None:
    holder = lock._this_process()
    (tmp_path / LOCK).write_text(json.dumps(holder._replace(started="long ago")._asdict()), encoding="utf-8")
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_this_process_holds_its_lock_once(tmp_path: Path) -> None:
    held = Lock(tmp_path)
    with pytest.raises(ConfigError, match=f"being worked on by process {os.getpid()}: wait for it"):
        Lock(tmp_path)
    held.release()
    held.release()
    Lock(tmp_path).release()


def test_a_lock_of_another_host_is_refused_with_what_to_do(tmp_path: Path) -> None:
    owner = lock._this_process()._replace(host="far-away", pid=7)
    text = json.dumps(owner._asdict())
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"another host \(far-away, process 7\): if exlq .*, delete .*lock"):
        Lock(tmp_path)
    assert (tmp_path / LOCK).read_text(encoding="utf-8") == text


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_lock_whose_maker_died_before_it_was_written_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    long_ago = time.time() - 60
    os.utime(tmp_path / LOCK, (long_ago, long_ago))
    Lock(tmp_path).release()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_just_being_written_is_waited_for(tmp_path: Path) -> None:
    path, owner = tmp_path / LOCK, lock._this_process()
    path.touch()
    writing = threading.Timer(0.3, lambda: path.write_text(json.dumps(owner._asdict())))
    writing.start()
    with pytest.raises(ConfigError, match="is being worked on"):
        Lock(tmp_path)
    writing.join()


def test_an_interrupted_job_and_a_refused_one_let_others_in(finished: Finished, tmp_path: Path) -> None:
    config = replace(finished.config, out_dir=tmp_path / "out", measurement=finished.measurement)
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("quantizing exl2", 1)))
    assert not (tmp_path / "out" / LOCK).exists()
    (tmp_path / "other" / "work").mkdir(parents=True)
    (tmp_path / "other" / "work" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="not a work directory"):
        convert(replace(config, out_dir=tmp_path / "other"))
    assert contents(tmp_path / "other").keys() == {"work/notes.txt"}
