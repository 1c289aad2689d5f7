"""What is run of what lies at a path."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from exlq.errors import ConfigError, ModelError
from exlq.evaluation.llamacpp import quantize_chunk
from exlq.run import source
from exlq.run.source import Source, find_source, gguf_facts
from tests.evaluation.helpers import by_packer, write_llama


def job(directory: Path, exl2: Path | None, gguf: Path | None) -> Path:
    if exl2:
        shutil.copytree(exl2, directory / "exl2")
    if gguf:
        (directory / "gguf").mkdir(parents=True)
        shutil.copy(gguf, directory / "gguf" / "m.gguf")
    return directory


@pytest.mark.parametrize(("installed", "kind"), [(Path("x.so"), "gguf"), (None, "directory")])
def test_of_a_job_with_both_the_format_that_can_be_run_is_taken(
    exl2: Path,
    plain_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    installed: Path | None,
    kind: str,
) -> None:
    monkeypatch.setattr(source, "shared_library", lambda: installed)
    place = job(tmp_path / "job", exl2, plain_gguf)
    assert find_source(place).kind == kind
    assert find_source(place, "exl2") == Source("directory", place / "exl2")
    assert find_source(place, "gguf") == Source("gguf", place / "gguf" / "m.gguf")


def test_what_is_alone_is_taken(exl2: Path, plain_gguf: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert find_source(job(tmp_path / "a", exl2, None)).kind == "directory"
    assert find_source(job(tmp_path / "b", None, plain_gguf)).kind == "gguf"
    assert find_source(tmp_path / "b" / "gguf").kind == "gguf"
    assert find_source(tiny_llama) == Source("directory", tiny_llama)
    assert find_source(plain_gguf) == Source("gguf", plain_gguf)


def test_what_cannot_be_run_is_refused_in_one_line(
    exl2: Path, plain_gguf: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    place = job(tmp_path / "job", exl2, None)
    two = job(tmp_path / "two", None, plain_gguf)
    shutil.copy(plain_gguf, two / "gguf" / "other.gguf")
    (tmp_path / "empty").mkdir()
    for path, format, why in (
        (tmp_path / "none", None, "no such file or directory"),
        (tmp_path / "empty", None, "no model here"),
        (place, "gguf", "has exl2; leave --format out"),
        (tiny_llama, "exl2", "has one model"),
        (two, None, r"m\.gguf, other\.gguf; give one"),
    ):
        with pytest.raises((ModelError, ConfigError), match=why) as caught:
            find_source(path, format)
        assert "\n" not in str(caught.value)


def test_of_a_split_file_the_first_shard_is_wanted_and_all_must_be_there(
    llama_cpp: None, tiny_llama: Path, tmp_path: Path
) -> None:
    store = by_packer("Q8_0", quantize_chunk)
    write_llama(tiny_llama, tmp_path / "m.gguf", store, split_max_tensors=9)
    shards = sorted(tmp_path.glob("m-*.gguf"))
    assert find_source(tmp_path).path == shards[0]
    facts = gguf_facts(shards[0])
    assert (facts.context_length, facts.has_template) == (512, False)
    assert facts.n_bytes == sum(shard.stat().st_size for shard in shards)
    with pytest.raises(ModelError, match=f"is shard 2 of {len(shards)}; give the first, {shards[0]}"):
        find_source(shards[1])
    shards[-1].unlink()
    with pytest.raises(ModelError, match=f"{shards[-1].name} is missing"):
        gguf_facts(shards[0])


def test_a_file_that_is_no_model_is_refused(plain_gguf: Path, tmp_path: Path) -> None:
    for name, data in (("short", plain_gguf.read_bytes()[:500]), ("text", b"hello"), ("empty", b"")):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(ModelError, match="no whole GGUF file"):
            gguf_facts(path)
