"""Rotary embeddings: what config.json says of them, and how a GGUF file says it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFValueType
from torch import Tensor

from exlq.errors import ModelError
from exlq.formats.gguf.values import KeyValue

_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
_TWO_BASES = ("gemma3",)  # architectures whose sliding blocks have a base of their own
_BASE, _LOCAL_BASE = 10000.0, 10000.0
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
_OLDER_NAMES = {"su": "longrope"}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model: the base, the local blocks' own base, and how positions are scaled.

    `kind` is transformers' rope_type, `settings` what else transformers reads for it; `original_length`
    is the context before scaling, `length` the one after it.
    """

    base: float
    local_base: float | None
    kind: str
    settings: Mapping[str, Any]
    length: int
    original_length: int

    @property
    def factor(self) -> float:
        return float(self.settings.get("factor") or self.length / self.original_length)

    @property
    def fraction(self) -> float:
        """Part of a head's channels that are rotated."""
        return float(self.settings.get("partial_rotary_factor") or 1.0)


def read_rope(config: Mapping[str, Any]) -> Rope:
    """From config.json as transformers 4 writes it (rope_theta, rope_scaling) or 5 (rope_parameters).

    Raises:
        ModelError: for local blocks whose positions are scaled.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = _GLOBAL in given
    settings = dict((given.get(_GLOBAL) if nested else given) or {})
    local = dict((given.get(_LOCAL) if nested else None) or {})
    if _kind(local) != "default":
        raise ModelError(
            f"the sliding blocks scale positions ({_kind(local)}), llama.cpp does so in the others alone"
        )
    if config.get("partial_rotary_factor") is not None:
        settings.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    length = config.get("max_position_embeddings")
    if type(length) is not int:
        raise ModelError(f"config.json has max_position_embeddings = {length!r}; a whole number was wanted")
    original = config.get("original_max_position_embeddings") or settings.get(
        "original_max_position_embeddings"
    )
    local_base = local.get("rope_theta") or config.get("rope_local_base_freq")
    return Rope(
        base=float(settings.get("rope_theta") or config.get("rope_theta") or _BASE),
        local_base=None if local_base is None else float(local_base),
        kind=_kind(settings),
        settings=settings,
        length=length,
        original_length=int(original or length),
    )


def _kind(settings: Mapping[str, Any]) -> str:
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    return _OLDER_NAMES.get(kind, kind)


def rope_metadata(rope: Rope, architecture: str, head_dim: int) -> list[KeyValue]:
    """The `{architecture}.rope.*` entries.

    Raises:
        ModelError: for what llama.cpp cannot compute.
    """
    check_rope(rope, architecture)
    prefix = f"{architecture}.rope"
    entries = [
        KeyValue(f"{prefix}.dimension_count", rotated_channels(rope, head_dim), GGUFValueType.UINT32),
        _real(f"{prefix}.freq_base", rope.base),
    ]
    if architecture in _TWO_BASES:
        entries.append(_real(f"{prefix}.freq_base_swa", rope.local_base or _LOCAL_BASE))
    return entries + _SCALINGS[rope.kind].metadata(rope, f"{prefix}.scaling")


def rope_tensors(rope: Rope, architecture: str, head_dim: int) -> dict[str, Tensor]:
    """Computed tensors by name, (rotated channels / 2,) float32 each: what divides the frequencies.

    Raises:
        ModelError: for what llama.cpp cannot compute.
    """
    check_rope(rope, architecture)
    tensors = _SCALINGS[rope.kind].tensors(rope, rotated_channels(rope, head_dim))
    wanted = rotated_channels(rope, head_dim) // 2
    for name, values in tensors.items():
        if values.shape != (wanted,):
            raise ModelError(f"{name} has {len(values)} factors in config.json, {wanted} were wanted")
    return tensors


def rotated_channels(rope: Rope, head_dim: int) -> int:
    return int(head_dim * rope.fraction)


def check_rope(rope: Rope, architecture: str) -> None:
    """Raises ModelError, naming it, for a rotary embedding that llama.cpp does not have here."""
    scaling = _SCALINGS.get(rope.kind)
    if scaling is None:
        raise ModelError(
            f"rope scaling {rope.kind!r} cannot be said in a GGUF file; those that can are"
            f" {', '.join(_SCALINGS)}"
        )
    if not scaling.possible(architecture):
        raise ModelError(
            f"llama.cpp has no {rope.kind!r} rope scaling for the architecture {architecture}; "
            "use a model without it"
        )
    if rope.fraction != 1.0 and architecture != "phi3":
        raise ModelError(f"llama.cpp rotates whole heads for {architecture}, config.json {rope.fraction:g}")
    if rope.local_base not in (None, rope.base) and architecture not in _TWO_BASES:
        raise ModelError(
            f"llama.cpp has one rope base for {architecture}, config.json has one per layer type"
        )
    if rope.kind == "yarn":
        _check_yarn(rope)


def _check_yarn(rope: Rope) -> None:
    """llama.cpp reads the bounds of the ramp from the file for a few architectures, none of these."""
    for name, own in _YARN.items():
        found = rope.settings.get(name)
        if found is not None and found != own:
            raise ModelError(f"llama.cpp computes yarn with {name} = {own}, config.json says {found}")


@dataclass(frozen=True)
class _Scaling:
    possible: Callable[[str], bool]  # of an architecture
    metadata: Callable[[Rope, str], list[KeyValue]]  # (rope, prefix of keys)
    tensors: Callable[[Rope, int], dict[str, Tensor]] = lambda _rope, _channels: {}


def _real(key: str, value: float) -> KeyValue:
    return KeyValue(key, float(value), GGUFValueType.FLOAT32)


def _kind_entry(rope: Rope, prefix: str) -> KeyValue:
    return KeyValue(f"{prefix}.type", rope.kind, GGUFValueType.STRING)


def _original_length(rope: Rope, prefix: str) -> KeyValue:
    return KeyValue(f"{prefix}.original_context_length", rope.original_length, GGUFValueType.UINT32)


def _no_metadata(_rope: Rope, _prefix: str) -> list[KeyValue]:
    return []


def _linear_metadata(rope: Rope, prefix: str) -> list[KeyValue]:
    return [_kind_entry(rope, prefix), _real(f"{prefix}.factor", rope.factor)]


def _yarn_metadata(rope: Rope, prefix: str) -> list[KeyValue]:
    """`attn_factor` is beyond yarn's own magnitude, by which llama.cpp multiplies anyway."""
    own = _magnitude(rope.factor)
    wanted = rope.settings.get("attention_factor") or _yarn_attention_factor(rope)
    entries = [*_linear_metadata(rope, prefix), _original_length(rope, prefix)]
    if abs(wanted / own - 1) > 1e-6:
        entries.append(_real(f"{prefix}.attn_factor", wanted / own))
    return entries


