"""llama-quantize's recipes: the type it gives every tensor for one name.

Source: llama.cpp, src/llama-quant.cpp and tools/quantize/quantize.cpp (2026-10), restated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from gguf import LlamaFileType

from exlq.errors import ConfigError, FormatError, ModelError
from exlq.formats.gguf.recipe_rules import (
    ATTN_K,
    ATTN_OUTPUT,
    ATTN_V,
    FALCON,
    FFN_DOWN,
    Place,
    type_at,
)
from exlq.formats.gguf.recipe_rules import Shape as Shape
from exlq.formats.gguf.types import BLOCKS, FLOATS

OUTPUT = "output.weight"
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")


class Named(Protocol):
    """A tensor as a file lists it; `shape` is torch's, input features last."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Recipe:
    """One name llama-quantize takes: the type most tensors get, and the number the file says it with."""

    name: str
    file_type: int  # of gguf.LlamaFileType
    base: str  # of types.BLOCKS

    @property
    def is_float(self) -> bool:
        """Whether all tensors that may be quantized get the base, whatever their place."""
        return self.base in FLOATS


def recipe_named(text: str) -> Recipe:
    """The recipe of a name in any case, an alias or a number of LlamaFileType.

    Raises:
        ConfigError: if there is none; it lists the names.
    """
    name = text.strip().upper()
    found = RECIPES.get(ALIASES.get(name, name))
    if found is None and name.isdecimal():
        found = next((recipe for recipe in RECIPES.values() if recipe.file_type == int(name)), None)
    if found is None:
        known = ", ".join([*RECIPES, *ALIASES])
        raise ConfigError(f"{text!r} is no GGUF type; want one of {known} or its number in llama-quantize")
    return found


