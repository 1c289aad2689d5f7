"""`exlq explain` as a person and as a program sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from exlq import measurement
from exlq.cli import main
from tests.recipes.helpers import record


class Files(NamedTuple):
    record: str
    recipe: str
    other: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    place = tmp_path_factory.mktemp("explain")
    made = Files(*(str(place / name) for name in ("measurement.json", "a.json", "b.json")))
    measurement.save(record(), Path(made.record))
    assert main(["solve", made.record, "-b", "3.9", "-o", made.recipe]) == 0
    assert main(["solve", made.record, "-b", "6", "--format", "gguf", "-o", made.other]) == 0
    return made


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["explain", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_target_and_its_recipe_are_explained_alike(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    by_recipe = explained(capsys, files.record, "--recipe", files.recipe)["formats"]
    by_bits = explained(capsys, files.record, "-b", "3.9")["formats"]
    assert set(by_recipe) == {"exl2", "gguf"}
    for name, entry in by_recipe.items():
        assert entry["tensors"] == by_bits[name]["tensors"]
        assert entry["spend"] == by_bits[name]["spend"]


def test_the_tables_name_tensors_steps_and_what_more_bytes_buy(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--recipe", files.recipe, "--format", "gguf", "--spend", "10KB"]
    assert main(["explain", files.record, *arguments]) == 0
    shown = capsys.readouterr().out
    for words in ("1.down_proj", "lm_head", "KL/MiB", "(given)", "9.77 KiB more (--spend) would buy"):
        assert words in shown
    assert main(["explain", files.record, "-b", "6", "--limit", "2"]) == 0
    assert "2 of 8 tensors (--limit 0 or --json for all)" in capsys.readouterr().out


def test_a_filter_keeps_the_tensors_it_is_found_in(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    found = explained(capsys, files.record, "-b", "3.9", "--filter", r"layers\.1\..*v_proj")["formats"]
    for entry in found.values():
        assert [tensor["keys"] for tensor in entry["tensors"]] == [["model.layers.1.self_attn.v_proj"]]


def test_two_recipes_are_compared_in_the_formats_of_both(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [files.record, "--recipe", files.recipe, "--against", files.other]
    found = explained(capsys, *arguments)
    assert set(found["formats"]) == {"gguf"}
    assert found["notes"] == [f"{files.other} has no exl2"]
    here, other = (json.loads(Path(p).read_text(encoding="utf-8")) for p in (files.recipe, files.other))
    changes = found["formats"]["gguf"]["against"]["changes"]
    options = [side["outputs"]["gguf"]["options"] for side in (here, other)]
    assert {(c["key"], c["before"]["desc"], c["after"]["desc"]) for c in changes} == {
        (key, options[0][key], options[1][key]) for key in options[0] if options[0][key] != options[1][key]
    }
    assert main(["explain", *arguments]) == 0
    assert f"{len(changes)} of 8 differ" in capsys.readouterr().out


def test_a_recipe_of_another_measurement_is_told(
    files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = json.loads(Path(files.recipe).read_text(encoding="utf-8"))
    tree["measurement"]["sha256"] = "0" * 64
    path = tmp_path / "elsewhere.json"
    path.write_text(json.dumps(tree), encoding="utf-8")
    assert "another measurement" in explained(capsys, files.record, "--recipe", str(path))["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give one of --recipe FILE, -b BITS"),
        (["-b", "4", "--file-size", "60KB"], "give one of --recipe FILE"),
        (["-b", "4", "--filter", "("], "is no regular expression"),
        (["-b", "4", "--against", "nowhere.json"], "nowhere.json cannot be read"),
        (["--recipe", "nowhere.json"], "nowhere.json cannot be read"),
        (["-b", "4", "--spend", "much"], "is no size"),
    ],
)
def test_what_cannot_be_is_one_line(
    files: Files, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["explain", files.record, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert words in error
    assert error.count("\n") == 1


def test_pins_and_formats_that_a_recipe_does_not_have_are_refused(
    files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["explain", files.record, "--recipe", files.other]
    assert main([*arguments, "--pin", "v_proj=Q2_K"]) == 2
    assert "--pin chooses and --recipe is chosen already" in capsys.readouterr().err
    assert main([*arguments, "--format", "exl2"]) == 2
    assert "b.json has gguf, not exl2" in capsys.readouterr().err
