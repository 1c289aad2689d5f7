"""What config.json does not say of a family's tensors, and what a GGUF file calls them."""

from __future__ import annotations

from typing import Any

from exlq.models.family import EXPERTS, SHARED

BLOCK_NORMS = {
    False: ("input_layernorm", "post_attention_layernorm"),
    True: (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
NORMED_HEADS = ("qwen3", "qwen3_moe", "gemma3_text")
QKV = {f"self_attn.{name}_proj" for name in "qkv"}
# By model_type: linears that always have a bias, and whether `attention_bias` and `mlp_bias` are read.
BIASES: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "llama": ((), True, True),
    "qwen2": (tuple(QKV), False, False),
    "qwen2_moe": (tuple(QKV), False, False),
    "qwen3": ((), True, False),
    "qwen3_moe": ((), True, False),
    "gemma": ((), True, False),
    "gemma2": ((), True, False),
    "gemma3_text": ((), True, False),
}
WINDOW_PERIODS = {"gemma2": 2, "gemma3_text": 6}  # every n-th block sees the whole context
ROPE_TENSORS = {
    "llama3": ("rope_freqs.weight",),
    "longrope": ("rope_factors_long.weight", "rope_factors_short.weight"),
    "su": ("rope_factors_long.weight", "rope_factors_short.weight"),
}
FILE_LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"{SHARED}.{name}_proj": f"ffn_{name}_shexp" for name in ("gate", "up", "down")},
    **{f"{EXPERTS}.{name}_proj": f"ffn_{name}_exps" for name in ("gate", "up", "down")},
    f"{EXPERTS}.w1": "ffn_gate_exps",
    f"{EXPERTS}.w3": "ffn_up_exps",
    f"{EXPERTS}.w2": "ffn_down_exps",
}
DOWN = ("down_proj", "w2")  # the linears back from an MLP's inner channels
FILE_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
FILE_NORMS_OF_OUTPUTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
# What transformers assumes by model_type where config.json is silent; published ones leave these out.
_GEMMA = {"head_dim": 256, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "mixtral": {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    },
    "qwen3_moe": {
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gemma": {**_GEMMA, "num_key_value_heads": 16, "max_position_embeddings": 8192},
    "gemma2": {**_GEMMA2, "max_position_embeddings": 8192},
    "gemma3_text": {**_GEMMA2, "max_position_embeddings": 131072, "vocab_size": 262208},
}
