"""What cannot work is refused in one line, before a block is read or a file is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from exlq.cli import main
from exlq.models.model import Model
from tests.helpers import edit_config, make_model
from tests.pipeline.helpers import Place, block_is_read, contents, write_texts


@pytest.fixture
def place(llama: Path, ids_file: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, llama, ids_file)


def wider_tokenizer(place: Place) -> list[str]:
    small = make_model("llama", place.directory / "small", tied=False, vocab_size=200)
    return place.arguments(model=small)


def edited(place: Place, **settings_: Any) -> list[str]:
    model = place.model_copy()
    edit_config(model, **settings_)
    return place.arguments(model=model)


def lacking(place: Place, name: str) -> list[str]:
    path = place.model_copy() / "model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    return place.arguments(model=path.parent)


def too_large(place: Place, name: str) -> list[str]:
    path = place.model_copy() / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = 1e5
    save_file(tensors, path, metadata={"format": "pt"})
    return place.arguments(model=path.parent)


def large_embedding(place: Place, *more: str) -> list[str]:
    """A model whose embedding takes more than a mebibyte in float16."""
    large = make_model("llama", place.directory / "large", tied=True, vocab_size=9000)
    return place.arguments(*more, model=large)


def without_file(place: Place, *names: str) -> list[str]:
    model = place.model_copy()
    for name in names:
        (model / name).unlink()
    return place.arguments(model=model)


def foreign(place: Place, path: str, *more: str) -> list[str]:
    """Somebody else's file below the place's directory."""
    file = place.directory / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine", encoding="utf-8")
    return place.arguments(*more)


def foreign_model(place: Place) -> list[str]:
    """An EXL2 directory that another tool wrote where ours is to go."""
    config = {"quantization_config": {"quant_method": "exl2"}}
    arguments = foreign(place, "out/exl2/output.safetensors")
    (place.out / "exl2" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return arguments


def short_text(place: Place) -> list[str]:
    return place.arguments(ids=write_texts(place.directory / "short.parquet", ["few words"]))


def plain_text(place: Place) -> list[str]:
    path = place.directory / "plain.parquet"
    path.write_text("not a parquet file", encoding="utf-8")
    return place.arguments(ids=path)


def gemma3(place: Place) -> list[str]:
    return place.arguments(model=make_model("gemma3", place.directory / "gemma3", tied=True))


# What is refused: how the command is made, and what its one line must say.
REFUSED: Mapping[str, tuple[Callable[[Place], list[str]], tuple[str, ...]]] = {
    "a target out of reach": (
        lambda p: p.arguments("-b", "2.0"),
        ("-b 2.0", "model reaches 2.", " to 8."),
    ),
    "a target above all options": (lambda p: p.arguments("-b", "9.5"), ("-b 9.5", "this model reaches 2.")),
    "a target beyond all bits": (lambda p: p.arguments("-b", "17"), ("-b 17", "at most 16")),
    "a target that is no number": (lambda p: p.arguments("-b", "nan"), ("-b nan",)),
    "rows longer than the model takes": (lambda p: p.arguments("-l", "200"), ("200", "128")),
    "measured rows longer than that": (lambda p: p.arguments("-ml", "129"), ("129", "128")),
    "one row, of which none can be held out": (lambda p: p.arguments("-r", "1"), ("rows is 1", "2")),
    "one row to measure on": (lambda p: p.arguments("-mr", "1"), ("measurement_rows is 1", "2")),
    "rows without a second half": (lambda p: p.arguments("-l", "2"), ("length is 2", "3")),
    "an unsupported architecture": (
        lambda p: edited(p, architectures=["OPTForCausalLM"]),
        ("OPTForCausalLM", "LlamaForCausalLM", "Qwen3ForCausalLM"),
    ),
    "a family exllamav2 does not know": (gemma3, ("ExLlamaV2 0.3.2 does not know Gemma3ForCausalLM",)),
    "a tensor that is missing": (
        lambda p: lacking(p, "model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.up_proj.weight",),
    ),
    "a tensor that float16 cannot hold": (
        lambda p: too_large(p, "model.norm.weight"),
        ("model.norm.weight", "65504"),
    ),
    "shards that cannot hold the embedding": (
        lambda p: large_embedding(p, "-ss", "1"),
        ("-ss 1", "model.embed_tokens.weight", "give 2 or more"),
    ),
    "tensors of another shape": (lambda p: edited(p, intermediate_size=128), ("gate_proj", "128", "96")),
    "no weights": (lambda p: without_file(p, "model.safetensors"), ("no weights", "safetensors")),
    "no config": (lambda p: without_file(p, "config.json"), ("no config.json",)),
    "no tokenizer": (
        lambda p: without_file(p, "tokenizer.json", "tokenizer_config.json"),
        ("tokenizer.json",),
    ),
    "a tokenizer of a larger model": (wider_tokenizer, ("gives token 2", "the model has 200")),
    "no model": (lambda p: p.arguments(model=p.directory / "none"), ("none",)),
    "an unknown format": (lambda p: p.arguments("--format", "exl2,gguf9"), ("gguf9", "exl2")),
    "no format": (lambda p: p.arguments("--format", ","), ("known formats are exl2",)),
    "a missing parquet file": (lambda p: p.arguments(ids=p.directory / "no.parquet"), ("no.parquet",)),
    "a file that is no parquet": (plain_text, ("plain.parquet", "parquet")),
    "too few tokens": (short_text, ("short.parquet", "10 tokens found", "512 are needed")),
    "no such column": (lambda p: p.arguments("--text-column", "body"), ("body", "input_ids")),
    "no target": (Place.without_target, ("-b", "-om")),
    "7 bits for the head": (lambda p: p.arguments("-hb", "7"), ("-hb 7", "2, 3, 4, 5, 6, 8")),
    "a device that is not here": (lambda p: p.arguments("--device", "cuda:99"), ("--device cuda:99", "cpu")),
    "a device without numbers": (lambda p: p.arguments("--device", "meta"), ("--device meta", "cpu")),
    "no threads": (lambda p: p.arguments("--threads", "0"), ("--threads 0", "at least 1")),
    "shards of less than nothing": (lambda p: p.arguments("-ss", "-1"), ("-ss -1",)),
    "a place for the measurement that is not there": (
        lambda p: p.arguments("-om", str(p.directory / "none" / "m.json")),
        ("none", "-om"),
    ),
    "both measurements": (
        lambda p: p.arguments("-om", str(p.directory / "a"), "-m", str(p.directory / "b")),
        ("-om", "-m"),
    ),
    "a measurement that is not there": (
        lambda p: p.arguments("-m", str(p.directory / "none.json")),
        ("none.json", "No such file"),
    ),
    "a work directory of somebody else": (lambda p: foreign(p, "out/work/notes.txt"), ("out/work",)),
    "a file in the work directory's place": (lambda p: foreign(p, "out/work"), ("out/work",)),
    "a file in the job's place": (lambda p: foreign(p, "out"), ("out",)),
    "an output of somebody else": (lambda p: foreign(p, "out/exl2/notes.txt"), ("out/exl2", "move it away")),
    "a file in the output's place": (lambda p: foreign(p, "out/exl2"), ("out/exl2", "move it away")),
    "another tool's model in its place": (foreign_model, ("out/exl2", "move it away")),
    "a -cf directory of somebody else": (
        lambda p: foreign(p, "there/notes.txt", "-cf", str(p.directory / "there")),
        ("there", "move it away"),
    ),
    "the source as -cf": (lambda p: p.arguments("-cf", str(p.model)), ("llama", "move it away")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_in_one_line_before_anything_is_done(
    place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, wanted = REFUSED[name]
    arguments = make(place)
    before = contents(place.directory), contents(place.model)
    monkeypatch.setattr(Model, "block", block_is_read)
    code = main(arguments)
    shown = capsys.readouterr()
    assert code == 2
    lines = shown.err.splitlines()
    assert len(lines) == 1, shown.err
    assert lines[0].startswith("error: ")
    for part in wanted:
        assert part in lines[0]
    after = contents(place.directory)
    if name != "a measurement that is not there":  # found when the plan has been printed
        assert shown.out == ""
        assert after == before[0]
    assert {path: data for path, data in after.items() if path in before[0]} == before[0]
    assert contents(place.model) == before[1]
