"""The type each tensor of a GGUF file gets by a recipe, as llama-quantize chooses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exlq.errors import ConfigError, ModelError
from exlq.formats.gguf.overrides import Overrides, pinned_types
from exlq.formats.gguf.recipes import OUTPUT, Recipe, fallback, is_quantized, recipe_types
from exlq.formats.gguf.values import KeyValue, TensorInfo
from exlq.formats.gguf_blocks import FLOAT_TYPES, TYPES
from exlq.pipeline.requantize_metadata import shape_of

NEED_IMATRIX = ("Q2_K_S",)


@dataclass(frozen=True)
class Wishes:
    """How types are chosen, with the flags of llama-quantize; `recipe` is None to keep all as they are."""

    recipe: Recipe | None
    overrides: Overrides
    pure: bool = False
    leave_output: bool = False
    allow_requantize: bool = False
    imatrix: bool = False


def require_sense(wishes: Wishes) -> None:
    """Refuses flags that contradict the recipe.

    Raises:
        ConfigError: saying which.
    """
    recipe = wishes.recipe
    if recipe is None:
        if wishes.overrides != Overrides() or wishes.pure or wishes.imatrix:
            raise ConfigError("COPY changes no type: leave out --imatrix, --pure and types given by hand")
    elif recipe.name in NEED_IMATRIX and not wishes.imatrix:
        raise ConfigError(f"{recipe.name} without an importance matrix is of no use: give --imatrix FILE")


def wanted_types(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, KeyValue], wishes: Wishes
) -> dict[str, str]:
    """The type of every tensor, in the order of the file; what is not quantized keeps its own.

    Raises:
        ConfigError: for a tensor that is quantized already, without leave to do it again.
        ModelError: for one whose type cannot be read as weights, or metadata that tell too little.
    """
    types = {info.name: info.type for info in tensors}
    if wishes.recipe is None:
        return types
    chosen = _chosen(tensors, metadata, wishes, wishes.recipe)
    for info in tensors:
        if is_quantized(info.name, info.shape) and not (wishes.leave_output and info.name == OUTPUT):
            types[info.name] = chosen[info.name]
            _require_source(info, chosen[info.name], wishes.allow_requantize)
    return types


def _chosen(
    tensors: Sequence[TensorInfo], metadata: Mapping[str, KeyValue], wishes: Wishes, recipe: Recipe
) -> dict[str, str]:
    by_hand = pinned_types(wishes.overrides, tensors, recipe)
    if wishes.pure or recipe.is_float:
        return {info.name: fallback(by_hand.get(info.name, recipe.base), info.shape[-1]) for info in tensors}
    return recipe_types(recipe, tensors, shape_of(metadata), imatrix=wishes.imatrix, pinned=by_hand)


def _require_source(info: TensorInfo, type: str, allow_requantize: bool) -> None:
    if type == info.type or info.type in FLOAT_TYPES:
        return
    if info.type not in TYPES:
        raise ModelError(
            f"{info.name} is of type {info.type}, which cannot be read here; want one of {', '.join(TYPES)}"
        )
    if not allow_requantize:
        raise ConfigError(
            f"{info.name} is quantized already, to {info.type}: give the file it was made of, "
            "or --allow-requantize and a loss"
        )
