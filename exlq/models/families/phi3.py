"""Phi-3: q, k and v are one matrix, gate and up another."""

from __future__ import annotations

from typing import Any

from exlq.models.family import Family, Part, Stage
from exlq.types import GgufFamily


def _head_rows(config: Any, start_heads: int, heads: int) -> slice:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return slice(start_heads * head_dim, (start_heads + heads) * head_dim)


def _query(config: Any) -> slice:
    return _head_rows(config, 0, config.num_attention_heads)


def _key(config: Any) -> slice:
    return _head_rows(config, config.num_attention_heads, config.num_key_value_heads)


def _value(config: Any) -> slice:
    start = config.num_attention_heads + config.num_key_value_heads
    return _head_rows(config, start, config.num_key_value_heads)


def _gate(config: Any) -> slice:
    return slice(0, config.intermediate_size)


def _up(config: Any) -> slice:
    return slice(config.intermediate_size, 2 * config.intermediate_size)


PHI3 = Family(
    "phi3",
    ("Phi3ForCausalLM",),
    "phi3",
    exl2_architecture="Phi3ForCausalLM",
    gguf=GgufFamily("phi3"),
    stages=(
        Stage(
            "attn_in",
            (
                Part("self_attn.q_proj", "self_attn.qkv_proj", _query),
                Part("self_attn.k_proj", "self_attn.qkv_proj", _key),
                Part("self_attn.v_proj", "self_attn.qkv_proj", _value),
            ),
        ),
        Stage("attn_out", (Part("self_attn.o_proj"),)),
        Stage(
            "mlp_in",
            (
                Part("mlp.gate_proj", "mlp.gate_up_proj", _gate),
                Part("mlp.up_proj", "mlp.gate_up_proj", _up),
            ),
        ),
        Stage("mlp_out", (Part("mlp.down_proj"),)),
    ),
)