def recipe_types(
    recipe: Recipe,
    tensors: Sequence[Named],
    model: Shape,
    *,
    imatrix: bool,
    pinned: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """The type llama-quantize gives each tensor, by name; F32 where it quantizes nothing.

    Args:
        tensors: all tensors of the file, in any order: whether there is an `output.weight` matters.
        imatrix: whether an importance matrix is given, which some rules ask.
        pinned: types given by hand to some tensors. They are not counted among those of their kind, as in
            llama-quantize, so one may move the types of others.

    Raises:
        ModelError: if a model with experts has an ffn_down whose block cannot be told.
    """
    pinned = pinned or {}
    quantized = [t for t in tensors if is_quantized(t.name, t.shape)]
    types = {tensor.name: "F32" for tensor in tensors}
    types |= {t.name: pinned.get(t.name, recipe.base) for t in quantized}
    if not recipe.is_float:
        free = [t for t in quantized if t.name not in pinned]
        types |= _head_types(recipe, free, model, is_tied(tensors))
        types |= _block_types(recipe, free, model, imatrix, count=_n_values(tensors))
        types |= {t.name: fallback(types[t.name], t.shape[-1]) for t in quantized}
    return types


def is_tied(tensors: Iterable[Named]) -> bool:
    """Whether the embedding is the head too: the file then has no `output.weight`."""
    return all(tensor.name != OUTPUT for tensor in tensors)


def is_quantized(name: str, shape: Sequence[int]) -> bool:
    """Whether llama-quantize changes such a tensor's type at all; the others stay as their file has them.

    ggml does not count leading dimensions of 1 (torch order), so (1, n) is a vector.
    """
    return len(shape) >= 2 and math.prod(shape[:-1]) > 1 and is_quantized_name(name)


def is_quantized_name(name: str) -> bool:
    """`is_quantized` by the name alone: False for what stays as it is in any shape."""
    return name.endswith("weight") and name not in KEPT_NAMES and not KEPT.search(name)


def fallback(type: str, in_features: int) -> str:
    """`type`, or the one llama-quantize takes instead where rows are no whole blocks of it."""
    if in_features % BLOCKS[type].block_size == 0:
        return type
    instead = FALLBACKS.get(type, type)
    return instead if in_features % BLOCKS[instead].block_size == 0 else "F16"


def row_bytes(type: str, in_features: int) -> int:
    """Bytes of one row.

    Raises:
        FormatError: if it is no whole number of blocks.
    """
    stored = BLOCKS[type]
    if in_features % stored.block_size:
        raise FormatError(
            f"{type} stores whole blocks of {stored.block_size} weights, found rows of {in_features}; "
            f"choose {fallback(type, in_features)}"
        )
    return in_features // stored.block_size * stored.type_size


def tensor_bytes(type: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of torch's shape, without padding; raises as `row_bytes` does."""
    return math.prod(shape[:-1]) * row_bytes(type, shape[-1])


def nearest_file_type(bytes_by_type: Mapping[str, int]) -> LlamaFileType:
    """What to call a mix of types no recipe gives: the recipe of the type that holds most bytes.

    llama.cpp prints it and reads nothing else from it. K-quants of several recipes are called _M.
    """
    largest = max(bytes_by_type, key=lambda type: bytes_by_type[type])
    return LlamaFileType(recipe_named(largest).file_type)


def _head_types(recipe: Recipe, tensors: Sequence[Named], model: Shape, tied: bool) -> dict[str, str]:
    """Types of the head, and of the embeddings where they are one."""
    heads = [t for t in tensors if t.name == OUTPUT or (tied and t.name in EMBEDDINGS)]
    return {tensor.name: _head_type(recipe, tensor, model) for tensor in heads}


def _head_type(recipe: Recipe, tensor: Named, model: Shape) -> str:
    whole = tensor.shape[-1] % BLOCKS[recipe.base].block_size == 0
    return "Q6_K" if whole and recipe.base != "Q8_0" and model.architecture != FALCON else "Q8_0"


def _block_types(
    recipe: Recipe, tensors: Sequence[Named], model: Shape, imatrix: bool, count: int
) -> dict[str, str]:
    """Types of the tensors that rules speak of; `count` is that of attn_v and its like in the whole file."""
    types: dict[str, str] = {}
    seen = dict.fromkeys([ATTN_V, FFN_DOWN], 0)
    for tensor in sorted(tensors, key=_file_order):
        kind = _kind(tensor.name)
        if kind is None:
            continue
        index = seen.get(kind, 0)
        if kind == FFN_DOWN and model.n_experts > 1:
            index = _block_of(tensor.name, model)
        place = Place(index, count if kind == ATTN_V else model.n_blocks, model, imatrix)
        types[tensor.name] = type_at(recipe.name, recipe.base, kind, place)
        seen[kind] = seen.get(kind, 0) + 1
    return types


def _kind(name: str) -> str | None:
    if name == OUTPUT or name in EMBEDDINGS:
        return None
    return next((kind for part, kind in KINDS.items() if part in name), None)


def _n_values(tensors: Iterable[Named]) -> int:
    return sum(_kind(tensor.name) == ATTN_V for tensor in tensors)


def _file_order(tensor: Named) -> tuple[int, str]:
    """llama.cpp goes by block, then by the bytes of the name."""
    found = BLOCK.match(tensor.name)
    return (int(found[1]) if found else -1, tensor.name)


def _block_of(name: str, model: Shape) -> int:
    found = BLOCK.match(name)
    if found is None or int(found[1]) >= model.n_blocks:
        raise ModelError(
            f"{name} is in none of the {model.n_blocks} blocks of a model with experts; "
            f"want a name like blk.0.ffn_down_exps.weight"
        )
    return int(found[1])


BLOCK = re.compile(r"blk\.(\d+)\.")

RECIPES: dict[str, Recipe] = {
    name: Recipe(name, int(file_type), base)
    for name, file_type, base in [
        ("Q2_K", 10, "Q2_K"),
        ("Q2_K_S", 21, "Q2_K"),
        ("Q3_K_S", 11, "Q3_K"),
        ("Q3_K_M", 12, "Q3_K"),
        ("Q3_K_L", 13, "Q3_K"),
        ("Q4_0", 2, "Q4_0"),
        ("Q4_1", 3, "Q4_1"),
        ("Q4_K_S", 14, "Q4_K"),
        ("Q4_K_M", 15, "Q4_K"),
        ("Q5_0", 8, "Q5_0"),
        ("Q5_1", 9, "Q5_1"),
        ("Q5_K_S", 16, "Q5_K"),
        ("Q5_K_M", 17, "Q5_K"),
        ("Q6_K", 18, "Q6_K"),
        ("Q8_0", 7, "Q8_0"),
        ("IQ4_NL", 25, "IQ4_NL"),
        ("IQ4_XS", 30, "IQ4_XS"),
        ("F16", 1, "F16"),
        ("BF16", 32, "BF16"),
        ("F32", 0, "F32"),
    ]
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# A part of the name -> what the rules call it, the first that is found. Fused and compressed projections
# count as values: llama-quantize tests for those first.
KINDS = {
    "attn_qkv.weight": ATTN_V,
    "attn_kv_b.weight": ATTN_V,
    "attn_v.weight": ATTN_V,
    "attn_k.weight": ATTN_K,
    "attn_q.weight": None,
    "attn_output.weight": ATTN_OUTPUT,
    "ffn_up": None,
    "ffn_gate": None,
    "ffn_down": FFN_DOWN,
}

KEPT_NAMES = {"position_embd.weight", "token_types.weight"}
KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(?:first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight"
    r"|attn_rel_b\.weight|\.position_embd|sam\.pos_embd|sam\.neck\.|sam\.net_|\.rel_pos|\.patch_embd"
    r"|\.patch_merger|a\.rvq\.codebook|mm\.a\.code_embd"
)
