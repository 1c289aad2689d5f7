"""Qwen3-MoE: many small experts, norms on the heads of q and k."""

from exlq.models.family import Experts, Family
from exlq.types import GgufFamily

QWEN3_MOE = Family(
    "qwen3_moe",
    ("Qwen3MoeForCausalLM",),
    "qwen3_moe",
    exl2_architecture="Qwen3MoeForCausalLM",
    gguf=GgufFamily("qwen3moe"),
    experts=Experts("moe_intermediate_size", normed="norm_topk_prob"),
)
