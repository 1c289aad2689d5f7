"""Opening a model directory: its family, its config, its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from exlq.errors import ModelError
from exlq.models.config import family_of, read_json
from exlq.models.family import Family
from exlq.models.layout import layout_of
from exlq.models.model import Model
from exlq.models.permutation import PermutedWeights
from exlq.models.skeleton import build_skeleton
from exlq.types import Weights


def open_model(
    directory: Path, weights: Weights, *, device: torch.device, permute_mlp: bool = False
) -> Model:
    """The model `directory/config.json` describes, over `weights`, ready to run block by block on `device`.

    No weights but the final norm are read yet, yet every tensor is checked to be there. With
    `permute_mlp`, channels inside its MLPs and attention heads are in another order; the function is
    the same.

    Raises:
        ModelError: an unsupported architecture, a config transformers cannot use, a tensor that is
            missing, misshapen or quantized.
    """
    family = family_of(directory)
    config = read_config(directory, family)
    skeleton = build_skeleton(config, family, device)
    layout = layout_of(skeleton, config, family)
    ordered = PermutedWeights(weights, layout, config.num_key_value_heads) if permute_mlp else weights
    return Model(config, family, skeleton, layout, ordered, device)


def read_config(directory: Path, family: Family) -> Any:
    """The transformers config of a directory, its rope settings in either form; runs no code of its own."""
    raw = read_json(directory)
    kept = {
        key: value
        for key, value in raw.items()
        if key not in ("model_type", "auto_map", "quantization_config")
    }
    try:
        return CONFIG_MAPPING[family.model_type].from_dict(kept)
    except Exception as exc:  # the library and its validators raise what they like
        reason = " ".join(str(exc).split())
        raise ModelError(f"{directory}: transformers cannot use this config.json: {reason}") from exc
