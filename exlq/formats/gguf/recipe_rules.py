"""The rules of llama-quantize's recipes, as a table: which tensors get another type than the base, and where.

Source: llama.cpp, src/llama-quant.cpp (2026-10), restated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

FALCON = "falcon"  # the one architecture with rules of its own
MIXTRAL_EXPERTS = 8  # models of just so many experts keep their attention at more bits

# Blocks of the models llama.cpp counts as "70B", by architecture; for llama only where key heads are shared.
BLOCKS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


@dataclass(frozen=True)
class Shape:
    """What the rules need to know of a model; `n_experts` is 0 where there are none.

    `n_heads` and `n_kv_heads` are those of the first block.
    """

    architecture: str
    n_blocks: int
    n_heads: int
    n_kv_heads: int
    n_experts: int = 0

    @property
    def queries_per_key(self) -> int:
        return self.n_heads // self.n_kv_heads if self.n_kv_heads else 0

    @property
    def is_70b(self) -> bool:
        shares = self.architecture != "llama" or self.n_heads != self.n_kv_heads
        return shares and BLOCKS_OF_70B.get(self.architecture) == self.n_blocks


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: the `index`-th of `count` of its kind in `model`, with an imatrix or without."""

    index: int
    count: int
    model: Shape
    imatrix: bool


Where = Callable[[Place], bool]
Rule = tuple[Where, str]  # the type of the tensors for which it holds


def everywhere(place: Place) -> bool:
    return True


def first(n: int) -> Where:
    """The first n tensors of the kind."""
    return lambda place: place.index < n


def early(fraction: int) -> Where:
    """The first 1 / fraction of the blocks, rounded down."""
    return lambda place: place.index < place.count // fraction


def spread(place: Place) -> bool:
    """The first and last eighth of the blocks, and every third between."""
    eighth = place.count // 8
    late = place.index >= 7 * place.count // 8
    return place.index < eighth or late or (place.index - eighth) % 3 == 2


def shared_keys(place: Place) -> bool:
    """Four or more queries to a key."""
    return place.model.queries_per_key >= 4


def early_with_imatrix(place: Place) -> bool:
    return place.imatrix and early(8)(place)


def early_without_imatrix(place: Place) -> bool:
    return not place.imatrix and early(8)(place)


ATTN_V, ATTN_K, ATTN_OUTPUT, FFN_DOWN = "attn_v", "attn_k", "attn_output", "ffn_down"

# Recipe -> kind of tensor -> rules; the first that holds gives the type, else it is the recipe's base.
RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "Q2_K": {
        ATTN_V: ((shared_keys, "Q4_K"), (everywhere, "Q3_K")),
        ATTN_OUTPUT: ((everywhere, "Q3_K"),),
        FFN_DOWN: ((everywhere, "Q3_K"),),
    },
    "Q2_K_S": {
        ATTN_V: ((shared_keys, "Q4_K"),),
        FFN_DOWN: ((early(8), "Q4_K"),),
    },
    "Q3_K_M": {
        ATTN_V: ((first(2), "Q5_K"), (everywhere, "Q4_K")),
        ATTN_OUTPUT: ((everywhere, "Q4_K"),),
        FFN_DOWN: ((early(16), "Q5_K"), (everywhere, "Q4_K")),
    },
    "Q3_K_L": {
        ATTN_V: ((everywhere, "Q5_K"),),
        ATTN_OUTPUT: ((everywhere, "Q5_K"),),
        FFN_DOWN: ((everywhere, "Q5_K"),),
    },
    "Q4_0": {FFN_DOWN: ((early_with_imatrix, "Q4_1"),)},
    "Q5_0": {FFN_DOWN: ((early_with_imatrix, "Q5_1"),)},
    "Q4_K_S": {
        ATTN_V: ((first(4), "Q5_K"),),
        FFN_DOWN: ((early(8), "Q5_K"),),
    },
    "Q4_K_M": {ATTN_V: ((spread, "Q6_K"),), FFN_DOWN: ((spread, "Q6_K"),)},
    "Q5_K_M": {ATTN_V: ((spread, "Q6_K"),), FFN_DOWN: ((spread, "Q6_K"),)},
    "IQ4_NL": {ATTN_V: ((shared_keys, "Q5_K"),), FFN_DOWN: ((early_without_imatrix, "Q5_K"),)},
    "IQ4_XS": {ATTN_V: ((shared_keys, "Q5_K"),), FFN_DOWN: ((early_without_imatrix, "Q5_K"),)},
}

# What Falcon has instead; a kind with no rules keeps the base.
FALCON_RULES: dict[str, dict[str, tuple[Rule, ...]]] = {
    "Q2_K": {ATTN_OUTPUT: ()},
    "Q3_K_M": {ATTN_OUTPUT: (), FFN_DOWN: ((early(16), "Q5_K"), (spread, "Q4_K"))},
    "Q3_K_L": {ATTN_OUTPUT: ((everywhere, "Q4_K"),), FFN_DOWN: ((everywhere, "Q4_K"),)},
    "Q4_K_S": {FFN_DOWN: ()},
    "Q4_K_M": {FFN_DOWN: ((early(16), "Q6_K"), (spread, "Q5_K"))},
}

# Recipes that store attn_output as Q5_K in a model of eight experts; the others keep it at the base.
Q5_K_ATTN_OUTPUT = {"Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M", "IQ4_NL", "IQ4_XS"}


def type_at(recipe: str, base: str, kind: str, place: Place) -> str:
    """The type of a tensor inside a block, before it is held against the length of its rows."""
    model = place.model
    if model.n_experts == MIXTRAL_EXPERTS and kind in (ATTN_V, ATTN_K):
        return "Q8_0"
    if model.n_experts == MIXTRAL_EXPERTS and kind == ATTN_OUTPUT and model.architecture != FALCON:
        return "Q5_K" if recipe in Q5_K_ATTN_OUTPUT else base
    rules = RULES.get(recipe, {})
    if model.architecture == FALCON:
        rules = rules | FALCON_RULES.get(recipe, {})
    chosen = next((type for where, type in rules.get(kind, ()) if where(place)), base)
    return "Q5_K" if kind == ATTN_V and model.is_70b and chosen in ("Q3_K", "Q4_K") else chosen
