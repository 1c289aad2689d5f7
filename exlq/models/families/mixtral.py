"""Mixtral: a router and experts in place of every MLP, under names of their own in checkpoints."""

from exlq.models.family import Experts, Family
from exlq.types import GgufFamily

MIXTRAL = Family(
    "mixtral",
    ("MixtralForCausalLM",),
    "mixtral",
    exl2_architecture="MixtralForCausalLM",
    gguf=GgufFamily("llama", rotates_pairs=True),
    renamed={"mlp": "block_sparse_moe"},
    experts=Experts("intermediate_size", normed=True, gate="w1", up="w3", down="w2"),
)
