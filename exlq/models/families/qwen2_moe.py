"""Qwen1.5-MoE and Qwen2-MoE: experts beside one that sees every token, biases on q, k and v.

ExLlamaV2 0.3.2 does not know it.
"""

from exlq.models.family import Experts, Family
from exlq.types import GgufFamily

QWEN2_MOE = Family(
    "qwen2_moe",
    ("Qwen2MoeForCausalLM",),
    "qwen2_moe",
    exl2_architecture=None,
    gguf=GgufFamily("qwen2moe"),
    experts=Experts(
        "moe_intermediate_size", normed="norm_topk_prob", shared_width="shared_expert_intermediate_size"
    ),
)
