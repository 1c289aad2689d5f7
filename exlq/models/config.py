"""Reading config.json and finding the family that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exlq.errors import ModelError
from exlq.files import read_json as read_strictly
from exlq.models.families import FAMILIES
from exlq.models.family import Family

# The settings that are read here, wherever they stand. Of sizes ten times and more of what the largest
# models have: beyond, laying out a model takes minutes and memory.
MOST = {
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "shared_expert_intermediate_size": 1 << 20,
    "num_experts": 1 << 12,
    "num_local_experts": 1 << 12,
    "num_experts_per_tok": 1 << 12,
    "decoder_sparse_step": 1 << 10,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 30,
    "original_max_position_embeddings": 1 << 30,
}
LARGEST_NUMBER = 1e30  # float32 holds it
GROUPS: dict[str, type] = {
    "rope_parameters": dict,
    "rope_scaling": dict,
    "long_factor": list,
    "short_factor": list,
    "layer_types": list,
    "mlp_only_layers": list,
}
NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "rope_local_base_freq",
    "partial_rotary_factor",
    "sliding_window",
    "sliding_window_pattern",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
)
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
            f"{directory}: config.json names the architectures {_said(named)}; wanted one of {supported}"
        )
    family = families.get(named[0]) if isinstance(named[0], str) else None
    if family is None:
        raise ModelError(
            f"{directory}: the architecture {_said(named[0])} is not supported; supported are {supported}"
        )
    _check_settings(directory, raw)
    _check_model_type(directory, raw, family)
    _check_not_quantized(directory, raw)
    return family


def read_json(directory: Path) -> dict[str, Any]:
    """config.json as it stands; raises ModelError where it is missing or not an object."""
    path = directory / "config.json"
    try:
        raw = read_strictly(path)
    except FileNotFoundError as exc:
        raise ModelError(f"no config.json in {directory}; wanted a Hugging Face model directory") from exc
    except ValueError as exc:
        reason = " ".join(str(exc).split())
        raise ModelError(f"{path} is not JSON ({reason}); download it again") from exc
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}; wanted an object")
    return raw


def _check_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Holds the settings, and those of groups in them, against the tables above; None is no setting."""
    for key, value in settings.items():
        if isinstance(value, dict):
            _check_settings(directory, value)
        if value is not None and (wanted := _unmet(key, value)):
            raise ModelError(
                f"{directory}: config.json has {key} = {_said(value)}; wanted {wanted}; download it again"
            )


def _unmet(key: str, value: object) -> str | None:
    """What a setting should have been."""
    if key in GROUPS:
        return None if isinstance(value, GROUPS[key]) else f"a {GROUPS[key].__name__}"
    if key in MOST and not (type(value) is int and 0 < value <= MOST[key]):
        return f"a whole number from 1 to {MOST[key]:,}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key in NUMBERS and not (is_number and 0 <= value <= LARGEST_NUMBER):  # type: ignore[operator]
        return f"a number from 0 to {LARGEST_NUMBER:g}"
    return None


def _said(value: object) -> str:
    text = str(value)[:60]
    return text if text.isprintable() else repr(text)


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
