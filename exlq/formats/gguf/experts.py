"""What a GGUF file says of a model's experts, and which models with experts llama.cpp cannot run.

Source: llama.cpp, src/models/llama.cpp, qwen2moe.cpp and qwen3moe.cpp (2026-10).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType

from exlq.errors import ModelError
from exlq.formats.gguf.values import KeyValue

# By architecture: the keys of the file and of config.json, and whether the weights of a token's experts are
# made to add up to 1; None: those of llama with experts always are, and no key says so.
_LENGTHS = {
    "qwen2moe": {
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": {"expert_feed_forward_length": "moe_intermediate_size"},
}
_NORMED = {"qwen2moe": False, "qwen3moe": True}
_UNTIED = ("qwen2moe",)


def expert_count(config: Mapping[str, Any]) -> int:
    """Experts of a block, 0 where there are none."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def expert_parameters(config: Mapping[str, Any], architecture: str) -> list[KeyValue]:
    """The entries that speak of experts, none for a model without.

    Args:
        config: config.json with what transformers adds.

    Raises:
        ModelError: for a model that llama.cpp would compute otherwise or not at all.
    """
    count = expert_count(config)
    if not count:
        return []
    _check_runnable(config, architecture)
    lengths = {key: config[name] for key, name in _LENGTHS.get(architecture, {}).items()}
    found = {"expert_count": count, "expert_used_count": config["num_experts_per_tok"], **lengths}
    return [
        KeyValue(f"{architecture}.{key}", int(value), GGUFValueType.UINT32) for key, value in found.items()
    ]


def _check_runnable(config: Mapping[str, Any], architecture: str) -> None:
    if config.get("mlp_only_layers") or (config.get("decoder_sparse_step") or 1) != 1:
        raise ModelError(
            f"{architecture} in llama.cpp has experts in every block, config.json (mlp_only_layers, "
            "decoder_sparse_step) in some: it cannot be written as GGUF"
        )
    normed = bool(config.get("norm_topk_prob", False))
    if normed != _NORMED.get(architecture, normed):
        adds = "adds" if _NORMED[architecture] else "does not add"
        raise ModelError(
            f"{architecture} in llama.cpp {adds} up the weights of experts to 1, config.json has "
            f"norm_topk_prob = {normed}: it cannot be written as GGUF"
        )
    if architecture in _UNTIED and config.get("tie_word_embeddings"):
        raise ModelError(f"{architecture} in llama.cpp has a head of its own, this model has none")
