"""The recipe file: what every matrix is to be stored as, to be taken by `convert --recipe`.

{"format": "exlq-recipe", "version": 1, "target": {"-b": 4.2}, "measurement": {"sha256": …},
 "outputs": {"gguf": {"bpw": …, "bytes": …, "predicted_kl": …, "fixed": ["lm_head", …],
                      "options": {"model.layers.0.self_attn.q_proj": "Q4_K", …}}}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exlq.errors import ConfigError
from exlq.files import atomic_write_json, read_json
from exlq.measurement import Measurement
from exlq.measurement.record import shown
from exlq.names import FORMATS
from exlq.recipes.targets import Answer

FORMAT, VERSION = "exlq-recipe", 1
TOP = {"format", "version", "target", "measurement", "outputs"}


@dataclass(frozen=True)
class RecipeOutput:
    """One format of a recipe: descriptions of options by key; `fixed` were not chosen by the solver."""

    bpw: float
    bytes: int
    predicted_kl: float | None
    fixed: tuple[str, ...]
    options: Mapping[str, str]


@dataclass(frozen=True)
class Recipe:
    """What a target came to; `measurement` is the hash of what was measured and how."""

    target: Mapping[str, float]
    measurement: str
    outputs: Mapping[str, RecipeOutput]


def recipe_of(answers: Sequence[Answer], measurement: Measurement) -> Recipe:
    """The recipe of one target's answers, one for each format."""
    outputs = {
        answer.sheet.format: RecipeOutput(
            answer.bpw,
            answer.n_bytes,
            None if answer.predicted is None else answer.predicted.kl,
            answer.fixed,
            {key: option.desc for key, option in answer.options.items()},
        )
        for answer in answers
    }
    target = dict(answers[0].target)
    if answers[0].split is not None:
        target["--n-gpu-layers"] = answers[0].split.n_gpu_layers
    return Recipe(target, origin_sha256(measurement), outputs)


def origin_sha256(measurement: Measurement) -> str:
    """A hash of what was measured and how."""
    return hashlib.sha256(json.dumps(measurement.origin, sort_keys=True, default=dict).encode()).hexdigest()


def save(recipe: Recipe, path: Path) -> None:
    """Write the recipe; a file already there is replaced at once or not at all."""
    atomic_write_json(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "target": dict(recipe.target),
            "measurement": {"sha256": recipe.measurement},
            "outputs": {name: asdict(output) for name, output in recipe.outputs.items()},
        },
    )


def load(path: Path) -> Recipe:
    """The recipe in a file, checked whole.

    Raises:
        ConfigError: in one line that names the file and what is wrong.
    """
    try:
        return _recipe(read_json(path))
    except OSError as exc:
        raise ConfigError(f"{path} cannot be read: {exc.strerror}; give a recipe of exlq solve") from exc
    except ConfigError as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    except ValueError as exc:
        raise ConfigError(f"{path} is not valid JSON: {' '.join(str(exc).split())}") from exc


def _recipe(tree: object) -> Recipe:
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else tree
        raise ConfigError(f"this is {shown(found)}, not {FORMAT!r}; make one with exlq solve -o")
    if type(tree.get("version")) is not int or tree["version"] != VERSION:
        raise ConfigError(f"version is {shown(tree.get('version'))}, not {VERSION}; solve again")
    _require_keys("the recipe", tree, TOP)
    target, origin = _object("target", tree["target"]), _object("measurement", tree["measurement"])
    _require_keys("measurement", origin, {"sha256"})
    outputs = _object("outputs", tree["outputs"])
    if not outputs or set(outputs) - set(FORMATS):
        raise ConfigError(f"outputs are {shown(list(outputs))}, not some of {', '.join(FORMATS)}")
    return Recipe(
        {_text("a flag", flag): _number(f"target {flag}", value) for flag, value in target.items()},
        _text("measurement sha256", origin["sha256"]),
        {name: _output(name, value) for name, value in outputs.items()},
    )


def _output(name: str, value: object) -> RecipeOutput:
    entry = _object(name, value)
    _require_keys(name, entry, set(RecipeOutput.__dataclass_fields__))
    options = _object(f"{name} options", entry["options"])
    if not options:
        raise ConfigError(f"{name} options are empty; solve again")
    fixed, size = entry["fixed"], entry["bytes"]
    if not isinstance(fixed, list) or not all(isinstance(key, str) and key in options for key in fixed):
        raise ConfigError(f"{name} fixed is {shown(fixed)}, not a list of keys of its options")
    if type(size) is not int or size < 0:
        raise ConfigError(f"{name} bytes is {shown(size)}, not an integer from 0")
    kl = entry["predicted_kl"]
    return RecipeOutput(
        bpw=_number(f"{name} bpw", entry["bpw"]),
        bytes=size,
        predicted_kl=None if kl is None else _number(f"{name} predicted_kl", kl),
        fixed=tuple(fixed),
        options={_text("a key", key): _text(f"{name} {key}", desc) for key, desc in options.items()},
    )


def _require_keys(name: str, entry: Mapping[str, Any], wanted: set[str]) -> None:
    if missing := sorted(wanted - set(entry)):
        raise ConfigError(f"{name} lacks {', '.join(missing)}; solve again")
    if unknown := sorted(set(entry) - wanted):
        raise ConfigError(f"{name} has the unknown {', '.join(map(shown, unknown))}; remove it")


def _object(name: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{name} is {shown(value)}, not a JSON object")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value or not value.isprintable():
        raise ConfigError(f"{name} is {shown(value)}, not printable text")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ConfigError(f"{name} is {shown(value)}, not a number from 0")
    return value
