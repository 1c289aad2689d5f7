"""Reading config.json and finding the family that it names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq.errors import ModelError
from exlq.models.families import FAMILIES
from exlq.models.family import Family

# Read by this package's own readers, which hand over plain tensors.
_READABLE_METHODS = ("exl2",)


def family_of(directory: Path) -> Family:
    """The family config.json names.

    Raises ModelError for anything that is not exactly one supported, unquantized architecture.
    """
    families = {name: family for family in FAMILIES.values() for name in family.architectures}
    raw = read_json(directory)
    named = raw.get("architectures")
    supported = ", ".join(sorted(families))
    if not isinstance(named, list) or len(named) != 1:
        raise ModelError(
            f"{directory}: config.json names the architectures {named}; wanted one of {supported}"
        )
    family = families.get(named[0])
    if family is None:
        raise ModelError(
            f"{directory}: the architecture {named[0]} is not supported; supported are {supported}"
        )
    _check_model_type(directory, raw, family)
    _check_not_quantized(directory, raw)
    return family


def read_json(directory: Path) -> dict[str, Any]:
    """config.json as it stands; raises ModelError where it is missing or not an object."""
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise ModelError(f"no config.json in {directory}; wanted a Hugging Face model directory") from exc
    except (json.JSONDecodeError, UnicodeDecodeError) as exc:
        raise ModelError(f"{path} is not JSON ({exc}); download it again") from exc
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}; wanted an object")
    return raw


def _check_model_type(directory: Path, raw: Mapping[str, Any], family: Family) -> None:
    found, wanted = raw.get("model_type"), (family.model_type, *family.other_model_types)
    if found is not None and found not in wanted:
        raise ModelError(
            f"{directory}: config.json says model_type {found!r} with {family.architectures[0]};"
            f" wanted {' or '.join(map(repr, wanted))}"
        )


def _check_not_quantized(directory: Path, raw: Mapping[str, Any]) -> None:
    settings = raw.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else settings
    if method is not None and method not in _READABLE_METHODS:
        raise ModelError(f"{directory} is already quantized ({method}); wanted bf16, fp16 or fp32 weights")
