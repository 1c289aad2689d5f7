"""What is somebody else's stays; what is ours goes only when its successor is ready."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from exlq.errors import ConfigError
from exlq.pipeline import directory
from exlq.pipeline.directory import (
    prepare_work,
    put_files_in_place,
    put_in_place,
    require_directory,
    require_parent,
    require_replaceable,
)
from tests.pipeline.helpers import contents


def files(place: Path, *names: str) -> Path:
    place.mkdir(parents=True)
    for name in names:
        (place / name).write_text(f"{place.name} {name}", encoding="utf-8")
    return place


def model(place: Path, name: str, ours: bool = True) -> Path:
    """A directory that looks like an EXL2 model."""
    place.mkdir(parents=True)
    mark = {"exlq": "0.1"} if ours else {}
    config = {"quantization_config": {"quant_method": "exl2", **mark}}
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (place / "output.safetensors").write_text(name, encoding="utf-8")
    return place


def a_file(place: Path) -> None:
    place.write_text("mine", encoding="utf-8")


def with_a_file(place: Path) -> None:
    place.mkdir()
    a_file(place / "notes.txt")


def with_a_broken_config(place: Path) -> None:
    place.mkdir()
    a_file(place / "config.json")


def with_a_list_for_config(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text("[]", encoding="utf-8")


def with_a_plain_model(place: Path) -> None:
    place.mkdir()
    (place / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def with_anothers_model(place: Path) -> None:
    model(place, "other", ours=False)


FOREIGN = [
    a_file,
    with_a_file,
    with_a_broken_config,
    with_a_list_for_config,
    with_a_plain_model,
    with_anothers_model,
]


@pytest.mark.parametrize("make", FOREIGN)
def test_what_we_did_not_write_is_never_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "target")
    finished = model(tmp_path / "finished", "new")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="was not written by exlq: move it away"):
        require_replaceable(tmp_path / "target")
    with pytest.raises(ConfigError, match="was not written by exlq: move it away"):
        put_in_place(finished, tmp_path / "target")
    assert contents(tmp_path) == before


def test_an_empty_place_a_missing_one_and_a_model_of_ours_may_be_taken(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    model(tmp_path / "ours", "old")
    for name in ("empty", "missing", "ours"):
        require_replaceable(tmp_path / name)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_finished_directory_takes_its_place_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str | None, elsewhere: bool
) -> None:
    if elsewhere:
        monkeypatch.setattr(Path, "stat", stat_on_two_devices)
    work, target = tmp_path / "out" / "work", tmp_path / "far" / "away" / "model"
    finished = model(work / "exl2", "new")
    if old:
        model(target, old)
    wanted = contents(finished)
    put_in_place(finished, target)
    assert contents(target) == wanted
    assert not finished.exists()
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert list(work.iterdir()) == []


def stat_on_two_devices(path: Path, *, follow_symlinks: bool = True) -> os.stat_result:
    """As if what is named exl2 lay on another file system."""
    found = list(os.stat(path, follow_symlinks=follow_symlinks))  # noqa: PTH116
    found[2] += path.name == "exl2"
    return os.stat_result(found)


@pytest.mark.parametrize("make", [a_file, with_a_file, with_a_broken_config])
@pytest.mark.parametrize("no_resume", [False, True])
def test_a_work_directory_of_somebody_else_is_refused_and_left(
    make: Callable[[Path], None], tmp_path: Path, no_resume: bool
) -> None:
    make(tmp_path / "work")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="not a work directory of exlq: move it away"):
        prepare_work(tmp_path, no_resume)
    assert contents(tmp_path) == before


def test_our_work_directory_is_kept_or_begun_anew(tmp_path: Path) -> None:
    work = prepare_work(tmp_path / "a" / "b", no_resume=False)
    (work / "states.bin").write_text("much", encoding="utf-8")
    assert prepare_work(tmp_path / "a" / "b", no_resume=False) == work
    assert (work / "states.bin").exists()
    prepare_work(tmp_path / "a" / "b", no_resume=True)
    prepare_work(tmp_path / "a" / "b", no_resume=True)
    assert [path.name for path in work.iterdir()] == [directory.MARK]
    assert {path.name for path in work.parent.iterdir()} == {"work", "work.old-1"}, "of nothing none is kept"
    assert {path.name for path in (work.parent / "work.old-1").iterdir()} == {directory.MARK, "states.bin"}
    assert directory.old_work(work.parent) == [work.parent / "work.old-1"]


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"cannot be written to .*choose another -o"):
        prepare_work(tmp_path / "file", no_resume=False)


def test_a_measurements_place_must_be_there_or_become_the_jobs(tmp_path: Path) -> None:
    require_parent(tmp_path / "m.json", tmp_path / "out")
    require_parent(tmp_path / "out" / "m.json", tmp_path / "out")
    with pytest.raises(ConfigError, match=r"-om .*there is no directory .*none; make it"):
        require_parent(tmp_path / "none" / "m.json", tmp_path / "out")


@pytest.mark.parametrize("elsewhere", [False, True])
def test_finished_files_take_the_places_of_their_namesakes_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    if elsewhere:
        monkeypatch.setattr(Path, "stat", stat_on_two_devices)
    target = files(tmp_path / "gguf", "a-4.00bpw.gguf", "a-5.00bpw.gguf", "notes.txt")
    finished = files(tmp_path / "work" / "exl2", "a-4.00bpw.gguf", "a-4.00bpw.types.txt")
    moved = put_files_in_place(finished, target)
    assert moved == [target / "a-4.00bpw.gguf", target / "a-4.00bpw.types.txt"]
    assert {path: path.read_text(encoding="utf-8") for path in target.iterdir()} == {
        target / "a-4.00bpw.gguf": "exl2 a-4.00bpw.gguf",
        target / "a-4.00bpw.types.txt": "exl2 a-4.00bpw.types.txt",
        target / "a-5.00bpw.gguf": "gguf a-5.00bpw.gguf",
        target / "notes.txt": "gguf notes.txt",
    }
    assert not finished.exists()


@pytest.mark.parametrize("new", [["a.gguf"], ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]])
@pytest.mark.parametrize("old", [["a.gguf"], [f"a-0000{i}-of-00003.gguf" for i in (1, 2, 3)]])
def test_no_shard_of_an_earlier_file_of_the_name_is_left(
    tmp_path: Path, old: list[str], new: list[str]
) -> None:
    target = files(tmp_path / "gguf", *old, "a-b.gguf", "ab-00001-of-00002.gguf")
    put_files_in_place(files(tmp_path / "work" / "gguf", *new), target)
    kept = {path.name for path in target.iterdir()}
    assert kept == {*new, "a-b.gguf", "ab-00001-of-00002.gguf"}


def test_files_are_not_put_where_a_file_stands(tmp_path: Path) -> None:
    a_file(tmp_path / "gguf")
    finished = files(tmp_path / "work", "a.gguf")
    with pytest.raises(ConfigError, match="gguf exists and is no directory: move it away"):
        require_directory(tmp_path / "gguf")
    with pytest.raises(ConfigError, match="gguf exists and is no directory: move it away"):
        put_files_in_place(finished, tmp_path / "gguf")
    assert (finished / "a.gguf").exists()
    require_directory(tmp_path / "none")
    require_directory(finished)
