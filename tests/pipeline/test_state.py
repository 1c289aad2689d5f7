"""A job that goes on is the job that was begun: what is another now is named, and nothing is mixed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from exlq.errors import ConfigError
from exlq.pipeline import job, state
from exlq.pipeline.config import ConvertConfig
from exlq.pipeline.progress import silent
from tests.helpers import make_model
from tests.pipeline.conftest import Finished
from tests.pipeline.helpers import Events, contents, convert, copied, settings, write_ids


def begun(config: ConvertConfig) -> tuple[str, ...]:
    """What the user is told when the job is taken up."""
    taken = job.begin(config, silent, "a command")
    taken.lock.release()
    return taken.changes


@pytest.fixture
def config(llama: Path, ids_file: Path, tmp_path: Path) -> ConvertConfig:
    """A conversion of a model and a text that may be changed."""
    model = copied(llama, tmp_path / "model")
    ids = tmp_path / "ids.parquet"
    ids.write_bytes(ids_file.read_bytes())
    return settings(model, tmp_path / "out", ids)


def other_weights(config: ConvertConfig) -> None:
    make_model("llama", config.in_dir, tied=False, seed=1)


def other_text(config: ConvertConfig) -> None:
    assert config.calibration is not None
    write_ids(config.calibration, seed=1)


def other_tokenizer(config: ConvertConfig) -> None:
    path = config.in_dir / "tokenizer_config.json"
    path.write_text(path.read_text(encoding="utf-8") + "\n", encoding="utf-8")


INPUTS: dict[str, Callable[[ConvertConfig], None]] = {
    "model.safetensors": other_weights,
    "the text of -c": other_text,
    "the tokenizer": other_tokenizer,
}


STOPS = {
    "model.safetensors": ("quantizing exl2", 1),
    "the text of -c": ("measuring", 1),
    "the tokenizer": ("measuring", 2),
}


@pytest.mark.parametrize("name", INPUTS)
def test_a_changed_input_is_named_and_nothing_of_the_old_is_used(
    config: ConvertConfig, tmp_path: Path, name: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(STOPS[name]))
    INPUTS[name](config)
    said = begun(config)
    assert said == (
        f"{name} changed since the last run in {config.out_dir}: nothing made from the old is used",
    )
    convert(config)
    convert(replace(config, out_dir=tmp_path / "fresh"))
    for place in ("exl2", "measurement.json"):
        one, other = (tmp_path / out / place for out in ("out", "fresh"))
        assert contents(one) == contents(other)
    assert (config.out_dir / "measurement.json").read_bytes() == (
        tmp_path / "fresh" / "measurement.json"
    ).read_bytes()


def test_a_changed_setting_is_named(config: ConvertConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    assert begun(config) == ()
    said = begun(replace(config, bits=5.0, seed=3, threads=1))
    assert said == (
        f"bits was 6.0, now 5.0; seed was 0, now 3 since the last run in {config.out_dir}: "
        "only what that leaves the same is used",
    )
    assert begun(replace(config, bits=5.0, seed=3)) == ()


def test_a_changed_measurement_is_named(finished: Finished, tmp_path: Path) -> None:
    given = tmp_path / "m.json"
    given.write_bytes(finished.measurement.read_bytes())
    config = replace(finished.config, out_dir=tmp_path / "out", measurement=given)
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("quantizing exl2", 1)))
    given.write_text(given.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert "the file of -m changed since" in begun(config)[0]


def test_a_finished_job_whose_input_changed_unseen_is_not_taken_for_finished(
    config: ConvertConfig,
) -> None:
    convert(config)
    assert job.finished_summary(config) is not None
    path = config.in_dir / "model.safetensors"
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert job.finished_summary(config) is None


MACHINES: dict[str, dict[str, Any]] = {
    "3 threads": {"threads": 3},
    "cuda:0": {"device": "cuda:0"},
    "torch 9.9": {"torch": "9.9"},
}


@pytest.mark.parametrize("name", MACHINES)
def test_another_machine_is_refused_unless_it_is_allowed(
    config: ConvertConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    real = state.machine
    monkeypatch.setattr(state, "machine", lambda device: {**real(device), **MACHINES[name]})
    before = contents(config.out_dir)
    with pytest.raises(ConfigError, match=rf"was begun with .*, now it would be {name}: .*--allow-other"):
        begun(config)
    assert contents(config.out_dir) == before
    assert begun(replace(config, allow_other_machine=True)) == ()
    assert begun(config) == (), "the job is now this machine's"


def test_no_resume_wants_no_machine_and_leaves_the_old_work_beside(
    config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    old = contents(config.out_dir / "work")
    real = state.machine
    monkeypatch.setattr(state, "machine", lambda device: {**real(device), "threads": 3})
    assert begun(replace(config, no_resume=True)) == ()
    assert contents(config.out_dir / "work.old-1") == old
    assert contents(config.out_dir / "work").keys() == {"job.json"}


def test_a_cleaned_directory_may_be_worked_in_by_another_machine(
    config: ConvertConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(replace(config, clean=True))
    real = state.machine
    monkeypatch.setattr(state, "machine", lambda device: {**real(device), "threads": 3})
    assert begun(replace(config, bits=5.0)) == ()


def test_the_state_of_a_newer_program_is_refused_and_a_broken_one_is_nothing(config: ConvertConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    mark = config.out_dir / "work" / "job.json"
    whole = json.loads(mark.read_text(encoding="utf-8"))
    for changed in ({"version": 1}, {"inputs": 3}, {"machine": None}):
        mark.write_text(json.dumps({**whole, **changed}), encoding="utf-8")
        assert state.begun(mark.parent) is None
    mark.write_text(json.dumps({**whole, "version": 3}), encoding="utf-8")
    with pytest.raises(ConfigError, match="is of version 3, known is 2: take the newer exlq, or give -nr"):
        begun(config)


def test_the_state_says_threads_device_and_every_input(config: ConvertConfig) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(config, Events(("measuring", 1)))
    found = state.begun(config.out_dir / "work")
    assert found is not None
    assert (found.machine["threads"], found.machine["device"]) == (torch.get_num_threads(), "cpu")
    assert found.inputs.keys() == {"config.json", "model.safetensors", "the tokenizer", "the text of -c"}
