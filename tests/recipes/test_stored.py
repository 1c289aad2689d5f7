"""Recipe files: what is written is read, what cannot be one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from exlq.errors import ConfigError
from exlq.recipes import stored
from exlq.recipes.solve import Targets, solve
from exlq.recipes.two_budgets import Budgets
from tests.recipes.helpers import record


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    made = record()
    path = tmp_path / "recipe.json"
    stored.save(stored.recipe_of(solve(made, Targets(bits=(3.9,))).answers, made), path)
    return dict(json.loads(path.read_text(encoding="utf-8")))


def load(tree: object, place: Path) -> stored.Recipe:
    path = place / "r.json"
    path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    return stored.load(path)


def test_a_recipe_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = record()
    for targets in (Targets(bits=(3.9,)), Targets(budgets=Budgets(40_000, 40_000))):
        answers = solve(made, targets).answers
        recipe = stored.recipe_of(answers, made)
        stored.save(recipe, tmp_path / "a.json")
        assert stored.load(tmp_path / "a.json") == recipe
        for answer in answers:
            output = recipe.outputs[answer.sheet.format]
            assert output.options == {key: option.desc for key, option in answer.options.items()}
            assert (output.bpw, output.bytes) == (answer.bpw, answer.n_bytes)
    assert recipe.target["--n-gpu-layers"] >= 0


def test_the_hash_is_of_what_was_measured_and_not_of_the_figures() -> None:
    assert stored.origin_sha256(record(seed=0)) == stored.origin_sha256(record(seed=1))
    other = record(settings={"rounding": "weighted"})
    assert stored.origin_sha256(other) != stored.origin_sha256(record())


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"format": "exlq-measurement"}, "'exlq-measurement', not 'exlq-recipe'"),
    ({"version": 2}, "version is 2, not 1"),
    ({"version": True}, "version is True"),
    ({"more": 1}, "has the unknown 'more'"),
    ({"outputs": {}}, "outputs are []"),
    ({"outputs": {"awq": {}}}, "outputs are ['awq']"),
    ({"outputs": {"gguf": 3}}, "gguf is 3, not a JSON object"),
    ({"target": {"-b": "4"}}, "target -b is '4', not a number"),
    ({"measurement": {"sha256": 3}}, "sha256 is 3, not printable text"),
]
OUTPUT_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"bpw": -1}, "gguf bpw is -1"),
    ({"bytes": 1.5}, "gguf bytes is 1.5"),
    ({"predicted_kl": True}, "gguf predicted_kl is True"),
    ({"fixed": ["x"]}, "gguf fixed is ['x'], not a list of keys"),
    ({"fixed": [[]]}, "gguf fixed is [[]]"),
    ({"options": {}}, "gguf options are empty"),
    ({"options": {"lm_head": 6}}, "gguf lm_head is 6"),
    ({"extra": 1}, "gguf has the unknown 'extra'"),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_file_that_is_no_recipe_is_refused(
    tree: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    _refused({**tree, **change}, words, tmp_path)


@pytest.mark.parametrize(("change", "words"), OUTPUT_CHANGES)
def test_an_output_that_cannot_be_is_refused(
    tree: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    output = tree["outputs"]["gguf"] | ({"fixed": []} if "options" in change else {}) | change
    _refused({**tree, "outputs": {"gguf": output}}, words, tmp_path)


@pytest.mark.parametrize("key", ["version", "target", "measurement", "outputs"])
def test_a_missing_part_is_named(tree: dict[str, Any], tmp_path: Path, key: str) -> None:
    _refused({name: value for name, value in tree.items() if name != key}, key, tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"format": NaN}', "{" * 20, '{"a": 1, "a": 2}'])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    _refused(text, "r.json", tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read"):
        stored.load(tmp_path / "none.json")


def _refused(tree: object, words: str, place: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tree, place)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
