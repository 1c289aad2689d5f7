"""Block-by-block execution of causal language models over transformers."""

from __future__ import annotations

from pathlib import Path

import torch

from exlq.models.block import Block
from exlq.models.config import read_config, read_family
from exlq.models.families.gemma import GEMMA
from exlq.models.families.gemma2 import GEMMA2
from exlq.models.families.gemma3 import GEMMA3
from exlq.models.families.llama import LLAMA
from exlq.models.families.mistral import MISTRAL
from exlq.models.families.phi3 import PHI3
from exlq.models.families.qwen2 import QWEN2
from exlq.models.families.qwen3 import QWEN3
from exlq.models.families.yi import YI
from exlq.models.family import Family, Stage
from exlq.models.layout import Linear, layout_of
from exlq.models.model import Model
from exlq.models.permutation import PermutedWeights
from exlq.models.skeleton import build_skeleton
from exlq.models.staged import StagedPass
from exlq.types import Weights

__all__ = ["FAMILIES", "Block", "Family", "Linear", "Model", "Stage", "StagedPass", "family_of", "open_model"]


def family_of(directory: Path) -> Family:
    """The family of a model directory; raises ModelError listing the supported ones for any other."""
    by_architecture = {name: family for family in FAMILIES.values() for name in family.architectures}
    return read_family(directory, by_architecture)


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


FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "yi": YI,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "phi3": PHI3,
}