def _yarn_attention_factor(rope: Rope) -> float:
    mscale, mscale_all = rope.settings.get("mscale"), rope.settings.get("mscale_all_dim")
    if mscale and mscale_all:
        return _magnitude(rope.factor, mscale) / _magnitude(rope.factor, mscale_all)
    return _magnitude(rope.factor)


def _magnitude(factor: float, weight: float = 1.0) -> float:
    """YaRN's scale of the scores for a context `factor` times as long.

    Source: Peng et al. 2023, arXiv:2309.00071, equation 22.
    """
    return 1.0 if factor <= 1.0 else 0.1 * weight * math.log(factor) + 1.0


def _longrope_metadata(rope: Rope, prefix: str) -> list[KeyValue]:
    wanted = rope.settings.get("attention_factor")
    if wanted is None:
        growth = (
            math.log(rope.factor) / math.log(rope.original_length)
            if rope.factor > 1 < rope.original_length
            else 0.0
        )
        wanted = math.sqrt(1 + growth)
    return [_kind_entry(rope, prefix), _real(f"{prefix}.attn_factor", wanted)]


def _longrope_tensors(rope: Rope, _channels: int) -> dict[str, Tensor]:
    found = {}
    for name in ("long", "short"):
        factors = rope.settings.get(f"{name}_factor")
        if not isinstance(factors, list | tuple):
            raise ModelError(f"rope scaling 'longrope' without a list {name}_factor in config.json")
        found[f"rope_factors_{name}.weight"] = torch.tensor(factors, dtype=torch.float32)
    return found


def _llama3_tensors(rope: Rope, channels: int) -> dict[str, Tensor]:
    """Llama 3.1's scaling: slow channels by the whole factor, fast ones not, those between by a part.

    A channel's place between is how often it turns within the original context.
    """
    missing = [
        name for name in ("factor", "low_freq_factor", "high_freq_factor") if name not in rope.settings
    ]
    if missing:
        raise ModelError(f"rope scaling 'llama3' without {', '.join(missing)} in config.json")
    low, high = float(rope.settings["low_freq_factor"]), float(rope.settings["high_freq_factor"])
    exponents = torch.arange(0, channels, 2, dtype=torch.float64) / channels
    turns = rope.original_length / (2 * math.pi * rope.base**exponents)
    part = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns > low).double()
    factors = 1 / ((1 - part) / rope.factor + part)
    return {"rope_freqs.weight": factors.float()}


_SCALINGS: dict[str, _Scaling] = {
    "default": _Scaling(lambda _architecture: True, _no_metadata),
    "linear": _Scaling(lambda _architecture: True, _linear_metadata),
    "yarn": _Scaling(lambda architecture: architecture not in _TWO_BASES, _yarn_metadata),
    "llama3": _Scaling(lambda architecture: architecture == "llama", _no_metadata, _llama3_tensors),
    "longrope": _Scaling(lambda architecture: architecture == "phi3", _longrope_metadata, _longrope_tensors),
}
