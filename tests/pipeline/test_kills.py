"""Killed at any instant, a job goes on with the same command to the bytes of an uninterrupted run."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq import faults
from exlq.pipeline.config import ConvertConfig
from tests.conftest import REPOSITORY
from tests.pipeline.helpers import SMALL_FLAGS, convert, settings

KILLED = -9
PLACES = ("exl2", "gguf", "measurement.json")

# Point and how many of its kind are passed first; those marked * are inside the writing of a file.
DEFAULT = ["measurement.partial.json written:1", "shard data:23", "place empty:1"]
SLOW = [
    "lock made:1",  # *
    "job.json part:1",  # *
    "job.json rename:2",
    "*down_proj*sensitivity.safetensors part:1",  # *
    "*sensitivity.safetensors written:9",
    "*-sensitivity.safetensors rename:15",
    "measurement.partial.json part:2",  # *
    "input-1 written:1",
    "gradient-1 written:1",
    "block-1-*sensitivity.safetensors part:1",  # *
    "states written:1",
    "states.json part:1",  # *
    "states.json written:2",
    "measurement.partial.json written:3",
    "measurement.json part:1",  # *
    "measurement.json rename:1",
    "????????????????????????????????????????.safetensors part:3",  # *
    "????????????????????????????????????????.safetensors written:8",
    "????????????????????????????????????????.safetensors part:14",  # *
    "states written:4",
    "shard header:1",  # *
    "place taken:1",
    "measurement.json part:2",  # *
    "????????????????????????????????????????.safetensors written:16",
    "????????????????????????????????????????.safetensors rename:24",
    "states.json rename:5",
    "gguf data:9",  # *
    "place file:2",
    "measurement.json written:3",
    "discarding:2",
    "summary.json part:1",  # *
]


def command(model: Path, out: Path, ids: Path, *more: str) -> list[str]:
    where = ["-i", str(model), "-o", str(out), "-c", str(ids), "--threads", str(torch.get_num_threads())]
    return [sys.executable, "-m", "exlq", "convert", "-q", *where, "-b", "5.0", *SMALL_FLAGS, *more]


def ran(arguments: list[str], fault: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EXLQ_FAULT": fault, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        arguments, env=environment, capture_output=True, text=True, check=False, cwd=REPOSITORY
    )


def sums(out: Path) -> dict[str, str]:
    """SHA-256 of all that a job delivers."""
    found = [path for place in PLACES for path in (out / place, *(out / place).rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)
    }


@pytest.fixture(scope="module")
def config(llama: Path, ids_file: Path, tmp_path_factory: pytest.TempPathFactory) -> ConvertConfig:
    out = tmp_path_factory.mktemp("whole") / "out"
    return settings(llama, out, ids_file, bits=5.0, formats=None, measure=None)


@pytest.fixture(scope="module")
def whole(config: ConvertConfig) -> dict[str, str]:
    """Of a run that nothing interrupts, in this process and a directory of its own."""
    convert(config)
    found = sums(config.out_dir)
    assert len(found) == 10, "of two models and a measurement"
    return found


@pytest.mark.parametrize("fault", DEFAULT)
def test_a_killed_job_goes_on_to_the_same_bytes(
    config: ConvertConfig, whole: dict[str, str], tmp_path: Path, fault: str
) -> None:
    assert config.calibration is not None
    killed = ran(command(config.in_dir, tmp_path / "out", config.calibration), fault)
    assert killed.returncode == KILLED, killed.stderr
    convert(replace(config, out_dir=tmp_path / "out"))
    assert sums(tmp_path / "out") == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*PLACES, "summary.json", "work"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", SLOW)
def test_a_command_killed_anywhere_and_given_again_delivers_the_same_bytes(
    config: ConvertConfig, whole: dict[str, str], tmp_path: Path, fault: str
) -> None:
    assert config.calibration is not None
    arguments = command(config.in_dir, tmp_path / "out", config.calibration)
    killed = ran(arguments, fault)
    assert killed.returncode == KILLED, killed.stderr
    again = ran(arguments)
    assert again.returncode == 0, again.stderr
    assert sums(tmp_path / "out") == whole
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*PLACES, "summary.json", "work"}
    assert not list((tmp_path / "out" / "work").rglob("*.part"))


def test_kills_are_of_every_stage_and_at_least_five_inside_a_file_write() -> None:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    inside = [line for line in lines if line.startswith('    "') and line.endswith("# *")]
    assert len(inside) >= 5
    assert len(SLOW) >= 25


def test_no_point_kills_unless_it_is_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(os, "kill", lambda *arguments: killed.append(arguments))
    faults.point("shard data")
    faults.point("")
    assert not killed
